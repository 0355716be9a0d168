#include <cstring>

#include "channel/impl.hpp"
#include "frames/frame_header.hpp"
#include "memory/budget.hpp"

namespace dsline {

using slots::Claim;
using slots::SlotPhase;
using slots::SlotWord;

MemoryUse Channel::Impl::memory_use() const noexcept {
  MemoryUse out;
  for (std::uint32_t s = 0; s < region->geometry().slots; ++s) {
    const std::uint64_t room = region->slot(s).room_bytes.load(std::memory_order_relaxed);
    if (pool.word(s).is_free()) {
      out.idle_bytes += room;
    } else {
      out.used_bytes += room;
      ++out.used_slots;
    }
  }
  return out;
}

Outcome Channel::Impl::try_place(const void* payload, std::uint64_t bytes, std::uint64_t limit_bytes,
                                 Place& place) {
  enter();
  Busy guard(*this);
  // Senders that look at the same time may go past the limit by a message each.
  if (memory_use().used_bytes + bytes > limit_bytes &&
      (!sweep(false) || memory_use().used_bytes + bytes > limit_bytes))
    return closed_or_shut_down() ? Outcome::Closed : Outcome::Full;
  Loan loan;
  try {
    const Outcome outcome = try_alloc(bytes, 0, Backpressure::Raise, loan);
    if (outcome != Outcome::Ok) return outcome;
  } catch (const Error& error) {
    if (error.code() == ErrorCode::SharedMemoryFull) return Outcome::Full;
    throw;
  }
  // The slot that was free may have had to grow while others keep memory that they do not need.
  const MemoryUse use = memory_use();
  if (use.used_bytes + use.idle_bytes > limit_bytes && use.idle_bytes != 0) reclaim_free_slots();
  std::memcpy(loan.payload, payload, bytes);
  place = Place{loan.slot, slots::kNoPosition};
  const Outcome outcome = publish(loan, kBytesMessage, 0, AfterPublish::LetGo, false, &place.sequence);
  return outcome == Outcome::Ok && place.sequence == slots::kNoPosition ? Outcome::Dropped : outcome;
}

Outcome Channel::Impl::try_take(const Place& place, Received& message) {
  enter();
  if (closed.load(std::memory_order_relaxed) || group_number == kNoGroup || !may_receive())
    return Outcome::Closed;
  order::Held held{};
  if (place.slot >= region->geometry().slots || !group.try_take_at(place.slot, place.sequence, me, held))
    return (active() & memory::kShutDownAtOnce) != 0 ? Outcome::Closed : Outcome::Empty;
  if ((active() & memory::kShutDownAtOnce) != 0) {
    pool.clear_pending(held.slot, group.bit());
    return Outcome::Closed;
  }
  count(taken);
  return take_frame(held, group, message);
}

/// The oldest one is found by its position. A slot that is entering is passed over: its position is only intended.
Outcome Channel::Impl::try_take_between(std::uint64_t first, std::uint64_t last, Received& message) {
  enter();
  for (std::uint32_t look = 0; look < region->geometry().slots; ++look) {
    if (closed.load(std::memory_order_relaxed) || group_number == kNoGroup || !may_receive())
      return Outcome::Closed;
    Place oldest{0, last};
    for (std::uint32_t s = 0; s < region->geometry().slots; ++s) {
      if (!group.is_pending(s) || pool.word(s).is_entering()) continue;
      const std::uint32_t who = group.claim(s).who();
      if (who != Claim::kNobody && who != Claim::kRedeliver) continue;
      const std::uint64_t position = region->slot(s).position.load(std::memory_order_acquire);
      if (position >= first && position < oldest.sequence) oldest = Place{s, position};
    }
    if (oldest.sequence == last) return Outcome::Empty;
    const Outcome outcome = try_take(oldest, message);
    if (outcome != Outcome::Empty) return outcome;  // else somebody else was faster
  }
  return Outcome::Empty;
}

bool Channel::Impl::try_withdraw(const Place& place) noexcept {
  if (is_inherited() || closed.load(std::memory_order_relaxed)) return false;
  if (place.slot >= region->geometry().slots) return false;
  Busy guard(*this);
  bool any = false, all = true;
  const std::uint32_t pending = pool.word(place.slot).pending() & region->group_bits();
  for (std::uint32_t left = pending; left != 0; left &= left - 1) {
    order::Group of(*region, static_cast<std::uint32_t>(__builtin_ctz(left)));
    if (of.try_withdraw_at(place.slot, place.sequence, me)) {
      pool.clear_pending(place.slot, of.bit());
      any = true;
    } else {
      all = false;
    }
  }
  return any && all;
}

std::uint32_t Channel::Impl::discard_older(std::int64_t before_ns) noexcept {
  if (is_inherited() || closed.load(std::memory_order_relaxed) || !may_receive() || group_number == kNoGroup)
    return 0;
  Busy guard(*this);
  std::uint32_t dropped = 0;
  for (std::uint32_t s = 0; s < region->geometry().slots; ++s) {
    if (!group.is_pending(s) || (pool.word(s).pending() & slots::kEnqueueing) != 0) continue;
    Claim found = group.claim(s);
    if (found.who() != Claim::kNobody && found.who() != Claim::kRedeliver) continue;
    if ((region->slot(s).position.load(std::memory_order_acquire) & slots::kPositionMask) !=
        found.position_low())
      continue;
    // May be of a later message already; then the claim is another one, too.
    frames::FrameHeader header;
    std::memcpy(&header, region->read_frame(s), sizeof header);
    if (header.timestamp_ns >= before_ns) continue;
    if (!region->claim(s, group_number)
             .compare_exchange_strong(found.bits, found.with(found.attempts(), Claim::discarder(me)).bits,
                                      std::memory_order_acq_rel))
      continue;
    pool.clear_pending(s, group.bit());
    group.state().dropped_oldest.fetch_add(1, std::memory_order_relaxed);
    ++dropped;
  }
  return dropped;
}

Outcome Channel::try_place(const void* payload, std::uint64_t payload_bytes, std::uint64_t limit_bytes,
                           Place& place) {
  return impl_->try_place(payload, payload_bytes, limit_bytes, place);
}

Outcome Channel::try_take(const Place& place, Received& message) { return impl_->try_take(place, message); }

Outcome Channel::try_take_into(const Place& place, void* to, std::uint64_t bytes) {
  impl_->enter();
  Impl::Busy guard(*impl_);
  Received message;
  const Outcome outcome = impl_->try_take(place, message);
  if (outcome != Outcome::Ok) return outcome;
  const bool fits = message.payload_bytes == bytes;
  if (fits && bytes != 0) std::memcpy(to, message.payload, bytes);
  if (!fits) message.fault = "its length is not the one that was asked for";
  release(message);
  return fits ? Outcome::Ok : Outcome::Corrupted;
}

Outcome Channel::try_take_between(std::uint64_t first, std::uint64_t last, Received& message) {
  return impl_->try_take_between(first, last, message);
}

bool Channel::try_withdraw(const Place& place) noexcept { return impl_->try_withdraw(place); }

bool Channel::is_there(const Place& place) const noexcept {
  if (place.slot >= impl_->region->geometry().slots) return false;
  const SlotWord word = impl_->pool.word(place.slot);
  return word.is(SlotPhase::Committed) && (word.pending() & slots::kGroupBits) != 0 &&
         impl_->region->slot(place.slot).position.load(std::memory_order_acquire) == place.sequence;
}

Outcome Channel::publish(const Loan& loan, int kind, std::uint64_t schema_hash, Place& place) noexcept {
  place = Place{loan.slot, slots::kNoPosition};
  const Outcome outcome =
      impl_->publish(loan, kind, schema_hash, AfterPublish::LetGo, false, &place.sequence);
  return outcome == Outcome::Ok && place.sequence == slots::kNoPosition ? Outcome::Dropped : outcome;
}

std::uint32_t Channel::discard_older(std::int64_t before_ns) noexcept {
  return impl_->discard_older(before_ns);
}

MemoryUse Channel::memory_use() const noexcept { return impl_->memory_use(); }

void Channel::trim() noexcept {
  if (!impl_->is_inherited() && !impl_->closed_or_shut_down()) impl_->reclaim_free_slots();
}

std::uint64_t available_memory() { return memory::memory_budget().free_bytes; }

}  // namespace dsline
