#include "dsline/channel.hpp"

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <mutex>
#include <optional>
#include <set>

#include "base/clock.hpp"
#include "base/crc32c.hpp"
#include "base/process.hpp"
#include "channel/attach.hpp"
#include "channel/directory.hpp"
#include "dsline/build.hpp"
#include "frames/frame_header.hpp"
#include "liveness/participants.hpp"
#include "liveness/recovery.hpp"
#include "order/group.hpp"
#include "order/order_ring.hpp"
#include "slots/slot_pool.hpp"
#include "waiting/spin.hpp"

namespace dsline {
namespace {

using frames::FrameHeader;
using memory::StorageKind;
using slots::kNoSlot;
using slots::SlotPhase;
using slots::SlotWord;

constexpr std::int64_t kSliceNs = 50'000'000;
// For the end of a handle: without the lock its name stays for the next one, which is harmless.
constexpr std::int64_t kLeavePatienceNs = 500'000'000;
// From this size on callers let other threads run while the payload is copied.
constexpr std::uint64_t kLongCopyBytes = 65536;
// Extra pages of a slot are given back after this many messages in a row that did not need them.
constexpr std::uint64_t kSmallUsesBeforeShrink = 256;
// From this size on, waiting a little for the slot that is still in cache is cheaper than copying into a cold one.
constexpr std::uint64_t kHotWaitBytes = 256 * 1024;
constexpr std::uint32_t kHotMisses = 16;
constexpr std::uint64_t kPollsPerSweep = 16;
// Up to this size the fight for the free map's cache line costs more than a slot that is less warm.
constexpr std::uint64_t kHintedBytes = 8 * 1024;

std::string too_large(const std::string& label, const memory::Geometry& g, std::uint64_t payload,
                      std::uint64_t meta) {
  std::string text = "message needs " + std::to_string(payload) + " bytes";
  if (payload <= g.max_message_bytes) text += " and " + std::to_string(meta) + " bytes of metadata";
  return text + ", channel '" + label + "' takes at most " + std::to_string(g.max_message_bytes) +
         "; create it with max_message_size>=" +
         std::to_string(payload > g.max_message_bytes ? payload : g.max_message_bytes + meta);
}

}  // namespace

/// Threads: `me` changes only when a forked child registers anew, before any other thread of the child may call. The
/// mutexes guard slow paths; a forked child gets new ones, since a thread that is not there may have held the old.
struct Channel::Impl {
  struct Local {
    std::mutex recovery;  // one sweep per handle at a time
    std::mutex waiters;   // counts of sleeping threads, and their bits
    std::mutex closing;
    std::uint32_t sleeping_for_space = 0;
    std::uint32_t sleeping_for_message = 0;
    base::Atomic<std::int64_t> last_sweep_ns{0};
    base::Atomic<std::int64_t> last_scan_ns{0};
    waiting::AdaptiveSpin space_spin;
    waiting::AdaptiveSpin message_spin;
  };

  explicit Impl(channel::Attachment attachment)
      : region(std::move(attachment.region)),
        pool(*region),
        ring(*region),
        group(*region, 0),
        me(attachment.participant),
        path(std::move(attachment.path)),
        label(std::move(attachment.label)),
        process(base::fork_generation()),
        local(std::make_unique<Local>()) {
    region->participant(me).group.store(1, std::memory_order_relaxed);
    std::lock_guard lock(base::process_mutex());
    handles().insert(this);
  }

  /// The handles of this process; never destroyed, since the last ones may go after static objects.
  static std::set<Impl*>& handles() {
    static std::set<Impl*>* list = new std::set<Impl*>;
    static const int at_exit = std::atexit(abandon_all);
    static_cast<void>(at_exit);
    return *list;
  }

  // A process that ends in order has not died: what its views still hold is released, not redelivered.
  static void abandon_all() {
    std::lock_guard lock(base::process_mutex());
    for (Impl* handle : handles()) handle->abandon();
  }

  ~Impl() {
    {
      std::lock_guard lock(base::process_mutex());
      handles().erase(this);
    }
    close();
    if (left || is_inherited()) return;
    return_everything();
    std::lock_guard lock(local->closing);
    leave();
  }

  bool is_inherited() const noexcept {
    // SYNC process: pairs with renew(), whose other changes come before.
    return process.load(std::memory_order_acquire) != base::fork_generation();
  }

  /// In a forked child: registers anew. The parent's leases and loans stay the parent's.
  void renew() {
    std::lock_guard lock(base::process_mutex());
    if (!is_inherited()) return;  // another thread of the child was first
    static_cast<void>(
        local.release());  // a mutex that another thread of the parent held is never unlocked here
    local = std::make_unique<Local>();
    if (closed.load(std::memory_order_relaxed)) {
      left = true;
    } else {
      me = channel::rejoin(*region, label);
      region->participant(me).group.store(1, std::memory_order_relaxed);
    }
    busy.store(0, std::memory_order_relaxed);
    process.store(base::fork_generation(), std::memory_order_release);
  }
  void enter() {
    if (is_inherited()) [[unlikely]]
      renew();
  }

