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
  NotSynced = 8,    ///< the message entered the channel, but its file could not be written to the disk
};

/// What a producer does when no slot is free.
enum class Backpressure : int { Block = 0, Raise = 1, DropNewest = 2, DropOldest = 3 };

/// What an opener does with a region whose participants are all dead.
enum class OnStale : int { Recover = 0, Reset = 1, Raise = 2 };

/// Where a new group begins.
enum class Start : int {
  Next = 0,  ///< with the first message sent after it joined
  Oldest =
      1,  ///< with the oldest one that is still in the channel: the history, or what other groups have not taken
  Latest = 2,  ///< with the newest one that is still in the channel
};

/// What becomes of a message whose receiver died before it released it.
enum class OnDeath : int { Redeliver = 0, Drop = 1 };

enum class OpenMode : int { OpenOrCreate = 0, Create = 1, Open = 2 };

/// Kinds of payload, as the frame header carries them.
inline constexpr int kBytesMessage = 0;
inline constexpr int kArrayMessage = 1;
inline constexpr int kObjectMessage = 2;
/// Frames that control a dataflow. From here on up.
inline constexpr int kEndMessage = 16;
inline constexpr int kMarkerMessage = 17;
inline constexpr int kWatermarkMessage = 18;
inline constexpr int kGapMessage = 19;

/// 0 and -1 mean "not given": the default where a channel is created, whatever it has where it is opened.
struct ChannelOptions {
  std::uint32_t capacity = 0;
  std::uint64_t slot_size = 0;
  std::uint64_t max_message_size = 0;
  std::uint32_t max_handles = 0;
  int checksum = -1;  ///< 0 none, 1 header, 2 full
  std::uint32_t mode = 0600;
  OnStale on_stale = OnStale::Recover;
  std::uint64_t first_position = 0;     ///< for tests that start near a wrap
  std::uint32_t max_groups = 0;         ///< named groups at a time
  int history = -1;                     ///< messages kept for late joiners
  std::uint32_t max_deliveries = 0;     ///< 1 to 15
  int dead_letters = -1;                ///< kept at most
  int default_group = -1;               ///< 1: what is sent waits for a receiver; 0: only named groups get it
  int sync = -1;                        ///< 1: send returns when the message is on the disk (files)
  std::uint64_t default_slot_size = 0;  ///< where a channel is created without `slot_size`; 0: 65536
  /// What every message has to be: metadata entries that describe an array (dsline/metadata.hpp), written and read by the
  /// language binding; the core stores and compares it. Empty: not given. Another one than the channel's is refused.
  std::string schema;
};

/// Which group a handle takes part in.
struct SubscribeOptions {
  std::string group;          ///< 1 to 100 bytes
  Start start = Start::Next;  ///< of a group that does not exist yet
  OnDeath on_death = OnDeath::Redeliver;
  bool durable = false;  ///< the group stays, and collects messages, while it has no members
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
  const std::byte* shown = nullptr;  ///< the payload in the read-only mapping
};

/// Whether a publisher still looks at the payload after publish(): then the slot is not free before end_keeping().
enum class AfterPublish : int { LetGo = 0, Keep = 1 };

