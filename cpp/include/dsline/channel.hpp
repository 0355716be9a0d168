#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "dsline/error.hpp"

namespace dsline {

/// What became of a call that does not fail.
enum class Outcome : int {
  Ok = 0,
  Empty = 1,      ///< nothing to receive
  Full = 2,       ///< no free slot
  Closed = 3,     ///< this handle is closed, or the channel is shut down (and drained, for a receiver)
  Dropped = 4,    ///< a drop policy discarded the message, counted
  Corrupted = 5,  ///< the message failed its check; it is gone, counted, and the channel goes on
  TimedOut = 6,
  Interrupted = 7,  ///< a signal came in
};

/// What a producer does when no slot is free.
enum class Backpressure : int { Block = 0, Raise = 1, DropNewest = 2, DropOldest = 3 };

/// What an opener does with a region whose participants are all dead.
enum class OnStale : int { Recover = 0, Reset = 1, Raise = 2 };

enum class OpenMode : int { OpenOrCreate = 0, Create = 1, Open = 2 };

/// Kinds of payload, as the frame header carries them.
inline constexpr int kBytesMessage = 0;
inline constexpr int kArrayMessage = 1;

/// 0 and -1 mean "not given": the default where a channel is created, whatever it has where it is opened.
struct ChannelOptions {
  std::uint32_t capacity = 0;
  std::uint64_t slot_size = 0;
  std::uint64_t max_message_size = 0;
  std::uint32_t max_handles = 0;
  int checksum = -1;  ///< 0 none, 1 header, 2 full
  std::uint32_t mode = 0600;
  OnStale on_stale = OnStale::Recover;
  std::uint64_t first_position = 0;  ///< for tests that start near a wrap
};

/// A slot that is the caller's to write, until it is published or aborted, in the process that took it.
struct Loan {
  std::uint64_t word = 0;     ///< the slot's word while it is this loan's
  std::uint32_t process = 0;  ///< fork generation of the owner
  std::uint32_t slot = 0;
  std::uint32_t meta_bytes = 0;
  std::uint64_t payload_bytes = 0;
  std::byte* meta = nullptr;
  std::byte* payload = nullptr;
};

/// A message that the caller holds until it releases it.
struct Received {
  std::uint32_t slot = 0;
  std::uint32_t attempts = 0;  ///< deliveries before this one
  std::uint64_t sequence = 0;
  std::uint32_t process = 0;  ///< fork generation of the holder
  std::uint32_t meta_bytes = 0;
  std::uint64_t payload_bytes = 0;
  std::uint64_t schema_hash = 0;
  std::int64_t timestamp_ns = 0;
  int kind = 0;
  const std::byte* payload = nullptr;  ///< in the slot, read-only
  const char* fault = nullptr;         ///< for Outcome::Corrupted: what is wrong
  /// Private copy of the metadata; valid as long as this object.
  const std::byte* meta() const noexcept {
    return meta_bytes <= sizeof inline_meta ? inline_meta : long_meta.data();
  }
  std::byte inline_meta[256];
  std::vector<std::byte> long_meta;
};

struct ChannelStats {
  std::uint64_t depth = 0;
  std::uint64_t next_sequence = 0;
  std::uint64_t head_sequence = 0;
  std::uint64_t dropped_newest = 0;
  std::uint64_t dropped_oldest = 0;
  std::uint64_t redelivered = 0;
  std::uint64_t corrupted = 0;
  std::uint64_t send_waits = 0;
  std::uint64_t recv_waits = 0;
  std::uint64_t reserved_bytes = 0;
  std::uint32_t free_slots = 0;
  std::uint32_t writing_slots = 0;
  std::uint32_t committed_slots = 0;
  std::uint32_t pinned_slots = 0;
  std::uint32_t corrupted_slots = 0;
  std::uint32_t pinned_by_me = 0;
  std::uint32_t participants = 0;
};

/// One open handle of a channel: sends and receives.
///
/// Threads: any number may call; close() must not run while another thread is inside a try_ call (send() and recv() may,
/// and are woken). A handle that was inherited by fork() registers itself anew at its first use in the child.
/// Death: whatever instruction a process dies at, the others find what it held by its participant number.
class Channel {
 public:
  /// A channel with a name on this host: opens the one there is, or creates it, as `mode` says.
  static std::shared_ptr<Channel> open_named(const std::string& name, const ChannelOptions& options,
                                             OpenMode mode);
  /// A channel in a file that outlives its processes.
  static std::shared_ptr<Channel> open_file(const std::string& path, const ChannelOptions& options,
                                            OpenMode mode);
  /// A channel without a name, in a sealed memfd.
  static std::shared_ptr<Channel> create_anonymous(const ChannelOptions& options);
  /// Another handle of an anonymous channel, from its descriptor (taken over).
  static std::shared_ptr<Channel> adopt_anonymous(int fd);
  /// A channel between the threads of this process.
  static std::shared_ptr<Channel> create_heap(const ChannelOptions& options);
  ~Channel();