  std::uint64_t active() const noexcept { return region->header().active.load(std::memory_order_seq_cst); }

  // Threads of one handle may lose each other's counts: they only tell a stream from single messages.
  static void count(base::Atomic<std::uint64_t>& counter) noexcept {
    counter.store(counter.load(std::memory_order_relaxed) + 1, std::memory_order_relaxed);
  }

  // --- sending ---

  std::uint32_t take_slot(std::uint64_t payload_bytes) noexcept {
    if (payload_bytes >= kHotWaitBytes) [[unlikely]] {
      std::uint32_t s = wait_for_hot_slot(payload_bytes);
      if (s != kNoSlot) return s;
    }
    // Large messages take the lowest free slot, which is the warmest; small ones any of a few.
    std::uint32_t s = payload_bytes <= kHintedBytes ? pool.try_alloc_cached(hints, me) : pool.try_alloc(me);
    last_slot.store(s, std::memory_order_relaxed);
    return s;
  }

  // The slot of the last large message is the warm one. A receiver that keeps up gives it back within a fraction of
  // the time of the copy that follows, so wait that long, and not again after it did not pay.
  std::uint32_t wait_for_hot_slot(std::uint64_t payload_bytes) noexcept {
    const std::uint32_t hot = last_slot.load(std::memory_order_relaxed);
    if (hot == kNoSlot) return kNoSlot;
    if (pool.try_alloc_at(hot, me)) return hot;
    const std::uint32_t misses = hot_misses.load(std::memory_order_relaxed);
    if (misses > 0) {
      hot_misses.store(misses - 1, std::memory_order_relaxed);
      return kNoSlot;
    }
    const std::int64_t end = base::monotonic_ns() + static_cast<std::int64_t>(payload_bytes / 1024);
    do {
      for (int i = 0; i < 8; ++i) base::cpu_relax();
      if (pool.try_alloc_at(hot, me)) return hot;
    } while (base::monotonic_ns() < end);
    hot_misses.store(kHotMisses, std::memory_order_relaxed);
    return kNoSlot;
  }

  /// Recovers the dead, at most once per slice; true when there were any.
  bool sweep() noexcept {
    std::unique_lock lock(local->recovery, std::try_to_lock);
    if (!lock.owns_lock() || left) return false;
    std::int64_t now = base::monotonic_ns();
    const std::int64_t last = local->last_sweep_ns.load(std::memory_order_relaxed);
    if (last != 0 && now - last < kSliceNs) return false;
    local->last_sweep_ns.store(now, std::memory_order_relaxed);
    return region->storage().kind() != StorageKind::Heap && liveness::recover_the_dead(*region, me) != 0;
  }

  /// Takes the oldest message that the group has not taken, and releases it.
  bool drop_oldest() noexcept {
    order::Held held{};
    if (!group.try_take(me, held)) return false;
    group.state().dropped_oldest.fetch_add(1, std::memory_order_relaxed);
    pool.clear_pending(held.slot, group.bit());
    return true;
  }

  Outcome try_alloc(std::uint64_t payload_bytes, std::uint32_t meta_bytes, Backpressure policy, Loan& loan) {
    enter();
    const memory::Geometry& g = region->geometry();
    std::uint64_t frame = 0;
    if (payload_bytes > g.max_message_bytes || !frames::frame_bytes(meta_bytes, payload_bytes, frame) ||
        frame > g.stride_bytes - (g.stride_bytes < memory::kPageBytes ? 0 : memory::kMaxFrameShift))
        [[unlikely]] {
      throw Error(ErrorCode::MessageTooLarge, too_large(label, g, payload_bytes, meta_bytes));
    }
    if (closed.load(std::memory_order_seq_cst) || (active() & memory::kShutDown) != 0) [[unlikely]] {
      return Outcome::Closed;
    }
    region->prepare_writing();
    std::uint32_t s = take_slot(payload_bytes);
    if (s == kNoSlot) [[unlikely]] {
      s = take_slot_when_full(policy);
      if (s == kNoSlot) {
        if (policy == Backpressure::Block || policy == Backpressure::Raise) return Outcome::Full;
        region->header().dropped_newest.fetch_add(1, std::memory_order_relaxed);
        return Outcome::Dropped;
      }
    }
    fit(s, frame);
    loan.word = pool.word(s).bits;
    loan.process = process.load(std::memory_order_relaxed);
    std::byte* at = region->write_frame(s);
    loan.slot = s;
    loan.meta_bytes = meta_bytes;
    loan.payload_bytes = payload_bytes;
    loan.meta = at + sizeof(FrameHeader);
    loan.payload = at + frames::payload_offset(meta_bytes);
    return Outcome::Ok;
  }