/// A message that the caller holds until it releases it.
struct Received {
  std::uint32_t slot = 0;
  std::uint32_t attempts = 0;  ///< deliveries before this one
  std::uint64_t sequence = 0;
  std::uint32_t process = 0;  ///< fork generation of the holder
  std::uint32_t group = 0;
  std::uint64_t word =
      0;  ///< of try_read_latest(): the slot's word, to see whether it is still the same message
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

/// Where a message is. It names that message for ever: no other has both numbers.
struct Place {
  std::uint32_t slot = 0;
  std::uint64_t sequence = 0;
};

/// Memory of the slots.
struct MemoryUse {
  std::uint64_t used_bytes = 0;  ///< of slots that are written, wait, or are held
  std::uint64_t idle_bytes = 0;  ///< of slots that are free
  std::uint32_t used_slots = 0;
};

struct ChannelStats {
  std::uint64_t depth = 0;
  std::uint64_t next_sequence = 0;
  std::uint64_t head_sequence = 0;
  std::uint64_t dropped_newest = 0;
  std::uint64_t dropped_oldest = 0;  ///< of the handle's group
  std::uint64_t lost = 0;            ///< the same, since this handle was opened
  std::uint64_t redelivered = 0;
  std::uint64_t unheard = 0;  ///< messages that no group was there for
  std::uint64_t buried = 0;   ///< messages that became dead letters
  std::uint64_t letters_dropped = 0;
  std::uint64_t deaths = 0;
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
  std::uint32_t dead_letters = 0;  ///< slots with a dead letter
  std::uint32_t kept_slots = 0;    ///< published, and their sender still looks at them
  std::uint32_t participants = 0;
};

/// Why a message became a dead letter.
struct DeadLetter {
  std::string group;
  std::uint32_t last_pid = 0;     ///< who had it last; 0 where nobody had
  bool last_holder_died = false;  ///< false: it gave the message back
};

/// One participant that was found dead and recovered.
struct Death {
  std::uint64_t number = 0;      ///< counts the deaths of the channel, from 0
  std::uint64_t noticed_ns = 0;  ///< CLOCK_REALTIME
  std::uint64_t joined_ns = 0;
  std::uint64_t start_time = 0;  ///< of the process, in clock ticks since boot
  std::uint32_t pid = 0;
  std::uint32_t participant = 0;
  std::string group;          ///< empty: the default group, or none any more
  std::uint32_t writing = 0;  ///< slots that it had not published
  std::uint32_t held = 0;     ///< messages that it had not released
};

/// A channel as it stands, for people: read without stopping anybody, so its parts may be of different moments.
struct Report {
  struct Participant {
    std::uint32_t number = 0;
    std::uint32_t pid = 0;
    std::uint64_t start_time = 0;
    std::uint64_t joined_ns = 0;   ///< CLOCK_REALTIME
    std::uint32_t waiting_on = 0;  ///< 0 nothing, 1 room, 2 a message
    std::uint32_t group = 0;       ///< number; kNoGroup: none
    bool alive = false;
    std::uint32_t writing = 0;     ///< slots that it has not published
    std::uint32_t kept = 0;        ///< slots that it has published and still looks at
    std::uint32_t held = 0;        ///< messages that it holds
    std::int64_t held_for_ns = 0;  ///< the longest of them
  };
  struct Group {
    std::uint32_t number = 0;
    std::string name;
    bool active = false;
    bool durable = false;
    bool retention = false;  ///< the history: nobody receives from it
    OnDeath on_death = OnDeath::Redeliver;
    std::uint32_t members = 0;
    std::uint64_t cursor = 0;
    std::uint64_t lag = 0;   ///< messages that wait
    std::uint32_t held = 0;  ///< messages that its members hold
    std::uint32_t dead_letters = 0;
    std::uint64_t dropped_oldest = 0;
    std::uint64_t redelivered = 0;
  };
  struct Holder {
    std::uint32_t group = 0;
    std::uint32_t participant = 0;
    std::uint32_t attempts = 0;  ///< deliveries before this one
    std::int64_t for_ns = 0;
  };
  struct Slot {
    std::uint32_t number = 0;
    std::string state;           ///< FREE, WRITING, COMMITTED, PINNED, KEPT, CORRUPTED
    std::uint32_t owner = 0;     ///< participant; kNoGroup: none
    std::uint64_t sequence = 0;  ///< of a committed one
    std::uint32_t pending = 0;   ///< bits of the groups that have not finished with it
    std::uint64_t reserved_bytes = 0;
    std::vector<Holder> holders;
  };
  static constexpr std::uint32_t kNoGroup = ~std::uint32_t{0};

  std::string path;
  std::string storage;
  std::string uuid;
  std::uint64_t created_ns = 0;
  std::uint32_t creator_pid = 0;
  std::uint64_t slot_size = 0;
  std::uint64_t max_message_size = 0;
  std::uint64_t next_sequence = 0;
  std::uint32_t max_handles = 0;
  std::uint32_t history = 0;
  std::uint32_t max_deliveries = 0;
  bool default_group = true;
  bool sync = false;
  bool shut_down = false;
  bool other_boot = false;  ///< its processes ended with an earlier boot of the machine
  ChannelStats stats;       ///< as the default group sees it
  std::vector<Participant> participants;
  std::vector<Group> groups;
  std::vector<Slot> slots;  ///< less those that are free
};

/// What remove_channel() found.
enum class Removal : int {
  Removed = 0,
  Missing = 1,
  InUse = 2,        ///< somebody alive is attached, or is opening it
  HasMessages = 3,  ///< nobody is attached, but messages wait in it
  TooYoung = 4,
};

class Watch;
struct Waited;

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

  /// Another handle of the same region, as a member of a named group, which is made when it is not there. Throws
  /// Error(TooManyGroups) when all numbers are in use, Error(ChannelMismatch) when the group exists with other options.
  std::shared_ptr<Channel> subscribe(const SubscribeOptions& options);
  /// Another handle of the same region in the same group.
  std::shared_ptr<Channel> again();

  // --- sending ---------------------------------------------------------------------------------------------------

