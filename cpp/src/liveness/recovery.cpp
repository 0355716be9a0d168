#include "liveness/recovery.hpp"

#include <algorithm>
#include <bit>
#include <vector>

#include "base/clock.hpp"
#include "base/points.hpp"
#include "delivery/publication.hpp"
#include "liveness/membership.hpp"
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
    DSLINE_POINT("recover.before_abort");
    pool.abort(s, word);
    return;
  }
  if (!word.is(SlotPhase::Committed) || (word.pending() & slots::kEnqueueing) == 0) return;
  if (word.is_kept()) {
    DSLINE_POINT("recover.before_not_kept");
    pool.clear_pending(s, slots::kEnqueueing);
    return;
  }
  if (is_in_order(region, ring, s, word)) {
    ring.advance_tail_past(region.slot(s).position.load(std::memory_order_acquire));
    DSLINE_POINT("recover.before_not_enqueueing");
    pool.clear_pending(s, slots::kEnqueueing);
    return;
  }
  SlotWord again = pool.word(s);
  if (again.generation() != word.generation() || again.owner() != d || !again.is(SlotPhase::Committed) ||
      (again.pending() & slots::kEnqueueing) == 0) {
    return;
  }
  const std::uint32_t groups = again.pending() & region.group_bits();
  DSLINE_POINT("recover.before_roll_forward");
  if (groups != 0) {
    delivery::Publication(region, pool).enter(s, groups);
  } else {
    pool.clear_pending(s, slots::kEnqueueing);
  }
}

/// What a dead participant left in its hands.
struct Estate {
  std::uint32_t writing = 0;
  std::uint32_t held = 0;
};

/// V6, V7: gives back what `d` held of slot `s`, or releases it where nobody is to get it again. Nobody else touches a
/// claim that carries the number of a dead participant, and its bit keeps the slot and the group's number.
void recover_held(memory::Region& region, SlotPool& pool, std::uint32_t s, std::uint32_t d,
                  Estate& estate) noexcept {
  const SlotWord word = pool.word(s);
  if (!word.is(SlotPhase::Committed)) return;
  const std::uint64_t active = region.header().active.load(std::memory_order_seq_cst);
  for (std::uint32_t g = 0; g < region.geometry().groups; ++g) {
    if ((word.pending() >> g & 1) == 0) continue;
    Claim claim{region.claim(s, g).load(std::memory_order_acquire)};
    Group group(region, g);
    if (claim.who() == Claim::discarder(d)) {
      pool.clear_pending(s, group.bit());
      if ((active >> g & 1) != 0) group.state().dropped_oldest.fetch_add(1, std::memory_order_relaxed);
      continue;
    }
    if (claim.who() != Claim::holder(d)) continue;
    ++estate.held;
    Claim seen = claim;
    if ((active >> g & 1) != 0 && claim.attempts() >= region.rules().max_deliveries) {
      region.claim(s, g).compare_exchange_strong(seen.bits, claim.with(claim.attempts(), Claim::kDead).bits,
                                                 std::memory_order_acq_rel);
      continue;
    }
    const bool drops = (group.state().state.load(std::memory_order_relaxed) & memory::kGroupDrops) != 0;
    if ((active >> g & 1) == 0 || drops) {
      DSLINE_POINT("recover.before_release");
      pool.clear_pending(s, group.bit());
      continue;
    }
    group.note_holder(s, region.participant(d).pid.load(std::memory_order_relaxed), memory::kHolderDied);
    DSLINE_POINT("recover.before_give_back");
    region.claim(s, g).compare_exchange_strong(seen.bits, claim.given_back().bits, std::memory_order_acq_rel);
    DSLINE_POINT("recover.before_flag");
    group.raise();
  }
}

Estate recover_slots(memory::Region& region, std::uint32_t d) noexcept {
  SlotPool pool(region);
  OrderRing ring(region);
  Estate estate;
  for (std::uint32_t s = 0; s < region.geometry().slots; ++s) {
    const SlotWord word = pool.word(s);
    estate.writing += word.owner() == d && word.is(SlotPhase::Writing);
    recover_published(region, pool, ring, s, d);
    recover_held(region, pool, s, d, estate);
  }
  return estate;
}

void record_death(memory::Region& region, std::uint32_t d) noexcept {
  memory::RegionHeader& header = region.header();
  const std::uint64_t number = header.deaths.fetch_add(1, std::memory_order_acq_rel);
  memory::DeathState& record = header.death[number % memory::kDeathsKept];
  memory::ParticipantState& dead = region.participant(d);
  record.sequence.store(0, std::memory_order_relaxed);
  base::fence_seq_cst();
  record.noticed_ns.store(static_cast<std::uint64_t>(base::realtime_ns()), std::memory_order_relaxed);
  record.start_time.store(dead.start_time.load(std::memory_order_relaxed), std::memory_order_relaxed);
  record.joined_ns.store(dead.joined_ns.load(std::memory_order_relaxed), std::memory_order_relaxed);
  record.pid.store(dead.pid.load(std::memory_order_relaxed), std::memory_order_relaxed);
  record.participant.store(d, std::memory_order_relaxed);
  const std::uint32_t group = dead.group.load(std::memory_order_relaxed);
  record.group.store(group, std::memory_order_relaxed);
  const bool is_member = group >= 1 && group <= region.geometry().groups;
  record.group_joined.store(is_member ? region.group(group - 1).joined.load(std::memory_order_relaxed) : 0,
                            std::memory_order_relaxed);
  record.writing.store(dead.left_writing.load(std::memory_order_relaxed), std::memory_order_relaxed);
  record.held.store(dead.left_held.load(std::memory_order_relaxed), std::memory_order_relaxed);
  // SYNC death: pairs with the acquire load of whoever reads the record.
  record.sequence.store(number + 1, std::memory_order_release);
}