  std::uint32_t take_slot_when_full(Backpressure policy) {
    // The map may lack slots whose hints other handles keep, or took with them when they died.
    const std::int64_t now = base::monotonic_ns();
    const bool due = now - local->last_scan_ns.load(std::memory_order_relaxed) >= kSliceNs;
    if (due) {
      local->last_scan_ns.store(now, std::memory_order_relaxed);
      sweep();
    }
    if (due || policy == Backpressure::Block || region->geometry().slots <= slots::kMostSlotsForHints) {
      std::uint32_t s = pool.try_alloc_by_scan(me);
      if (s != kNoSlot) return s;
    }
    if (policy != Backpressure::DropOldest) return kNoSlot;
    // Another producer may take the slot that was just freed; the bound keeps this from going on for ever.
    for (std::uint32_t i = 0; i <= region->geometry().slots; ++i) {
      if (!drop_oldest()) return kNoSlot;
      std::uint32_t s = pool.try_alloc(me);
      if (s != kNoSlot) return s;
    }
    return kNoSlot;
  }

  /// Makes the slot large enough for `frame` bytes, or smaller when it has long been too large.
  void fit(std::uint32_t s, std::uint64_t frame) {
    memory::SlotState& state = region->slot(s);
    const std::uint64_t base_room = region->geometry().room_bytes;
    const std::uint64_t room = state.room_bytes.load(std::memory_order_relaxed);
    const std::uint64_t need = memory::frame_shift(region->geometry(), s) + frame;
    if (need <= room && room <= base_room) [[likely]]
      return;
    if (need > room) {
      grow(s, need);
      state.small_uses.store(0, std::memory_order_relaxed);
    } else if (need > room / 2) {
      state.small_uses.store(0, std::memory_order_relaxed);
    } else {
      std::uint64_t uses = state.small_uses.load(std::memory_order_relaxed) + 1;
      state.small_uses.store(uses, std::memory_order_relaxed);
      if (uses >= kSmallUsesBeforeShrink) {
        region->shrink_slot(s, need);
        state.small_uses.store(0, std::memory_order_relaxed);
      }
    }
  }

  void grow(std::uint32_t s, std::uint64_t need) {
    try {
      try {
        region->reserve_slot(s, need);
      } catch (const Error& error) {
        if (error.code() != ErrorCode::SharedMemoryFull || !reclaim_free_slots()) throw;
        region->reserve_slot(s, need);
      }
    } catch (...) {
      pool.abort(s, pool.word(s));
      throw;
    }
  }

  /// Gives back the extra pages of slots that are free; true when there were any.
  bool reclaim_free_slots() noexcept {
    bool any = false;
    const memory::Geometry& g = region->geometry();
    for (std::uint32_t s = 0; s < g.slots; ++s) {
      if (region->slot(s).room_bytes.load(std::memory_order_relaxed) <= g.room_bytes || !pool.try_take(s, me))
        continue;
      if (region->slot(s).room_bytes.load(std::memory_order_relaxed) > g.room_bytes) {
        region->shrink_slot(s, g.room_bytes);
        any = true;
      }
      pool.abort(s, pool.word(s));
    }
    return any;
  }

  bool is_mine(const Loan& loan) const noexcept {
    return loan.process == base::fork_generation() && !left.load(std::memory_order_relaxed) &&
           pool.word(loan.slot).bits == loan.word && SlotWord{loan.word}.is(SlotPhase::Writing);
  }

  void abort(const Loan& loan) noexcept {
    if (!is_mine(loan)) return;
    pool.abort(loan.slot, SlotWord{loan.word});
    if (closed.load(std::memory_order_seq_cst)) [[unlikely]]
      leave_if_idle();
  }

  Outcome publish(const Loan& loan, int kind, std::uint64_t schema_hash) noexcept {
    if (!is_mine(loan)) [[unlikely]]
      return Outcome::Closed;
    FrameHeader header{};
    header.magic = frames::kFrameMagic;
    header.version = frames::kFrameVersion;
    header.kind = static_cast<frames::FrameKind>(kind);
    header.payload_bytes = loan.payload_bytes;
    header.meta_bytes = loan.meta_bytes;
    header.schema_hash = schema_hash;
    header.timestamp_ns = base::realtime_ns();
    frames::seal(header, region->checksum(), loan.meta, loan.payload);
    std::memcpy(region->write_frame(loan.slot), &header, sizeof header);

    // SYNC active: sequentially consistent with the slot's WRITING word. Whoever changes `active` sees the slot WRITING
    // or this load sees the change.
    const std::uint64_t state = active();
    if ((state & memory::kShutDown) != 0) [[unlikely]] {
      abort(loan);
      group.messages().wake_all();  // receivers may have waited for this slot to see the end
      return Outcome::Closed;
    }
    const std::uint32_t groups = static_cast<std::uint32_t>(state & memory::kActiveGroupsMask);
    if (!pool.commit(loan.slot, SlotWord{loan.word}, groups)) [[unlikely]]
      return Outcome::Closed;
    if (groups == 0) {
      region->header().dropped_newest.fetch_add(1, std::memory_order_relaxed);
    } else {
      enter_order(loan.slot, groups);
    }
    if (closed.load(std::memory_order_seq_cst)) [[unlikely]]
      leave_if_idle();
    return Outcome::Ok;
  }