  /// Takes a free slot for a message. Ok, Full (Block and Raise), Dropped (drop policies) or Closed.
  /// Throws Error(MessageTooLarge) and Error(SharedMemoryFull); no slot is taken then.
  /// `for_copy`: waits a little for a slot that is still in cache, where a long copy follows.
  Outcome try_alloc(std::uint64_t payload_bytes, std::uint32_t meta_bytes, Backpressure policy, Loan& loan,
                    bool for_copy = true);
  /// Makes a written loan visible. Closed when the channel was shut down meanwhile (the loan is aborted then), or when
  /// the loan is no longer the caller's: published or aborted before, or taken by the parent of this process.
  Outcome publish(const Loan& loan, int kind, std::uint64_t schema_hash) noexcept;
  /// The same, and says where the message is. Dropped: no group is there for it.
  Outcome publish(const Loan& loan, int kind, std::uint64_t schema_hash, Place& place) noexcept;
  /// The same. `seal`: makes the pages of the slot read-only in this handle's mapping before the message can be seen, until
  /// the handle allocates the slot again; throws Error(System) when the kernel refuses, and nothing has been published.
  Outcome publish(const Loan& loan, int kind, std::uint64_t schema_hash, AfterPublish after, bool seal);
  /// Instead of abort() while the caller still looks at the payload: the slot stays the caller's as after AfterPublish::Keep,
  /// and holds no message, so that nobody waits for one. False when it is no longer the caller's.
  bool withhold(const Loan& loan) noexcept;
  /// Ends AfterPublish::Keep and withhold(). Does nothing in a forked child.
  void end_keeping(const Loan& loan) noexcept;
  /// True when slots have pages of their own, so that publish() can seal them.
  bool can_seal() const noexcept;
  /// In a forked child: makes the bytes behind every loan of the parent private to this process, and gives the handle a
  /// writable mapping of its own at its next use. False when the kernel refuses.
  bool part_with_loans() noexcept;
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
  void release(const Received& message) noexcept { release(message.slot, message.process, message.group); }
  void release(std::uint32_t slot, std::uint32_t process, std::uint32_t group) noexcept;
  /// Not done with it: another member of the group, or this one, gets it again.
  void give_back(const Received& message) noexcept;
  /// The same for a message that the caller could not use and nobody has seen: it does not count as a delivery.
  void put_back(const Received& message) noexcept;

  /// True when nothing would be left to send into if this message, which the caller holds, and all that others hold
  /// were kept for ever. Of the members of a group the one that takes the last message of the order is told so, so a
  /// channel whose receivers let go of such messages never stands still.
  bool is_last_to_circulate() const noexcept;

  /// Takes the oldest dead letter of any group: Ok, Empty or Corrupted. It is gone when it is released, and is a dead
  /// letter again when its holder dies or gives it back.
  Outcome try_take_dead_letter(Received& message, DeadLetter& why);
  /// Sends a dead letter that this handle holds to its group again, as a message that was delivered once (where the channel
  /// delivers more than once).
  void revive(const Received& message) noexcept;

  /// Looks at the newest message of the history without taking it: Ok, or Empty where there is none or none behind
  /// `newer_than` (a sequence number; 0 with `any`). The payload may be overwritten while it is read: copy it, then ask
  /// is_unchanged(). Requires: the channel keeps a history.
  Outcome try_read_latest(bool any, std::uint64_t newer_than, Received& message);
  bool is_unchanged(const Received& message) const noexcept;
  /// Where the payload of a message lies in the shared bytes (see descriptor()).
  std::uint64_t payload_offset(const Received& message) const noexcept;
  /// As wait_for_message(), for a message behind `newer_than` in the history.
  Outcome wait_for_newer(bool any, std::uint64_t newer_than, std::int64_t deadline_ns, bool spin);

  // --- a channel as a store: messages are taken by their place, in any order ---------------------------------------

  /// One copy into a slot, without waiting: Ok, Full (no slot, no memory, or slots in use would have more than
  /// `limit_bytes`) or Closed. Nobody was there for the message: Dropped.
  Outcome try_place(const void* payload, std::uint64_t payload_bytes, std::uint64_t limit_bytes,
                    Place& place);
  /// Takes the message at `place` for the group of this handle: Ok, Empty (it was taken before, or dropped), Closed or
  /// Corrupted. From then on as after try_recv().
  Outcome try_take(const Place& place, Received& message);
  /// Takes the oldest message that nobody holds with first <= sequence < last: as try_take().
  Outcome try_take_between(std::uint64_t first, std::uint64_t last, Received& message);
  /// try_take(), one copy out and release. Corrupted also where the message has not `bytes` bytes.
  Outcome try_take_into(const Place& place, void* to, std::uint64_t bytes);
  /// Takes a message back that its sender has placed or published, from every group that has not taken it: true when none
  /// had, so that nobody sees it.
  bool try_withdraw(const Place& place) noexcept;
  /// False when every group has finished with the message at `place`.
  bool is_there(const Place& place) const noexcept;
  /// Drops the messages of this handle's group that were sent before `before_ns` (CLOCK_REALTIME) and that nobody has
  /// taken; how many.
  std::uint32_t discard_older(std::int64_t before_ns) noexcept;
  MemoryUse memory_use() const noexcept;
  /// Gives back the memory that free slots have beyond `slot_size`.
  void trim() noexcept;