/// V0 to V8.
void recover(memory::Region& region, std::uint32_t d) noexcept {
  SlotPool pool(region);
  pool.space().remove(d);  // V0
  const std::uint32_t groups = region.geometry().groups;
  for (std::uint32_t g = 0; g < groups; ++g) Group(region, g).messages().remove(d);
  DSLINE_POINT("recover.no_waiter");
  const Estate estate = recover_slots(region, d);
  memory::ParticipantState& dead = region.participant(d);
  dead.left_writing.fetch_add(estate.writing, std::memory_order_relaxed);
  dead.left_held.fetch_add(estate.held, std::memory_order_relaxed);
  // V8: a claim that an earlier recoverer gave back before it died may still lack its flag. A wake-up that the dead
  // one swallowed is passed on as well.
  const std::uint64_t active = region.header().active.load(std::memory_order_acquire);
  for (std::uint32_t g = 0; g < groups; ++g) {
    const bool retention = region.keeps_history() && g == region.retention_group();
    if ((active >> g & 1) != 0 && !retention) Group(region, g).raise();
  }
  pool.restore_hints();
  pool.space().wake_one_if_anyone();
  if ((active & memory::kShutDown) != 0) {  // its slot may have been the last
    for (std::uint32_t g = 0; g < groups; ++g) Group(region, g).messages().wake_all();
  }
}

/// V9: the groups of the dead. False when somebody else has the control lock.
bool end_membership(memory::Region& region, std::uint32_t d, std::uint32_t me, bool has_control) noexcept {
  const std::uint32_t group = region.participant(d).group.load(std::memory_order_relaxed);
  if (group <= 1) return true;  // none, or the default group, which has no members
  if (!has_control && !region.storage().try_lock(memory::kControlLock)) return false;
  SlotPool pool(region);
  DSLINE_POINT("recover.before_membership");
  Membership membership(region, pool);
  membership.end_joining(group - 1);
  membership.remove_abandoned(d, me);
  membership.sweep(me);  // a group that it was still joining, or had already ended
  if (!has_control) region.storage().unlock(memory::kControlLock);
  return true;
}

/// Whoever died while it ended a group, or had committed for one that has ended, leaves bits of it behind.
void sweep_ended_groups(memory::Region& region, std::uint32_t me, bool has_control) noexcept {
  SlotPool pool(region);
  Membership membership(region, pool);
  if (!membership.anything_stale()) return;
  if (!has_control && !region.storage().try_lock(memory::kControlLock)) return;
  membership.remove_abandoned(Membership::kNoGroup, me);
  membership.sweep(me);
  if (!has_control) region.storage().unlock(memory::kControlLock);
}

}  // namespace

void recover_leftovers(memory::Region& region, std::uint32_t me) noexcept { recover_slots(region, me); }

std::uint32_t recover_the_dead(memory::Region& region, std::uint32_t me, bool has_control) noexcept {
  Participants participants(region);
  std::uint32_t recovered = 0;
  for (std::uint32_t d = 0; d < region.geometry().participants; ++d) {
    if (d == me || !participants.try_lock_dead(d)) continue;
    DSLINE_POINT("recover.locked");
    recover(region, d);
    DSLINE_POINT("recover.before_burial");
    if (end_membership(region, d, me, has_control)) {
      record_death(region, d);
      participants.bury(d);
      ++recovered;
    } else {
      participants.unlock_dead(d);
    }
  }
  if (recovered != 0 || has_control) sweep_ended_groups(region, me, has_control);
  return recovered;
}