  void enter_order(std::uint32_t slot, std::uint32_t groups) noexcept {
    count(sent);
    order::OrderRing::Entered entered = ring.enter(slot, groups);
    pool.clear_pending(slot, slots::kEnqueueing);
    ring.advance_tail(entered);
    base::fence_seq_cst_after_rmw();
    group.messages().wake_one_if_anyone();
  }

  // --- receiving ---

  Outcome try_recv(Received& message) {
    enter();
    if (closed.load(std::memory_order_relaxed)) [[unlikely]]
      return Outcome::Closed;
    order::Held held{};
    if (!group.try_take(me, held)) {
      // Whoever only polls looks after the dead as well, now and then.
      count(empties);
      const bool due = (empties.load(std::memory_order_relaxed) & (kPollsPerSweep - 1)) == 0;
      if (!due || !sweep() || !group.try_take(me, held)) return empty_or_ended();
    }
    if ((active() & memory::kShutDownAtOnce) != 0) [[unlikely]] {
      // Its sender had looked before the shutdown.
      pool.clear_pending(held.slot, group.bit());
      return empty_or_ended();
    }
    count(taken);
    message.slot = held.slot;
    message.attempts = held.attempts;
    message.sequence = held.position;
    message.process = process.load(std::memory_order_relaxed);
    const char* fault = nullptr;
    try {
      fault = read_frame(held.slot, message);
    } catch (...) {  // no memory for long metadata
      group.give_back(held, me);
      throw;
    }
    if (fault == nullptr) [[likely]]
      return Outcome::Ok;
    message.fault = fault;
    region->header().corrupted.fetch_add(1, std::memory_order_relaxed);
    pool.clear_pending_corrupted(held.slot, group.bit());
    return Outcome::Corrupted;
  }

  /// Copies header and metadata to private memory, checks the copy, and never looks at the shared ones again.
  const char* read_frame(std::uint32_t s, Received& message) {
    const std::byte* at = region->read_frame(s);
    FrameHeader header;
    std::memcpy(&header, at, sizeof header);
    const std::uint64_t reserved =
        std::min(region->slot(s).room_bytes.load(std::memory_order_relaxed), region->geometry().stride_bytes);
    const std::uint64_t shift = memory::frame_shift(region->geometry(), s);
    const std::uint64_t room = reserved > shift ? reserved - shift : 0;
    frames::FrameFault fault = frames::check_lengths(header, room);
    if (fault != frames::FrameFault::None) [[unlikely]]
      return frames::describe(fault);
    message.meta_bytes = header.meta_bytes;
    std::byte* meta = message.inline_meta;
    if (header.meta_bytes > sizeof message.inline_meta) [[unlikely]] {
      message.long_meta.resize(header.meta_bytes);
      meta = message.long_meta.data();
    }
    if (header.meta_bytes != 0) std::memcpy(meta, at + sizeof header, header.meta_bytes);
    message.payload = at + frames::payload_offset(header.meta_bytes);
    message.payload_bytes = header.payload_bytes;
    fault = frames::check_sums(header, region->checksum(), meta, message.payload);
    if (fault != frames::FrameFault::None) [[unlikely]]
      return frames::describe(fault);
    message.schema_hash = header.schema_hash;
    message.timestamp_ns = header.timestamp_ns;
    message.kind = static_cast<int>(header.kind);
    return nullptr;
  }

  Outcome empty_or_ended() noexcept {
    const std::uint64_t state = active();
    if ((state & memory::kShutDown) == 0) [[likely]]
      return Outcome::Empty;
    if ((state & memory::kShutDownAtOnce) == 0 && !is_drained()) return Outcome::Empty;
    if (group.messages().anyone()) group.messages().wake_all();
    return Outcome::Closed;
  }

