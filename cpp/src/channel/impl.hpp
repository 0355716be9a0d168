#pragma once

#include <memory>
#include <mutex>
#include <set>
#include <string>
#include <vector>

#include "base/clock.hpp"
#include "base/points.hpp"
#include "base/process.hpp"
#include "channel/attach.hpp"
#include "delivery/dead_letters.hpp"
#include "delivery/publication.hpp"
#include "dsline/channel.hpp"
#include "dsline/watch.hpp"
#include "liveness/membership.hpp"
#include "order/group.hpp"
#include "order/order_ring.hpp"
#include "slots/slot_pool.hpp"
#include "waiting/spin.hpp"

namespace dsline {

inline constexpr std::int64_t kSliceNs = 50'000'000;

/// One handle: sending.cpp, receiving.cpp, placing.cpp, progress.cpp, waiting.cpp, ending.cpp and report.cpp hold its
/// parts.
///
/// Threads: `me` and `group` change only when a forked child registers anew, before any other thread of the child may
/// call. The mutexes guard slow paths; a forked child gets new ones, since a thread that is not there may have held the
/// old. Whoever takes the region's control lock holds local->recovery: two threads of one handle do not exclude each
/// other by kernel locks.
struct Channel::Impl {
  static constexpr std::uint32_t kNoGroup = liveness::Membership::kNoGroup;

  struct Local {
    std::mutex recovery;  // one sweep per handle at a time, and the control lock
    std::mutex waiters;   // counts of sleeping threads, and their bits
    std::mutex closing;   // taken before recovery
    std::uint32_t sleeping_for_space = 0;
    std::uint32_t sleeping_for_message = 0;
    std::uint32_t sleeping_for_newer = 0;
    base::Atomic<std::int64_t> last_sweep_ns{0};
    base::Atomic<std::int64_t> last_scan_ns{0};
    waiting::AdaptiveSpin space_spin;
    waiting::AdaptiveSpin message_spin;
  };

  /// A call that must be over before the handle may leave.
  class Busy {
   public:
    explicit Busy(Impl& impl) noexcept : impl_(impl) { impl_.busy.fetch_add(1, std::memory_order_seq_cst); }
    ~Busy() {
      if (impl_.busy.fetch_sub(1, std::memory_order_seq_cst) == 1 &&
          impl_.closed.load(std::memory_order_seq_cst)) {
        impl_.leave_if_idle();
      }
    }
    Busy(const Busy&) = delete;
    Busy& operator=(const Busy&) = delete;

   private:
    Impl& impl_;
  };

  explicit Impl(channel::Attachment attachment, std::unique_ptr<Local> own = std::make_unique<Local>());
  ~Impl();

  bool is_inherited() const noexcept {
    // SYNC process: pairs with renew(), whose other changes come before.
    return process.load(std::memory_order_acquire) != base::fork_generation();
  }
  void enter() {
    if (is_inherited()) [[unlikely]]
      renew();
  }
  void renew();
  void require_open();

  std::uint64_t active() const noexcept { return region->header().active.load(std::memory_order_seq_cst); }
  bool is_shut_down() const noexcept { return (active() & memory::kShutDown) != 0; }
  bool closed_or_shut_down() const noexcept {
    return closed.load(std::memory_order_relaxed) || is_shut_down();
  }

  /// False when the group of this handle has ended, or never was. The default group never ends.
  bool may_receive() const noexcept {
    if (group_number == 0) [[likely]]
      return true;
    return group_number != kNoGroup && !has_left_group.load(std::memory_order_relaxed) &&
           group.state().joined.load(std::memory_order_relaxed) == joined &&
           (active() >> group_number & 1) != 0;
  }

  // Threads of one handle may lose each other's counts: they only tell a stream from single messages.
  static void count(base::Atomic<std::uint64_t>& counter) noexcept {
    counter.store(counter.load(std::memory_order_relaxed) + 1, std::memory_order_relaxed);
  }

  // --- sending.cpp ---
  Outcome try_alloc(std::uint64_t payload_bytes, std::uint32_t meta_bytes, Backpressure policy, Loan& loan,
                    bool for_copy = true);
  void abort(const Loan& loan) noexcept;
  Outcome publish(const Loan& loan, int kind, std::uint64_t schema_hash, AfterPublish after, bool seal,
                  std::uint64_t* entered_at = nullptr);
  bool withhold(const Loan& loan) noexcept;
  void end_keeping(const Loan& loan) noexcept;
  bool is_mine(const Loan& loan) const noexcept;
  std::uint32_t take_slot(std::uint64_t payload_bytes) noexcept;
  std::uint32_t wait_for_hot_slot(std::uint64_t payload_bytes) noexcept;
  std::uint32_t take_slot_when_full(Backpressure policy);
  void fit(std::uint32_t s, std::uint64_t frame);
  void grow(std::uint32_t s, std::uint64_t need);
  void unseal(std::uint32_t s);
  bool reclaim_free_slots() noexcept;

  // --- receiving.cpp ---
  Outcome try_recv(Received& message);
  Outcome take_frame(const order::Held& held, order::Group& from, Received& message);
  const char* read_frame(std::uint32_t s, Received& message);
  Outcome empty_or_ended() noexcept;
  bool is_drained() noexcept;
  void release(std::uint32_t slot, std::uint32_t holder, std::uint32_t from) noexcept;
  bool is_last_to_circulate() const noexcept;
  enum class Undelivered { No, Yes };
  void give_back(const Received& message, Undelivered undelivered) noexcept;
  Outcome try_take_dead_letter(Received& message, DeadLetter& why);
  void revive(const Received& message) noexcept;
  bool find_latest(bool any, std::uint64_t newer_than, std::uint32_t& slot, std::uint64_t& position,
                   slots::SlotWord& word) const noexcept;
  Outcome try_read_latest(bool any, std::uint64_t newer_than, Received& message);
  bool is_unchanged(const Received& message) const noexcept;
  bool claimed_by_me(std::uint32_t s, std::uint32_t g) const noexcept {
    return slots::Claim{region->claim(s, g).load(std::memory_order_acquire)}.who() ==
           slots::Claim::holder(me);
  }