  // --- sending ---------------------------------------------------------------------------------------------------

  /// Takes a free slot for a message. Ok, Full (Block and Raise), Dropped (drop policies) or Closed.
  /// Throws Error(MessageTooLarge) and Error(SharedMemoryFull); no slot is taken then.
  Outcome try_alloc(std::uint64_t payload_bytes, std::uint32_t meta_bytes, Backpressure policy, Loan& loan);
  /// Makes a written loan visible. Closed when the channel was shut down meanwhile (the loan is aborted then), or when
  /// the loan is no longer the caller's: published or aborted before, or taken by the parent of this process.
  Outcome publish(const Loan& loan, int kind, std::uint64_t schema_hash) noexcept;
  /// Gives it back. Does nothing when it is no longer the caller's.
  void abort(const Loan& loan) noexcept;
  /// try_alloc, one copy, publish.
  Outcome try_send(const void* payload, std::uint64_t payload_bytes, int kind, const void* meta,
                   std::uint32_t meta_bytes, std::uint64_t schema_hash, Backpressure policy);
  /// The same, and waits for room until `deadline_ns` on CLOCK_MONOTONIC; TimedOut when none came.
  Outcome send(const void* payload, std::uint64_t payload_bytes, Backpressure policy,
               std::int64_t deadline_ns);

  // --- receiving -------------------------------------------------------------------------------------------------

  /// Takes the next message: Ok, Empty, Closed or Corrupted.
  Outcome try_recv(Received& message);
  Outcome recv(Received& message, std::int64_t deadline_ns);
  /// Done with it: the slot is free when nobody else needs it. Does nothing in a forked child.
  void release(std::uint32_t slot, std::uint32_t process) noexcept;
  /// Not done with it: another member of the group, or this one, gets it again.
  void give_back(const Received& message) noexcept;

  // --- waiting ---------------------------------------------------------------------------------------------------

  /// Waits for room, or for a message, at most one slice of 50 ms: Ok (look again), Empty (the slice was in vain: look
  /// again, then wait without spinning), TimedOut (`deadline_ns` has passed: look a last time), Interrupted.
  Outcome wait_for_space(std::int64_t deadline_ns, bool spin);
  Outcome wait_for_message(std::int64_t deadline_ns, bool spin);
  /// Called instead of taking what one was woken for.
  void pass_on_wake() noexcept;

  // --- the rest --------------------------------------------------------------------------------------------------

  /// Ends the channel for all: senders are refused at once, receivers when they have drained it (`at_once`: now).
  void shutdown(bool at_once);
  bool is_shut_down() const noexcept;
  /// Ends this handle. Messages that it holds stay held until they are released.
  void close() noexcept;
  bool is_closed() const noexcept;
  /// Closes this handle and releases what it holds, whether or not somebody still looks at it.
  void abandon() noexcept;
  /// Closes every handle of this process and releases what they hold, whether or not somebody still looks at it: for the
  /// end of a process. exit() does it; a process that ends by _exit() in order calls it first.
  static void abandon_all() noexcept;
  /// Removes the name; handles that are open go on.
  void unlink();

  std::uint64_t depth() const noexcept;
  bool is_full() const noexcept;
  ChannelStats stats() const noexcept;
  std::uint32_t capacity() const noexcept;
  std::uint64_t slot_size() const noexcept;
  std::uint64_t max_message_size() const noexcept;
  std::uint32_t max_handles() const noexcept;
  int checksum() const noexcept;
  std::string storage() const;
  /// Name, path or description, for people.
  std::string label() const;
  /// Path of the file that carries the region; empty for anonymous memory.
  std::string path() const;
  /// 32 hexadecimal digits that name this region for ever.
  std::string uuid() const;
  /// Descriptor of the shared bytes, -1 for heap; stays the channel's.
  int descriptor() const noexcept;

 private:
  struct Impl;
  explicit Channel(std::unique_ptr<Impl> impl);
  static std::shared_ptr<Channel> make(std::unique_ptr<Impl> impl);
  std::unique_ptr<Impl> impl_;
};

/// Directory of the named channels of this user.
std::string channel_directory();
/// Names of the regions in it.
std::vector<std::string> list_channels();

}  // namespace dsline