  /// After a shutdown: nothing can be delivered any more. A slot that is WRITING may have passed its look at `active`
  /// before the shutdown, so it is waited for. What another member holds counts as delivered.
  bool is_drained() noexcept {
    for (std::uint32_t s = 0; s < region->geometry().slots; ++s) {
      SlotWord word = pool.word(s);
      if (word.is(SlotPhase::Writing)) return false;
      if (!word.is(SlotPhase::Committed) || (word.pending() & (group.bit() | slots::kEnqueueing)) == 0)
        continue;
      if ((word.pending() & slots::kEnqueueing) != 0) return false;
      slots::Claim claim{region->claim(s, 0).load(std::memory_order_acquire)};
      if (claim.who() == slots::Claim::kNobody || claim.who() == slots::Claim::kRedeliver) return false;
    }
    return true;
  }

  void release(std::uint32_t slot, std::uint32_t holder) noexcept {
    if (holder != base::fork_generation() || left.load(std::memory_order_relaxed) || !claimed_by_me(slot))
        [[unlikely]] {
      return;
    }
    pool.clear_pending(slot, group.bit());
    if (closed.load(std::memory_order_relaxed)) [[unlikely]]
      leave_if_idle();
  }

  void give_back(const Received& message) noexcept {
    if (message.process != base::fork_generation() || left.load(std::memory_order_relaxed)) return;
    if ((active() & memory::kShutDownAtOnce) != 0) {
      release(message.slot, message.process);  // nobody will take it again
      return;
    }
    group.give_back(order::Held{message.slot, message.sequence, message.attempts}, me);
    if (closed.load(std::memory_order_relaxed)) leave_if_idle();
  }

  // --- waiting ---

  /// Adds this handle's bit while at least one of its threads sleeps.
  class Sleeper {
   public:
    Sleeper(Impl& impl, waiting::WaitPoint point, std::uint32_t& count, std::uint64_t reason)
        : impl_(impl), point_(point), count_(count) {
      std::lock_guard lock(impl_.local->waiters);
      ++count_;
      point_.add(impl_.me);
      impl_.region->participant(impl_.me).waiting_on.store(reason, std::memory_order_relaxed);
    }
    ~Sleeper() {
      std::lock_guard lock(impl_.local->waiters);
      if (--count_ != 0) return;
      point_.remove(impl_.me);
      impl_.region->participant(impl_.me).waiting_on.store(0, std::memory_order_relaxed);
    }

   private:
    Impl& impl_;
    waiting::WaitPoint point_;
    std::uint32_t& count_;
  };

  /// `ready` is looked at while spinning; `surely` once more between registering and sleeping.
  template <class Ready, class Surely>
  Outcome wait(waiting::WaitPoint point, std::uint32_t& count, std::uint64_t reason,
               waiting::AdaptiveSpin& spinner, Ready ready, Surely surely, std::uint64_t done,
               std::int64_t deadline_ns, bool spin) {
    const std::int64_t start = base::monotonic_ns();
    if (spin && spinner(ready, deadline_ns, done)) return Outcome::Ok;
    waiting::Wake wake{};
    std::int64_t now = base::monotonic_ns();
    {
      Sleeper sleeper(*this, point, count, reason);
      std::uint32_t sequence = point.sequence();
      if (surely()) return Outcome::Ok;
      if (now >= deadline_ns) return Outcome::TimedOut;
      wake = point.sleep(sequence, std::min(deadline_ns, now + kSliceNs));
    }
    if (wake == waiting::Wake::Interrupted) return Outcome::Interrupted;
    if (wake == waiting::Wake::Woken) {
      if (spin) spinner.woken_after(base::monotonic_ns() - start);
      return Outcome::Ok;
    }
    sweep();
    return base::monotonic_ns() >= deadline_ns ? Outcome::TimedOut : Outcome::Empty;
  }

  Outcome wait_for_space(std::int64_t deadline_ns, bool spin) {
    enter();
    Busy guard(*this);
    if (closed.load(std::memory_order_seq_cst)) return Outcome::Ok;
    send_waits.fetch_add(1, std::memory_order_relaxed);
    auto ready = [this] {
      return pool.anything_free() || closed.load(std::memory_order_relaxed) ||
             (active() & memory::kShutDown) != 0;
    };
    auto surely = [this, &ready] { return ready() || pool.anything_free_by_scan(); };
    return wait(pool.space(), local->sleeping_for_space, 1, local->space_spin, ready, surely,
                sent.load(std::memory_order_relaxed), deadline_ns, spin);
  }

  Outcome wait_for_message(std::int64_t deadline_ns, bool spin) {
    enter();
    Busy guard(*this);
    if (closed.load(std::memory_order_seq_cst)) return Outcome::Ok;
    recv_waits.fetch_add(1, std::memory_order_relaxed);
    auto ready = [this] {
      if (group.anything_waiting() || closed.load(std::memory_order_relaxed)) return true;
      const std::uint64_t state = active();
      return (state & memory::kShutDown) != 0 && ((state & memory::kShutDownAtOnce) != 0 || is_drained());
    };
    return wait(group.messages(), local->sleeping_for_message, 2, local->message_spin, ready, ready,
                taken.load(std::memory_order_relaxed), deadline_ns, spin);
  }