  // --- how far the channel is, for who commits a stage (stage_words.hpp) --------------------------------------------

  /// Whether another participant has committed a message that may not have its place in the order yet.
  ///
  /// After the death of the only participant that may publish, and until the next one may: false means that the end of the
  /// order is final. The dead one executes nothing any more, and the kernel drops its locks after its last store, so
  /// whoever saw one of them dropped sees here whether it had committed a message. If so it is in the order once
  /// check_peers() has recovered the dead one, here or in another process; if not, it never will be.
  bool anyone_entering() const noexcept;
  /// Sequence of the next message to be sent; exact while nobody sends.
  std::uint64_t end_of_order() const noexcept;
  /// Whether the group of this handle is still to get or to release the message, or it is not sent yet. False once it was
  /// released, dropped, or became a dead letter; it stays false unless a dead letter is revived. Looks at every slot.
  bool is_outstanding(std::uint64_t sequence) const noexcept;
  /// Sequence of the oldest message that the group could take now: never taken, or given back; the end of the order where
  /// there is none.
  std::uint64_t first_available() const noexcept;
  /// Whether any message before `sequence` is outstanding.
  bool anything_outstanding_before(std::uint64_t sequence) const noexcept;
  /// The same of the control frames alone. Requires: the message of that sequence has been received.
  bool any_control_before(std::uint64_t sequence) const noexcept;

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
  /// Makes every call of this handle but close() answer Closed; the first half of close(), which never waits.
  void refuse_calls() noexcept;

  // --- the others ------------------------------------------------------------------------------------------------

  /// Looks after the dead now: true when there were any. Waits for nobody.
  bool check_peers() noexcept;
  /// Participants that were found dead since the channel was created.
  std::uint64_t deaths() const noexcept;
  /// Those from number `first` on that are still on record (the last 32).
  std::vector<Death> deaths_since(std::uint64_t first) const;
  /// Ends a durable group: what waits for it is released. Throws Error(ChannelNotFound).
  void remove_group(const std::string& name);
  Report report() const;
  /// The same without taking part in it. Throws as opening does.
  static Report report_of(const std::string& path);
  /// Removes the file of a channel that nobody alive is attached to and whose last change is older than `age_ns`;
  /// with messages in it only if `even_with_messages`. `dry`: only says what it would do.
  static Removal remove_channel(const std::string& path, std::int64_t age_ns, bool even_with_messages,
                                bool dry);

  std::uint64_t depth() const noexcept;
  bool is_full() const noexcept;
  ChannelStats stats() const noexcept;
  std::uint32_t capacity() const noexcept;
  std::uint64_t slot_size() const noexcept;
  std::uint64_t max_message_size() const noexcept;
  std::uint32_t max_handles() const noexcept;
  int checksum() const noexcept;
  std::uint32_t history() const noexcept;
  std::uint32_t max_deliveries() const noexcept;
  bool has_default_group() const noexcept;
  bool is_synced() const noexcept;
  /// The creator's schema; empty: messages may be of any kind.
  const std::string& schema() const noexcept;
  /// Name of the group that this handle receives for; empty: the default group.
  std::string group() const;
  /// False for a handle that can only send: the channel has no default group, and this handle no group of its own.
  bool can_receive() const noexcept;
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
  friend class Watch;  // watch.hpp
  friend Outcome wait_for_any(Waited* list, std::size_t count, std::int64_t deadline_ns, bool spin);

  struct Impl;
  explicit Channel(std::unique_ptr<Impl> impl);
  static std::shared_ptr<Channel> make(std::unique_ptr<Impl> impl);
  std::unique_ptr<Impl> impl_;
};

/// Bytes that shared memory may still take, by what the machine and the cgroups of this process leave.
std::uint64_t available_memory();

/// Directory of the named channels of this user.
std::string channel_directory();
/// Names of the regions in it.
std::vector<std::string> list_channels();

}  // namespace dsline
