#include "liveness/membership.hpp"

#include <sched.h>

#include <algorithm>
#include <bit>
#include <cstring>
#include <vector>

#include "base/clock.hpp"
#include "base/points.hpp"
#include "liveness/participants.hpp"
#include "order/group.hpp"
#include "order/order_ring.hpp"

namespace dsline::liveness {
namespace {

using order::Cell;
using slots::Claim;
using slots::SlotPhase;
using slots::SlotWord;

// Senders that had looked at the active groups just before a new one joined.
constexpr std::int64_t kSenderPatienceNs = 20'000'000;

constexpr std::size_t kNameWords = sizeof(memory::GroupState::name) / 8;

std::uint64_t name_word(std::string_view name, std::size_t i) noexcept {
  std::uint64_t word = 0;
  if (name.size() > i * 8)
    std::memcpy(&word, name.data() + i * 8, std::min<std::size_t>(8, name.size() - i * 8));
  return word;
}

}  // namespace

bool Membership::is_named(std::uint32_t group) const noexcept {
  return group >= 1 && group < region_->geometry().groups &&
         !(region_->keeps_history() && group == region_->retention_group());
}

std::uint32_t Membership::active() const noexcept {
  return static_cast<std::uint32_t>(region_->header().active.load(std::memory_order_seq_cst)) &
         region_->group_bits();
}

std::string Membership::name(std::uint32_t group) const {
  char text[kNameWords * 8 + 1] = {};
  for (std::size_t i = 0; i < kNameWords; ++i) {
    const std::uint64_t word = region_->group(group).name[i].load(std::memory_order_relaxed);
    std::memcpy(text + i * 8, &word, 8);
  }
  return text;
}

std::uint32_t Membership::rules(std::uint32_t group) const noexcept {
  return region_->group(group).state.load(std::memory_order_relaxed) &
         (memory::kGroupDurable | memory::kGroupDrops);
}

std::uint32_t Membership::find(std::string_view wanted) const noexcept {
  const std::uint32_t groups = active();
  for (std::uint32_t g = 1; g < region_->geometry().groups; ++g) {
    if (!is_named(g) || (groups >> g & 1) == 0) continue;
    bool same = true;
    for (std::size_t i = 0; i < kNameWords && same; ++i) {
      same = region_->group(g).name[i].load(std::memory_order_relaxed) == name_word(wanted, i);
    }
    if (same) return g;
  }
  return kNoGroup;
}

void Membership::enter(std::uint32_t group, std::uint32_t me) noexcept {
  region_->participant(me).group.store(group + 1, std::memory_order_release);
}

bool Membership::is_in_use(std::uint32_t group) const noexcept {
  for (std::uint32_t s = 0; s < region_->geometry().slots; ++s) {
    const SlotWord word{region_->slot(s).word.load(std::memory_order_seq_cst)};
    if (word.is(SlotPhase::Committed) && (word.pending() >> group & 1) != 0) return true;
  }
  return false;
}

std::uint32_t Membership::make(std::string_view wanted, std::uint32_t rules, JoinAt start,
                               std::uint32_t me) noexcept {
  remove_abandoned(kNoGroup, me);
  sweep(me);
  const order::OrderRing ring(*region_);
  for (std::uint32_t g = 1; g < region_->geometry().groups; ++g) {
    if (!is_named(g) || (active() >> g & 1) != 0) continue;
    memory::GroupState& group = region_->group(g);
    enter(g, me);  // first: whoever recovers me finds the group
    DSLINE_POINT("join.entered");
    for (std::size_t i = 0; i < kNameWords; ++i) {
      group.name[i].store(name_word(wanted, i), std::memory_order_relaxed);
    }
    group.state.store(memory::kGroupNamed | memory::kGroupJoining | rules, std::memory_order_relaxed);
    group.dropped_oldest.store(0, std::memory_order_relaxed);
    group.redelivered.store(0, std::memory_order_relaxed);
    group.joined.fetch_add(1, std::memory_order_relaxed);
    const std::uint64_t tail = ring.tail_guess();
    group.cursor.store(tail, std::memory_order_seq_cst);
    if (is_in_use(g)) {  // invariant 1
      region_->participant(me).group.store(0, std::memory_order_relaxed);
      continue;
    }
    std::uint64_t from = tail;
    if (start != JoinAt::Next) {
      forget_claims(g);
      from = first_position(start, g, tail);
      group.cursor.store(from, std::memory_order_seq_cst);
      offer_old(g, from);
    }
    DSLINE_POINT("join.before_active");
    // SYNC active: after the cursor, since a message that has the bit must not enter before it.
    region_->header().active.fetch_or(std::uint64_t{1} << g, std::memory_order_seq_cst);
    DSLINE_POINT("join.active");
    if (start != JoinAt::Next) {
      wait_for_senders(g);
      offer_old(g, from);
    }
    end_joining(g);
    return g;
  }
  return kNoGroup;
}

// The position of a message that a late joiner may have, kNoPosition for others: old enough to be in the order, young
// enough that its cell outlives the wait for the new group (layout.hpp, kCellsPerSlot), and needed by somebody who has
// not given up on it. Loaded once: the slot may be taken for writing at any time.
std::uint64_t Membership::offered_position(std::uint32_t s, SlotWord word, std::uint32_t group,
                                           std::uint64_t tail) const noexcept {
  const std::uint32_t pending = word.pending() & region_->group_bits();
  if (!word.is(SlotPhase::Committed) || word.is_entering() || pending == 0 || (pending >> group & 1) != 0)
    return slots::kNoPosition;
  bool wanted = false;
  for (std::uint32_t left = pending; left != 0; left &= left - 1) {
    const std::uint32_t g = static_cast<std::uint32_t>(std::countr_zero(left));
    wanted = wanted || Claim{region_->claim(s, g).load(std::memory_order_acquire)}.who() != Claim::kDead;
  }
  const std::uint64_t position = region_->slot(s).position.load(std::memory_order_acquire);
  if (!wanted || position == slots::kNoPosition) return slots::kNoPosition;
  const Cell cell{region_->cell(position).load(std::memory_order_acquire)};
  const bool is_there = cell.ahead_of(position) == 0 && cell.slot() == s &&
                        slots::distance(position & slots::kPositionMask, tail) >=
                            -static_cast<std::int64_t>(region_->geometry().slots);
  return is_there ? position : slots::kNoPosition;
}

std::uint64_t Membership::first_position(JoinAt start, std::uint32_t group,
                                         std::uint64_t tail) const noexcept {
  std::uint64_t first = tail;
  bool found = false;
  for (std::uint32_t s = 0; s < region_->geometry().slots; ++s) {
    const std::uint64_t position = offered_position(s, pool_->word(s), group, tail);
    if (position == slots::kNoPosition) continue;
    const std::int64_t ahead = slots::distance(position & slots::kPositionMask, first);
    if (!found || (start == JoinAt::Oldest ? ahead < 0 : ahead > 0)) first = position;
    found = true;
  }
  return first;
}

// What the last group with this number had read must not pass for read by the new one. Nobody writes the claim of a
// committed slot that lacks the bit, until the slot is taken for writing, which does the same.
void Membership::forget_claims(std::uint32_t group) noexcept {
  for (std::uint32_t s = 0; s < region_->geometry().slots; ++s) {
    base::Atomic<std::uint64_t>& claim = region_->claim(s, group);
    Claim before{claim.load(std::memory_order_acquire)};
    const SlotWord word = pool_->word(s);
    if (!word.is(SlotPhase::Committed) || (word.pending() >> group & 1) != 0) continue;
    claim.compare_exchange_strong(before.bits, Claim::none().bits, std::memory_order_acq_rel);
  }
}

void Membership::offer_old(std::uint32_t group, std::uint64_t from) noexcept {
  const std::uint64_t tail = order::OrderRing(*region_).tail_guess();
  for (std::uint32_t s = 0; s < region_->geometry().slots; ++s) {
    base::Atomic<std::uint64_t>& claim = region_->claim(s, group);
    Claim before{claim.load(std::memory_order_acquire)};
    SlotWord word = pool_->word(s);
    const std::uint64_t position = offered_position(s, word, group, tail);
    if (position == slots::kNoPosition) continue;
    if (slots::distance(position & slots::kPositionMask, from) < 0) continue;
    const Claim open = Claim::make(position, 0, Claim::kNobody);
    // The group has had it: a sender with DROP_OLDEST took it since the group became active.
    if (before.position_low() == open.position_low() && before != open) continue;
    if (!claim.compare_exchange_strong(before.bits, open.bits, std::memory_order_acq_rel)) continue;
    DSLINE_POINT("join.offered");
    while (offered_position(s, word, group, tail) == position) {
      const SlotWord with_group{word.bits | std::uint64_t{1} << group};
      const std::uint32_t generation = word.generation();
      // SYNC word: sequentially consistent, so that a release that came first is seen as the end of the message.
      if (region_->slot(s).word.compare_exchange_strong(word.bits, with_group.bits,
                                                        std::memory_order_seq_cst))
        break;
      if (word.generation() != generation) break;
    }
  }
}

void Membership::wait_for_senders(std::uint32_t group) const noexcept {
  const std::int64_t deadline = base::monotonic_ns() + kSenderPatienceNs;
  for (std::uint32_t s = 0; s < region_->geometry().slots; ++s) {
    const SlotWord first = pool_->word(s);
    auto may_lack = [&](SlotWord word) {
      return word.generation() == first.generation() &&
             (word.is(SlotPhase::Writing) || (word.is_entering() && (word.pending() >> group & 1) == 0));
    };
    while (may_lack(pool_->word(s)) && base::monotonic_ns() < deadline) sched_yield();
  }
}

void Membership::leave(std::uint32_t me) noexcept {
  const std::uint32_t entry = region_->participant(me).group.load(std::memory_order_relaxed);
  // The entry comes last: whoever recovers me finds a group that I had not ended, or not swept.
  if (entry >= 1 && is_named(entry - 1)) remove_abandoned(me, me);
  DSLINE_POINT("leave.no_member");
  region_->participant(me).group.store(0, std::memory_order_release);
}

void Membership::remove(std::uint32_t group, std::uint32_t me) noexcept {
  // SYNC active: sequentially consistent with the slots' words, see publish.
  region_->header().active.fetch_and(~(std::uint64_t{1} << group), std::memory_order_seq_cst);
  DSLINE_POINT("leave.inactive");
  region_->group(group).state.store(0, std::memory_order_relaxed);
  // Members that are still there must not pass for members of the next group with this number.
  for (std::uint32_t i = 0; i < region_->geometry().participants; ++i) {
    std::uint32_t mine = group + 1;
    region_->participant(i).group.compare_exchange_strong(mine, 0, std::memory_order_acq_rel);
  }
  order::Group(*region_, group).messages().wake_all();
  sweep(me);
}

// SYNC joining: pairs with the acquire load of DROP_OLDEST senders, who leave the cursor alone until here.
void Membership::end_joining(std::uint32_t group) noexcept {
  if (is_named(group))
    region_->group(group).state.fetch_and(~memory::kGroupJoining, std::memory_order_release);
}

bool Membership::has_members(std::uint32_t group, std::uint32_t except) const noexcept {
  const Participants participants(*region_);
  for (std::uint32_t i = 0; i < region_->geometry().participants; ++i) {
    if (i != except && participants.entry(i).state() == EntryState::Used &&
        region_->participant(i).group.load(std::memory_order_acquire) == group + 1)
      return true;
  }
  return false;
}

void Membership::remove_abandoned(std::uint32_t except, std::uint32_t me) noexcept {
  for (std::uint32_t g = 1; g < region_->geometry().groups; ++g) {
    if (!is_named(g) || (active() >> g & 1) == 0 || (rules(g) & memory::kGroupDurable) != 0 ||
        has_members(g, except))
      continue;
    remove(g, me);
  }
}

// A sweeper that is no participant yet leaves kDiscard without a number when it dies; the control lock says that nobody
// is at it any more. A claim is read before the word and taken only at a real position: an entering sender writes the claims of its
// groups while the word is entering, and such a word is left for a later sweep.
void Membership::sweep(std::uint32_t me) noexcept {
  for (std::uint32_t s = 0; s < region_->geometry().slots; ++s) {
    std::uint32_t gone = pool_->word(s).pending() & region_->group_bits() & ~active();
    for (; gone != 0; gone &= gone - 1) {
      const std::uint32_t g = static_cast<std::uint32_t>(std::countr_zero(gone));
      Claim claim{region_->claim(s, g).load(std::memory_order_acquire)};
      const SlotWord word = pool_->word(s);
      if (!word.is(SlotPhase::Committed) || word.is_entering() || (word.pending() >> g & 1) == 0 ||
          !(claim.is_open() || claim.who() == Claim::kDiscard) ||
          claim.position_low() == slots::kNoPositionLow)
        continue;
      DSLINE_POINT("sweep.before_claim");
      const Claim taken = claim.with(claim.attempts(), Claim::discarder(me));
      if (!region_->claim(s, g).compare_exchange_strong(claim.bits, taken.bits, std::memory_order_acq_rel))
        continue;
      DSLINE_POINT("sweep.claimed");
      pool_->clear_pending(s, 1u << g);
    }
  }
}

bool Membership::anything_stale() const noexcept {
  const std::uint32_t groups = active();
  for (std::uint32_t s = 0; s < region_->geometry().slots; ++s) {
    const SlotWord word = pool_->word(s);
    if (word.is(SlotPhase::Committed) && (word.pending() & region_->group_bits() & ~groups) != 0) return true;
  }
  for (std::uint32_t g = 1; g < region_->geometry().groups; ++g) {
    if (is_named(g) && (groups >> g & 1) != 0 && (rules(g) & memory::kGroupDurable) == 0 &&
        !has_members(g, kNoGroup))
      return true;
  }
  return false;
}

}  // namespace dsline::liveness