  void pass_on_wake() noexcept {
    if (is_inherited() || left) return;
    if (group.anything_waiting()) group.messages().wake_one_if_anyone();
    if (pool.anything_free()) pool.space().wake_one_if_anyone();
  }

  // --- ending ---

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

   private:
    Impl& impl_;
  };

  void shutdown(bool at_once) {
    enter();
    std::uint64_t bits = memory::kShutDown | (at_once ? memory::kShutDownAtOnce : 0);
    // SYNC active: pairs with publish, see there.
    region->header().active.fetch_or(bits, std::memory_order_seq_cst);
    if (at_once && !left) {
      order::Held held{};
      while (group.try_take(me, held)) pool.clear_pending(held.slot, group.bit());
    }
    group.messages().wake_all();
    pool.space().wake_all();
  }

  void close() noexcept {
    if (closed.exchange(true, std::memory_order_seq_cst)) return;
    if (is_inherited()) return;
    group.messages().wake_all();
    pool.space().wake_all();
    leave_if_idle();
  }

  bool holds_anything() const noexcept {
    for (std::uint32_t s = 0; s < region->geometry().slots; ++s) {
      SlotWord word = pool.word(s);
      const bool mine = word.owner() == me;
      if (mine && word.is(SlotPhase::Writing)) return true;
      if (mine && word.is(SlotPhase::Committed) && (word.pending() & slots::kEnqueueing) != 0) return true;
      if (is_held_by_me(s, word)) return true;
    }
    return false;
  }
  bool is_held_by_me(std::uint32_t s, SlotWord word) const noexcept {
    return word.is(SlotPhase::Committed) && (word.pending() & group.bit()) != 0 && claimed_by_me(s);
  }
  bool claimed_by_me(std::uint32_t s) const noexcept {
    return slots::Claim{region->claim(s, 0).load(std::memory_order_acquire)}.who() ==
           slots::Claim::holder(me);
  }

  void leave_if_idle() noexcept {
    if (is_inherited()) return;
    std::lock_guard lock(local->closing);
    if (left || busy.load(std::memory_order_seq_cst) != 0 || holds_anything()) return;
    leave();
  }

  /// Frees the entry; the last one of a named channel takes the name along when the channel is shut down or empty.
  void leave() noexcept {
    std::lock_guard sweeping(local->recovery);
    left = true;
    pool.return_hints(hints);
    pool.space().remove(me);
    group.messages().remove(me);
    liveness::Participants participants(*region);
    try {
      channel::ControlLock control(*region, label, kLeavePatienceNs);
      participants.leave(me);
      if (region->storage().kind() == StorageKind::PosixShm &&
          !participants.anyone_else_alive(liveness::Participants::kNobody) &&
          ((active() & memory::kShutDown) != 0 || !channel::holds_messages(*region))) {
        channel::remove_name(region->storage(), path);
      }
    } catch (const Error&) {
      participants.leave(me);  // the name stays for the next one
    }
    region->storage().drop_locks();
  }

  /// What a caller of the C++ interface still held when it let go of the channel.
  void return_everything() noexcept {
    for (std::uint32_t s = 0; s < region->geometry().slots; ++s) {
      SlotWord word = pool.word(s);
      if (word.is(SlotPhase::Writing) && word.owner() == me) {
        pool.abort(s, word);
      } else if (is_held_by_me(s, word)) {
        slots::Claim claim{region->claim(s, 0).load(std::memory_order_acquire)};
        group.give_back(
            order::Held{s, region->slot(s).position.load(std::memory_order_relaxed), claim.attempts()}, me);
      }
    }
  }

  void abandon() noexcept {
    if (is_inherited() || left) return;
    closed.store(true, std::memory_order_seq_cst);
    // A thread that still sends or waits goes on until the process is gone; the kernel's lock tells the others then.
    if (busy.load(std::memory_order_seq_cst) != 0) return;
    for (std::uint32_t s = 0; s < region->geometry().slots; ++s) {
      SlotWord word = pool.word(s);
      if (is_held_by_me(s, word)) {
        pool.clear_pending(s, group.bit());
      }
    }
    leave_if_idle();
  }