  // --- placing.cpp ---
  Outcome try_place(const void* payload, std::uint64_t bytes, std::uint64_t limit_bytes, Place& place);
  Outcome try_take(const Place& place, Received& message);
  Outcome try_take_between(std::uint64_t first, std::uint64_t last, Received& message);
  bool try_withdraw(const Place& place) noexcept;
  std::uint32_t discard_older(std::int64_t before_ns) noexcept;
  MemoryUse memory_use() const noexcept;

  // --- progress.cpp ---
  bool anyone_entering() const noexcept;
  template <class Wanted>
  bool any_outstanding(Wanted wanted) const noexcept;
  bool is_outstanding(std::uint64_t sequence) const noexcept;
  std::uint64_t first_available() const noexcept;
  bool anything_before(std::uint64_t sequence, bool control) const noexcept;

  // --- waiting.cpp ---
  class Sleeper;
  class Watched;
  void begin_to_sleep(waiting::WaitPoint point, std::uint32_t& count, std::uint64_t reason);
  void end_sleep(waiting::WaitPoint point, std::uint32_t& count);
  void begin_to_sleep(Side side);
  void end_sleep(Side side);
  waiting::WaitPoint point(Side side) noexcept {
    return side == Side::Room ? pool.space() : group.messages();
  }
  bool message_or_end() noexcept;
  bool certain_message_or_end() noexcept;
  bool is_at_end() noexcept;
  bool room_or_end(bool surely) noexcept;
  /// Whether a wait is over, for who does not try himself. `surely`: for the last look before sleeping.
  bool is_ready(Side side, bool surely) noexcept {
    if (side == Side::Room) return room_or_end(surely);
    return message_or_end() && (!surely || certain_message_or_end());
  }
  /// What somebody who waits does after a slice in vain; true when he had better try again.
  bool look_after(Side side) noexcept;
  /// Called by who was woken and takes nothing.
  void pass_on(Side side) noexcept;
  template <class Ready, class Surely>
  Outcome wait(waiting::WaitPoint point, std::uint32_t& count, std::uint64_t reason,
               waiting::AdaptiveSpin& spinner, Ready ready, Surely surely, std::uint64_t done,
               std::int64_t deadline_ns, bool spin);
  Outcome wait_for_space(std::int64_t deadline_ns, bool spin);
  Outcome wait_for_message(std::int64_t deadline_ns, bool spin);
  Outcome wait_for_newer(bool any, std::uint64_t newer_than, std::int64_t deadline_ns, bool spin);
  void pass_on_wake() noexcept;
  /// Recovers the dead, at most once per slice unless `now`; true when there were any.
  bool sweep(bool now) noexcept;
  /// Ends groups without members and releases what waits for groups that are gone; true when something was done.
  bool tidy() noexcept;
  void offer_what_was_passed() noexcept;

  // --- ending.cpp ---
  static std::set<Impl*>& handles();
  static void abandon_all();
  void shutdown(bool at_once);
  void wake_receivers() noexcept;
  void close() noexcept;
  void end_watches() noexcept;
  void leave_if_idle() noexcept;
  void leave() noexcept;
  void leave_group() noexcept;
  bool holds_anything() const noexcept;
  bool is_held_by_me(std::uint32_t s, std::uint32_t g, slots::SlotWord word) const noexcept;
  void return_everything() noexcept;
  void abandon() noexcept;
  void unlink();
  void remove_group(const std::string& name);

  // --- report.cpp ---
  ChannelStats stats() const noexcept;
  std::vector<Death> deaths_since(std::uint64_t first) const;

  std::unique_ptr<memory::Region> region;
  slots::SlotPool pool;
  order::OrderRing ring;
  std::uint32_t group_number;  // kNoGroup: this handle only sends
  std::uint32_t joined;        // GroupState::joined when it became a member
  order::Group group;          // of no use with kNoGroup
  delivery::Publication publication;
  delivery::DeadLetters letters;
  std::uint32_t me;
  slots::HintCache hints;
  base::Atomic<std::uint32_t> last_slot{
      slots::kNoSlot};  // hints of wait_for_hot_slot(); a lost update is harmless
  base::Atomic<std::uint32_t> hot_misses{0};
  std::string path;
  std::string label;
  std::uint64_t dropped_before = 0;     // dropped_oldest of the group when this handle joined it
  base::Atomic<std::uint32_t> process;  // fork generation that `me` belongs to
  base::Atomic<bool> left{false};       // writers hold local->closing
  base::Atomic<bool> closed{false};
  base::Atomic<bool> has_left_group{false};
  base::Atomic<std::uint32_t> busy{0};
  base::Atomic<std::uint64_t> sent{0};
  base::Atomic<std::uint64_t> taken{0};
  base::Atomic<std::uint64_t> empties{0};
  base::Atomic<std::uint64_t> send_waits{0};
  base::Atomic<std::uint64_t> recv_waits{0};
  std::unique_ptr<Local> local;
};

}  // namespace dsline
