#include "channel/impl.hpp"

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <optional>

#include "frames/frame_header.hpp"

namespace dsline {
namespace {

using frames::FrameHeader;
using slots::kNoSlot;
using slots::SlotPhase;
using slots::SlotWord;

// From this size on callers let other threads run while the payload is copied.
constexpr std::uint64_t kLongCopyBytes = 65536;
// Extra pages of a slot are given back after this many messages in a row that did not need them.
constexpr std::uint64_t kSmallUsesBeforeShrink = 256;
// From this size on, waiting a little for the slot that is still in cache is cheaper than copying into a cold one.
constexpr std::uint64_t kHotWaitBytes = 256 * 1024;
constexpr std::uint32_t kHotMisses = 16;
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

std::uint32_t Channel::Impl::take_slot(std::uint64_t payload_bytes) noexcept {
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
std::uint32_t Channel::Impl::wait_for_hot_slot(std::uint64_t payload_bytes) noexcept {
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

Outcome Channel::Impl::try_alloc(std::uint64_t payload_bytes, std::uint32_t meta_bytes, Backpressure policy,
                                 Loan& loan, bool for_copy) {
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
  std::uint32_t s = take_slot(for_copy ? payload_bytes : std::min(payload_bytes, kHotWaitBytes - 1));
  if (s == kNoSlot) [[unlikely]] {
    s = take_slot_when_full(policy);
    if (s == kNoSlot) {
      if (policy == Backpressure::Block || policy == Backpressure::Raise) return Outcome::Full;
      region->header().dropped_newest.fetch_add(1, std::memory_order_relaxed);
      return Outcome::Dropped;
    }
  }
  DSLINE_POINT("alloc.taken");
  if (region->has_sealed(s)) [[unlikely]]
    unseal(s);
  fit(s, frame);
  loan.word = pool.word(s).bits;
  loan.process = process.load(std::memory_order_relaxed);
  std::byte* at = region->write_frame(s);
  loan.slot = s;
  loan.meta_bytes = meta_bytes;
  loan.payload_bytes = payload_bytes;
  loan.meta = at + sizeof(FrameHeader);
  loan.payload = at + frames::payload_offset(meta_bytes);
  loan.shown = region->read_frame(s) + frames::payload_offset(meta_bytes);
  return Outcome::Ok;
}

std::uint32_t Channel::Impl::take_slot_when_full(Backpressure policy) {
  // The map may lack slots whose hints other handles keep, or took with them when they died.
  const std::int64_t now = base::monotonic_ns();
  const bool due = now - local->last_scan_ns.load(std::memory_order_relaxed) >= kSliceNs;
  if (due) {
    local->last_scan_ns.store(now, std::memory_order_relaxed);
    sweep(false);
    tidy();
    offer_what_was_passed();
  }
  if (due || policy == Backpressure::Block || region->geometry().slots <= slots::kMostSlotsForHints) {
    std::uint32_t s = pool.try_alloc_by_scan(me);
    if (s != kNoSlot) return s;
  }
  // Another sender may take the slot that was just freed; the bounds keep this from going on for ever.
  const std::uint32_t tries = 2 * region->geometry().slots;
  for (std::uint32_t i = 0; i < tries && publication.drop_history(me); ++i) {
    std::uint32_t s = pool.try_alloc(me);
    if (s != kNoSlot) return s;
  }
  if (policy != Backpressure::DropOldest) return kNoSlot;
  for (std::uint32_t i = 0; i < tries && publication.drop_oldest(me); ++i) {
    std::uint32_t s = pool.try_alloc(me);
    if (s != kNoSlot) return s;
  }
  return kNoSlot;
}

/// Makes the slot large enough for `frame` bytes, or smaller when it has long been too large.
void Channel::Impl::fit(std::uint32_t s, std::uint64_t frame) {
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
    // Whoever looks at the newest message without holding it must not find a hole where its pages were.
    if (uses >= kSmallUsesBeforeShrink && !region->keeps_history()) {
      region->shrink_slot(s, need);
      state.small_uses.store(0, std::memory_order_relaxed);
    }
  }
}

void Channel::Impl::unseal(std::uint32_t s) {
  if (region->unseal_slot(s)) return;
  const int failure = errno;
  pool.abort(s, pool.word(s));
  throw Error(
      ErrorCode::System,
      "channel '" + label + "': a sealed slot cannot be made writable again (" + strerror(failure) + ")",
      failure);
}

void Channel::Impl::grow(std::uint32_t s, std::uint64_t need) {
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
bool Channel::Impl::reclaim_free_slots() noexcept {
  bool any = false;
  const memory::Geometry& g = region->geometry();
  if (region->keeps_history()) return false;  // see fit()
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

bool Channel::Impl::is_mine(const Loan& loan) const noexcept {
  return loan.process == base::fork_generation() && !left.load(std::memory_order_relaxed) &&
         pool.word(loan.slot).bits == loan.word && SlotWord{loan.word}.is(SlotPhase::Writing);
}

void Channel::Impl::abort(const Loan& loan) noexcept {
  if (!is_mine(loan)) return;
  pool.abort(loan.slot, SlotWord{loan.word});
  if (closed.load(std::memory_order_seq_cst)) [[unlikely]]
    leave_if_idle();
}

bool Channel::Impl::withhold(const Loan& loan) noexcept {
  return is_mine(loan) && publication.withhold(loan.slot, SlotWord{loan.word});
}

void Channel::Impl::end_keeping(const Loan& loan) noexcept {
  if (loan.process != base::fork_generation() || left.load(std::memory_order_relaxed)) return;
  const SlotWord word = pool.word(loan.slot);
  if (word.generation() != SlotWord{loan.word}.generation() || word.owner() != me || !word.is_kept()) return;
  publication.end_keeping(loan.slot, word);
  if (closed.load(std::memory_order_seq_cst)) [[unlikely]]
    leave_if_idle();
}

Outcome Channel::Impl::publish(const Loan& loan, int kind, std::uint64_t schema_hash, AfterPublish after,
                               bool seal, std::uint64_t* entered_at) {
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
  if (seal) [[unlikely]] {
    const std::uint64_t frame = frames::payload_offset(loan.meta_bytes) + loan.payload_bytes;
    if (!region->seal_slot(loan.slot, frame)) {
      const int failure = errno;
      throw Error(ErrorCode::System,
                  "channel '" + label + "': the pages of the message cannot be sealed (" + strerror(failure) +
                      "); the number of mappings (vm.max_map_count) may be used up; the loan is still open",
                  failure);
    }
    DSLINE_POINT("publish.sealed");
  }

  // SYNC active: sequentially consistent with the slot's WRITING word. Whoever changes `active` sees the slot WRITING
  // or this load sees the change.
  const std::uint64_t state = active();
  if ((state & memory::kShutDown) != 0) [[unlikely]] {
    abort(loan);
    wake_receivers();  // they may have waited for this slot to see the end
    return Outcome::Closed;
  }
  const std::uint32_t groups = static_cast<std::uint32_t>(state) & region->group_bits();
  if (!publication.publish(loan.slot, SlotWord{loan.word}, groups, me, after == AfterPublish::Keep,
                           entered_at)) [[unlikely]]
    return Outcome::Closed;
  count(sent);
  // A group that ended meanwhile leaves its bit to whoever looks next.
  if ((groups & ~static_cast<std::uint32_t>(active())) != 0) [[unlikely]]
    tidy();
  const bool synced = region->rules().sync == 0 || region->storage().sync();
  if (closed.load(std::memory_order_seq_cst)) [[unlikely]]
    leave_if_idle();
  return synced ? Outcome::Ok : Outcome::NotSynced;
}

Outcome Channel::try_alloc(std::uint64_t payload_bytes, std::uint32_t meta_bytes, Backpressure policy,
                           Loan& loan, bool for_copy) {
  return impl_->try_alloc(payload_bytes, meta_bytes, policy, loan, for_copy);
}
Outcome Channel::publish(const Loan& loan, int kind, std::uint64_t schema_hash) noexcept {
  return impl_->publish(loan, kind, schema_hash, AfterPublish::LetGo, false);
}
Outcome Channel::publish(const Loan& loan, int kind, std::uint64_t schema_hash, AfterPublish after,
                         bool seal) {
  return impl_->publish(loan, kind, schema_hash, after, seal);
}
bool Channel::withhold(const Loan& loan) noexcept { return impl_->withhold(loan); }
void Channel::end_keeping(const Loan& loan) noexcept { impl_->end_keeping(loan); }
bool Channel::can_seal() const noexcept {
  return impl_->region->storage().kind() != memory::StorageKind::Heap &&
         impl_->region->geometry().stride_bytes % memory::kPageBytes == 0;
}
bool Channel::part_with_loans() noexcept { return impl_->region->part_with_writable(); }
void Channel::abort(const Loan& loan) noexcept { impl_->abort(loan); }

Outcome Channel::try_send(const void* payload, std::uint64_t payload_bytes, int kind, const void* meta,
                          std::uint32_t meta_bytes, std::uint64_t schema_hash, Backpressure policy) {
  // A long copy, or a write to the disk, runs while other threads may close this handle.
  std::optional<Impl::Busy> guard;
  if (payload_bytes >= kLongCopyBytes || impl_->region->rules().sync != 0) {
    impl_->enter();
    guard.emplace(*impl_);
  }
  Loan loan;
  Outcome outcome = impl_->try_alloc(payload_bytes, meta_bytes, policy, loan);
  if (outcome != Outcome::Ok) [[unlikely]]
    return outcome;
  if (meta_bytes != 0) std::memcpy(loan.meta, meta, meta_bytes);
  if (payload_bytes != 0) std::memcpy(loan.payload, payload, payload_bytes);
  DSLINE_POINT("send.copied");
  return impl_->publish(loan, kind, schema_hash, AfterPublish::LetGo, false);
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

}  // namespace dsline