  ChannelStats stats() const noexcept {
    ChannelStats out;
    const memory::Geometry& g = region->geometry();
    out.depth = group.depth();
    out.next_sequence = ring.tail_guess();
    out.head_sequence = group.state().cursor.load(std::memory_order_relaxed);
    out.dropped_newest = region->header().dropped_newest.load(std::memory_order_relaxed);
    out.corrupted = region->header().corrupted.load(std::memory_order_relaxed);
    out.dropped_oldest = group.state().dropped_oldest.load(std::memory_order_relaxed);
    out.redelivered = group.state().redelivered.load(std::memory_order_relaxed);
    out.send_waits = send_waits.load(std::memory_order_relaxed);
    out.recv_waits = recv_waits.load(std::memory_order_relaxed);
    out.reserved_bytes = g.arena_offset;
    out.participants = liveness::Participants(*region).alive_guess(
        is_inherited() || left ? liveness::Participants::kNobody : me);
    for (std::uint32_t s = 0; s < g.slots; ++s) {
      out.reserved_bytes += region->slot(s).room_bytes.load(std::memory_order_relaxed);
      SlotWord word = pool.word(s);
      if (word.is_free()) {
        ++out.free_slots;
      } else if (word.is(SlotPhase::Writing)) {
        ++out.writing_slots;
      } else if (word.is(SlotPhase::Corrupted)) {
        ++out.corrupted_slots;
      } else {
        ++out.committed_slots;
        slots::Claim claim{region->claim(s, 0).load(std::memory_order_acquire)};
        if (claim.who() != slots::Claim::kNobody && claim.who() != slots::Claim::kRedeliver)
          ++out.pinned_slots;
        if (!is_inherited() && claim.who() == slots::Claim::holder(me)) ++out.pinned_by_me;
      }
    }
    return out;
  }

  std::unique_ptr<memory::Region> region;
  slots::SlotPool pool;
  order::OrderRing ring;
  order::Group group;
  std::uint32_t me;
  slots::HintCache hints;
  base::Atomic<std::uint32_t> last_slot{kNoSlot};  // hints of wait_for_hot_slot(); a lost update is harmless
  base::Atomic<std::uint32_t> hot_misses{0};
  std::string path;
  std::string label;
  base::Atomic<std::uint32_t> process;  // fork generation that `me` belongs to
  base::Atomic<bool> left{false};       // writers hold local->closing
  base::Atomic<bool> closed{false};
  base::Atomic<std::uint32_t> busy{0};
  base::Atomic<std::uint64_t> sent{0};
  base::Atomic<std::uint64_t> taken{0};
  base::Atomic<std::uint64_t> empties{0};
  base::Atomic<std::uint64_t> send_waits{0};
  base::Atomic<std::uint64_t> recv_waits{0};
  std::unique_ptr<Local> local;
};

Channel::Channel(std::unique_ptr<Impl> impl) : impl_(std::move(impl)) {}
Channel::~Channel() = default;

std::shared_ptr<Channel> Channel::make(std::unique_ptr<Impl> impl) {
  return std::shared_ptr<Channel>(new Channel(std::move(impl)));
}

std::shared_ptr<Channel> Channel::open_named(const std::string& name, const ChannelOptions& options,
                                             OpenMode mode) {
  channel::check_name(name);
  std::string path = channel::prepare_directory(options.mode) + "/" + name;
  auto attachment = channel::attach_path(path, name, StorageKind::PosixShm, options, mode);
  return make(std::make_unique<Impl>(std::move(attachment)));
}

std::shared_ptr<Channel> Channel::open_file(const std::string& path, const ChannelOptions& options,
                                            OpenMode mode) {
  auto attachment = channel::attach_path(path, path, StorageKind::File, options, mode);
  return make(std::make_unique<Impl>(std::move(attachment)));
}

std::shared_ptr<Channel> Channel::create_anonymous(const ChannelOptions& options) {
  auto attachment = channel::create_unnamed(memory::make_memfd_storage(), options);
  return make(std::make_unique<Impl>(std::move(attachment)));
}

std::shared_ptr<Channel> Channel::adopt_anonymous(int fd) {
  auto attachment = channel::attach_storage(memory::adopt_memfd_storage(fd));
  return make(std::make_unique<Impl>(std::move(attachment)));
}

std::shared_ptr<Channel> Channel::create_heap(const ChannelOptions& options) {
  auto attachment = channel::create_unnamed(memory::make_heap_storage(), options);
  return make(std::make_unique<Impl>(std::move(attachment)));
}

Outcome Channel::try_alloc(std::uint64_t payload_bytes, std::uint32_t meta_bytes, Backpressure policy,
                           Loan& loan) {
  return impl_->try_alloc(payload_bytes, meta_bytes, policy, loan);
}
Outcome Channel::publish(const Loan& loan, int kind, std::uint64_t schema_hash) noexcept {
  return impl_->publish(loan, kind, schema_hash);
}
void Channel::abort(const Loan& loan) noexcept { impl_->abort(loan); }

