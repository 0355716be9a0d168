#include "liveness/recovery.hpp"

#include <algorithm>
#include <bit>
#include <vector>

#include "liveness/participants.hpp"
#include "order/group.hpp"
#include "order/order_ring.hpp"
#include "slots/slot_pool.hpp"

namespace dsline::liveness {
namespace {

using order::Cell;
using order::Group;
using order::OrderRing;
using slots::Claim;
using slots::SlotPhase;
using slots::SlotPool;
using slots::SlotWord;

/// V2 to V4: has the dead publisher's message entered the order? `word` was loaded before.
bool is_in_order(memory::Region& region, const OrderRing& ring, std::uint32_t s, SlotWord word) noexcept {
  std::uint64_t q = region.slot(s).position.load(std::memory_order_acquire);
  if (q == slots::kNoPosition) return false;
  Cell cell = ring.cell(q);
  std::int64_t ahead = cell.ahead_of(q);
  if (ahead == 0 && cell.slot() == s) return true;
  if (ahead < 0) return false;
  // Another message has cell q, or q was lapped. In the order and lapped implies that somebody claimed it.
  std::uint32_t groups = word.pending() & slots::kGroupBits;
  if (groups == 0) return true;
  for (std::uint32_t left = groups; left != 0; left &= left - 1) {
    std::uint32_t g = static_cast<std::uint32_t>(std::countr_zero(left));
    if (g >= region.geometry().groups) return true;
    if (Claim{region.claim(s, g).load(std::memory_order_acquire)}.who() != Claim::kNobody) return true;
  }
  return false;
}

/// V1 to V5 for one slot of the dead publisher `d`.
void recover_published(memory::Region& region, SlotPool& pool, OrderRing& ring, std::uint32_t s,
                       std::uint32_t d) noexcept {
  SlotWord word = pool.word(s);
  if (word.owner() != d) return;
  if (word.is(SlotPhase::Writing)) {
    pool.abort(s, word);
    return;
  }
  if (!word.is(SlotPhase::Committed) || (word.pending() & slots::kEnqueueing) == 0) return;
  if (is_in_order(region, ring, s, word)) {
    pool.clear_pending(s, slots::kEnqueueing);
    return;
  }
  SlotWord again = pool.word(s);
  if (again.generation() != word.generation() || again.owner() != d || !again.is(SlotPhase::Committed) ||
      (again.pending() & slots::kEnqueueing) == 0) {
    return;
  }
  const std::uint32_t known_groups = (1u << region.geometry().groups) - 1;
  std::uint32_t groups = again.pending() & slots::kGroupBits & known_groups;
  if (groups != 0) {
    OrderRing::Entered entered = ring.enter(s, groups);
    pool.clear_pending(s, slots::kEnqueueing);
    ring.advance_tail(entered);
    for (std::uint32_t left = groups; left != 0; left &= left - 1) {
      Group group(region, static_cast<std::uint32_t>(std::countr_zero(left)));
      group.messages().wake_one_if_anyone();
    }
  } else {
    pool.clear_pending(s, slots::kEnqueueing);
  }
}

/// V6, V7: gives back what `d` held of slot `s`.
void recover_held(memory::Region& region, const SlotPool& pool, std::uint32_t s, std::uint32_t d) noexcept {
  SlotWord word = pool.word(s);
  if (!word.is(SlotPhase::Committed)) return;
  for (std::uint32_t g = 0; g < region.geometry().groups; ++g) {
    if ((word.pending() >> g & 1) == 0) continue;
    Claim claim{region.claim(s, g).load(std::memory_order_acquire)};
    if (claim.who() != Claim::holder(d)) continue;
    Claim seen = claim;
    region.claim(s, g).compare_exchange_strong(seen.bits, claim.given_back().bits, std::memory_order_acq_rel);
    Group(region, g).raise();
  }
}

void recover_slots(memory::Region& region, std::uint32_t d) noexcept {
  SlotPool pool(region);
  OrderRing ring(region);
  for (std::uint32_t s = 0; s < region.geometry().slots; ++s) {
    recover_published(region, pool, ring, s, d);
    recover_held(region, pool, s, d);
  }
}

void recover(memory::Region& region, std::uint32_t d) noexcept {
  SlotPool pool(region);
  pool.space().remove(d);  // V0
  const std::uint32_t groups = region.geometry().groups;
  for (std::uint32_t g = 0; g < groups; ++g) Group(region, g).messages().remove(d);
  recover_slots(region, d);
  // V8: a claim that an earlier recoverer gave back before it died may still lack its flag. A wake-up that the dead
  // one swallowed is passed on as well.
  const std::uint64_t active = region.header().active.load(std::memory_order_acquire);
  for (std::uint32_t g = 0; g < groups; ++g) {
    if ((active >> g & 1) != 0) Group(region, g).raise();
  }
  pool.space().wake_one_if_anyone();
  if ((active & memory::kShutDown) != 0)
    Group(region, 0).messages().wake_all();  // its slot may have been the last
  region.header().recovered.fetch_add(1, std::memory_order_relaxed);
}

}  // namespace

void recover_leftovers(memory::Region& region, std::uint32_t me) noexcept { recover_slots(region, me); }

std::uint32_t recover_the_dead(memory::Region& region, std::uint32_t me) noexcept {
  Participants participants(region);
  std::uint32_t recovered = 0;
  for (std::uint32_t d = 0; d < region.geometry().participants; ++d) {
    if (d == me || !participants.try_lock_dead(d)) continue;
    recover(region, d);
    participants.bury(d);
    ++recovered;
  }
  return recovered;
}

// Positions are kept, so that a crash in the middle changes nothing for the next attempt. Messages of the last lap go
// back into their cells; what is older, or was held, is offered again through its claim (T0), oldest first.
void rebuild(memory::Region& region) {
  const memory::Geometry& geometry = region.geometry();
  std::vector<std::uint32_t> late;
  std::uint64_t end = region.order().tail.load(std::memory_order_relaxed);
  for (std::uint32_t s = 0; s < geometry.slots; ++s) {
    SlotWord word{region.slot(s).word.load(std::memory_order_relaxed)};
    const bool queued = word.is(SlotPhase::Committed) && (word.pending() & 1) != 0;
    std::uint64_t position = region.slot(s).position.load(std::memory_order_relaxed);
    // With ENQ set the position is only intended, and another message may have it.
    if (queued && ((word.pending() & slots::kEnqueueing) != 0 || position == slots::kNoPosition)) {
      late.push_back(s);
    } else if (queued) {
      end = std::max(end, slots::next_position(position));
    }
  }
  if ((end & slots::kPositionMask) == slots::kNoPositionLow) ++end;
  for (std::uint32_t s : late) {
    region.slot(s).position.store(end, std::memory_order_relaxed);
    end = slots::next_position(end);
  }

  for (std::uint32_t i = 0; i < geometry.participants; ++i) {
    region.participant(i).word.store(0, std::memory_order_relaxed);
  }
  OrderRing::initialise(region, end);
  // The cells of the last lap now name slot 0, whose claim has another position: takers step over them.
  const std::uint64_t begin = end - std::min<std::uint64_t>(end, geometry.order_cells);
  std::uint64_t cursor = end;
  bool given_back = false;
  for (std::uint32_t s = 0; s < geometry.slots; ++s) {
    memory::SlotState& slot = region.slot(s);
    SlotWord word{slot.word.load(std::memory_order_relaxed)};
    Claim held{region.claim(s, 0).load(std::memory_order_relaxed)};
    for (std::uint32_t g = 1; g < geometry.groups; ++g) {
      region.claim(s, g).store(Claim::none().bits, std::memory_order_relaxed);
    }
    const std::uint64_t bit = std::uint64_t{1} << (s % 64);
    if (!word.is(SlotPhase::Committed) || (word.pending() & 1) == 0) {
      slot.word.store(SlotWord::make(word.generation() + 1, slots::kNoOwner, SlotPhase::Free, 0).bits,
                      std::memory_order_relaxed);
      slot.position.store(slots::kNoPosition, std::memory_order_relaxed);
      region.claim(s, 0).store(Claim::none().bits, std::memory_order_relaxed);
      region.free_map(s / 64).fetch_or(bit, std::memory_order_relaxed);
      continue;
    }
    region.free_map(s / 64).fetch_and(~bit, std::memory_order_relaxed);
    const std::uint64_t position = slot.position.load(std::memory_order_relaxed);
    const bool was_held = held.who() != Claim::kNobody;
    const bool in_window = position >= begin && !was_held;
    Claim claim = Claim::make(position, 0, Claim::kNobody);
    if (in_window) {
      region.cell(position).store(Cell::make(position, s).bits, std::memory_order_relaxed);
      cursor = std::min(cursor, position);
    } else {
      // A claim that says kRedeliver has been counted already.
      bool counted = !was_held || held.who() == Claim::kRedeliver;
      claim = counted ? claim.with(held.attempts(), Claim::kRedeliver)
                      : claim.with(held.attempts(), Claim::kNobody).given_back();
      given_back = true;
    }
    region.claim(s, 0).store(claim.bits, std::memory_order_relaxed);
    slot.word.store(SlotWord::make(word.generation(), slots::kNoOwner, SlotPhase::Committed, 1).bits,
                    std::memory_order_relaxed);
  }
  for (std::uint32_t g = 0; g < geometry.groups; ++g) {
    memory::GroupState& group = region.group(g);
    group.cursor.store(g == 0 ? cursor : end, std::memory_order_relaxed);
    group.redeliver.store(0, std::memory_order_relaxed);
    group.state.store(g == 0 ? 1 : 0, std::memory_order_relaxed);
    for (auto& word : group.messages.waiters) word.store(0, std::memory_order_relaxed);
  }
  for (auto& word : region.header().space.waiters) word.store(0, std::memory_order_relaxed);
  std::uint64_t state = region.header().active.load(std::memory_order_relaxed);
  region.header().active.store((state & ~memory::kActiveGroupsMask) | 1, std::memory_order_relaxed);
  if (given_back) Group(region, 0).raise();
}

}  // namespace dsline::liveness