// Positions are kept, so that a crash in the middle changes nothing for the next attempt. Messages of the last pool of
// positions go back into their cells; what is older, or was held, is offered again through its claim (T0), oldest first.
// Groups that do not outlive their members end here, and so does an old history.
void rebuild(memory::Region& region) {
  const memory::Geometry& geometry = region.geometry();
  std::uint32_t kept = region.rules().default_group != 0 ? 1 : 0;
  for (std::uint32_t g = 1; g < geometry.groups; ++g) {
    const std::uint32_t state = region.group(g).state.load(std::memory_order_relaxed);
    const bool durable = (region.header().active.load(std::memory_order_relaxed) >> g & 1) != 0 &&
                         (state & memory::kGroupDurable) != 0;
    if (durable) kept |= 1u << g;
    region.group(g).state.store(state & ~memory::kGroupJoining, std::memory_order_relaxed);
  }
  const std::uint32_t retained = region.keeps_history() ? 1u << region.retention_group() : 0;
  kept |= retained;
  std::vector<std::uint32_t> late;
  std::uint64_t end = region.order().tail.load(std::memory_order_relaxed);
  for (std::uint32_t s = 0; s < geometry.slots; ++s) {
    SlotWord word{region.slot(s).word.load(std::memory_order_relaxed)};
    const bool queued = word.is(SlotPhase::Committed) && (word.pending() & kept) != 0;
    std::uint64_t position = region.slot(s).position.load(std::memory_order_relaxed);
    // While it is entering the position is only intended, and another message may have it.
    if (queued && (word.is_entering() || position == slots::kNoPosition)) {
      late.push_back(s);
    } else if (queued) {
      end = std::max(end, slots::next_position(position));
    }
  }
  if ((end & slots::kPositionMask) == slots::kNoPositionLow) ++end;
  for (std::uint32_t s : late) {
    region.slot(s).position.store(end, std::memory_order_relaxed);
    for (std::uint32_t g = 0; g < geometry.groups; ++g) {
      region.claim(s, g).store(Claim::make(end, 0, Claim::kNobody).bits, std::memory_order_relaxed);
    }
    end = slots::next_position(end);
  }

  for (std::uint32_t i = 0; i < geometry.participants; ++i) {
    region.participant(i).word.store(0, std::memory_order_relaxed);
  }
  OrderRing::initialise(region, end);
  // The cells of the last lap now name slot 0, whose claim has another position: takers step over them.
  const std::uint64_t begin = end - std::min<std::uint64_t>(end, geometry.slots);
  std::vector<std::uint64_t> cursors(geometry.groups, end);
  std::uint32_t given_back = 0;
  for (std::uint32_t s = 0; s < geometry.slots; ++s) {
    memory::SlotState& slot = region.slot(s);
    SlotWord word{slot.word.load(std::memory_order_relaxed)};
    const std::uint64_t position = slot.position.load(std::memory_order_relaxed);
    const std::uint32_t wanted = word.is(SlotPhase::Committed) ? word.pending() & kept : 0;
    std::uint32_t pending = 0;
    for (std::uint32_t g = 0; g < geometry.groups; ++g) {
      base::Atomic<std::uint64_t>& at = region.claim(s, g);
      const Claim held{at.load(std::memory_order_relaxed)};
      const bool in_window = position >= begin && held.who() == Claim::kNobody;
      const bool discarded = held.who() >= Claim::kDiscard && held.who() < Claim::kDead;
      Claim claim = Claim::none();
      if ((wanted >> g & 1) == 0 || discarded || ((retained >> g & 1) != 0 && !in_window)) {
        at.store(claim.bits, std::memory_order_relaxed);
        continue;
      }
      pending |= 1u << g;
      if (in_window) {
        claim = Claim::make(position, 0, Claim::kNobody);
        region.cell(position).store(Cell::make(position, s).bits, std::memory_order_relaxed);
        cursors[g] = std::min(cursors[g], position);
      } else {
        // A claim that says kRedeliver or kDead has been counted already.
        claim = Claim::make(position, held.attempts(), held.who());
        if (held.who() == Claim::kNobody) claim = claim.with(held.attempts(), Claim::kRedeliver);
        if (held.is_held()) claim = claim.given_back();
        given_back |= 1u << g;
      }
      at.store(claim.bits, std::memory_order_relaxed);
    }
    const std::uint64_t bit = std::uint64_t{1} << (s % 64);
    if (pending == 0) {
      slot.word.store(SlotWord::make(word.generation() + 1, slots::kNoOwner, SlotPhase::Free, 0).bits,
                      std::memory_order_relaxed);
      slot.position.store(slots::kNoPosition, std::memory_order_relaxed);
      region.free_map(s / 64).fetch_or(bit, std::memory_order_relaxed);
    } else {
      slot.word.store(SlotWord::make(word.generation(), slots::kNoOwner, SlotPhase::Committed, pending).bits,
                      std::memory_order_relaxed);
      region.free_map(s / 64).fetch_and(~bit, std::memory_order_relaxed);
    }
  }
  for (std::uint32_t g = 0; g < geometry.groups; ++g) {
    memory::GroupState& group = region.group(g);
    group.cursor.store(cursors[g], std::memory_order_relaxed);
    if ((kept >> g & 1) == 0) group.state.store(0, std::memory_order_relaxed);
    for (auto& word : group.messages.waiters) word.store(0, std::memory_order_relaxed);
  }
  for (auto& word : region.header().space.waiters) word.store(0, std::memory_order_relaxed);
  std::uint64_t state = region.header().active.load(std::memory_order_relaxed);
  region.header().active.store((state & ~memory::kActiveGroupsMask) | kept, std::memory_order_relaxed);
  for (std::uint32_t g = 0; g < geometry.groups; ++g) {
    if ((given_back >> g & 1) != 0) Group(region, g).raise();
  }
}

}  // namespace dsline::liveness