Outcome Channel::try_send(const void* payload, std::uint64_t payload_bytes, int kind, const void* meta,
                          std::uint32_t meta_bytes, std::uint64_t schema_hash, Backpressure policy) {
  // A long copy runs while other threads may close this handle.
  std::optional<Impl::Busy> guard;
  if (payload_bytes >= kLongCopyBytes) {
    impl_->enter();
    guard.emplace(*impl_);
  }
  Loan loan;
  Outcome outcome = impl_->try_alloc(payload_bytes, meta_bytes, policy, loan);
  if (outcome != Outcome::Ok) [[unlikely]]
    return outcome;
  if (meta_bytes != 0) std::memcpy(loan.meta, meta, meta_bytes);
  if (payload_bytes != 0) std::memcpy(loan.payload, payload, payload_bytes);
  return impl_->publish(loan, kind, schema_hash);
}

Outcome Channel::send(const void* payload, std::uint64_t payload_bytes, Backpressure policy,
                      std::int64_t deadline_ns) {
  impl_->enter();
  Impl::Busy guard(*impl_);
  for (bool spin = true, last = false;;) {
    Outcome outcome = try_send(payload, payload_bytes, kBytesMessage, nullptr, 0, 0, policy);
    if (outcome != Outcome::Full || policy == Backpressure::Raise) return outcome;
    if (last) return Outcome::TimedOut;
    Outcome waited = impl_->wait_for_space(deadline_ns, spin);
    spin = waited == Outcome::Ok;
    last = waited == Outcome::TimedOut;
  }
}

Outcome Channel::try_recv(Received& message) { return impl_->try_recv(message); }

Outcome Channel::recv(Received& message, std::int64_t deadline_ns) {
  impl_->enter();
  Impl::Busy guard(*impl_);
  for (bool spin = true, last = false;;) {
    Outcome outcome = impl_->try_recv(message);
    if (outcome != Outcome::Empty) return outcome;
    if (last) return Outcome::TimedOut;
    Outcome waited = impl_->wait_for_message(deadline_ns, spin);
    spin = waited == Outcome::Ok;
    last = waited == Outcome::TimedOut;
  }
}

void Channel::release(std::uint32_t slot, std::uint32_t process) noexcept { impl_->release(slot, process); }
void Channel::give_back(const Received& message) noexcept { impl_->give_back(message); }
Outcome Channel::wait_for_space(std::int64_t deadline_ns, bool spin) {
  return impl_->wait_for_space(deadline_ns, spin);
}
Outcome Channel::wait_for_message(std::int64_t deadline_ns, bool spin) {
  return impl_->wait_for_message(deadline_ns, spin);
}
void Channel::pass_on_wake() noexcept { impl_->pass_on_wake(); }
void Channel::shutdown(bool at_once) { impl_->shutdown(at_once); }
bool Channel::is_shut_down() const noexcept { return (impl_->active() & memory::kShutDown) != 0; }
void Channel::close() noexcept { impl_->close(); }
bool Channel::is_closed() const noexcept { return impl_->closed.load(std::memory_order_relaxed); }
void Channel::abandon() noexcept { impl_->abandon(); }
void Channel::abandon_all() noexcept { Impl::abandon_all(); }

void Channel::unlink() {
  if (impl_->path.empty()) {
    throw Error(ErrorCode::InvalidArgument,
                "channel '" + impl_->label + "' has no name to remove; it goes with its last handle");
  }
  impl_->enter();
  std::lock_guard lock(
      impl_->local->closing);  // two threads of one handle do not exclude each other by its locks
  memory::Storage& storage = impl_->region->storage();
  storage.renew_locks();  // dropped, if this handle has left
  {
    channel::ControlLock control(*impl_->region, impl_->label);
    channel::remove_name(storage, impl_->path);
  }
  if (impl_->left.load(std::memory_order_relaxed)) storage.drop_locks();
}

std::uint64_t Channel::depth() const noexcept { return impl_->group.depth(); }
bool Channel::is_full() const noexcept { return !impl_->pool.anything_free_by_scan(); }
ChannelStats Channel::stats() const noexcept { return impl_->stats(); }
std::uint32_t Channel::capacity() const noexcept { return impl_->region->geometry().slots; }
std::uint64_t Channel::slot_size() const noexcept { return impl_->region->geometry().slot_bytes; }
std::uint64_t Channel::max_message_size() const noexcept {
  return impl_->region->geometry().max_message_bytes;
}
std::uint32_t Channel::max_handles() const noexcept { return impl_->region->geometry().participants; }
int Channel::checksum() const noexcept { return static_cast<int>(impl_->region->checksum()); }
std::string Channel::storage() const { return memory::storage_name(impl_->region->storage().kind()); }
std::string Channel::label() const { return impl_->label; }
std::string Channel::path() const { return impl_->path; }
int Channel::descriptor() const noexcept { return impl_->region->storage().descriptor(); }

const char* crc32c_backend() noexcept { return base::crc32c_backend(); }

std::string Channel::uuid() const {
  std::array<unsigned char, 16> id{};
  std::memcpy(id.data(), impl_->region->header().uuid, id.size());
  return base::to_hex(id);
}

}  // namespace dsline
