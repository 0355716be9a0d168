#pragma once

#include <cstdint>

#include "base/clock.hpp"
#include "base/points.hpp"
#include "memory/region.hpp"
#include "order/cell.hpp"
#include "order/order_ring.hpp"
#include "slots/claim.hpp"
#include "slots/slot_word.hpp"
#include "waiting/wait_point.hpp"

namespace dsline::order {

/// A message that a participant has taken for a group.
struct Held {
  std::uint32_t slot;
  std::uint64_t position;
  std::uint32_t attempts;  ///< deliveries before this one
};

/// One subscriber group: its members compete for messages, in the order of positions.
///
/// Threads: any number of members and senders, of any processes.
/// Invariants: 1. Who wins the compare-and-swap on the claim has the message; a claim goes from nobody, kRedeliver or
///   kDead to one participant at a time. 2. No message before the cursor is unclaimed. 3. A message that was given back
///   is found by scanning as long as the redeliver flag is raised; it is lowered only from the value that was
///   loaded before a scan that found nothing. 4. While the group is active every message behind the cursor is one that it
///   needs and that keeps its slot, or was published by somebody who had not seen the group (at most a pool of them), so
///   the cursor is no lap behind. Only a joiner that stood still before it made the group active, or damage, makes it one:
///   look_by_claims() and offer_what_was_passed() then find what the cells do not say.
/// Death: a dead member's claims carry its number, and recovery gives them back.
class Group {
 public:
  Group(memory::Region& region, std::uint32_t number) noexcept
      : region_(&region),
        order_(region),
        number_(number),
        messages_(region.group(number).messages, region.geometry().participants) {}

  std::uint32_t number() const noexcept { return number_; }
  std::uint32_t bit() const noexcept { return 1u << number_; }
  waiting::WaitPoint& messages() noexcept { return messages_; }
  memory::GroupState& state() const noexcept { return region_->group(number_); }
  bool is_active() const noexcept {
    return (region_->header().active.load(std::memory_order_seq_cst) & bit()) != 0;
  }

  /// False when try_take() would surely have found nothing a moment ago.
  bool anything_waiting() const noexcept {
    if (is_raised()) return true;
    std::uint64_t p = state().cursor.load(std::memory_order_acquire);
    const Cell c = order_.cell(p);
    const std::int64_t ahead = c.ahead_of(p);
    if (ahead < 0) return false;
    if (ahead == 0 && c.slot() < region_->geometry().slots) return true;
    return look_at(p).what != Look::Empty;
  }

  /// True when a message that nobody has taken stands at the cursor.
  bool anything_at_cursor() const noexcept {
    const std::uint64_t p = state().cursor.load(std::memory_order_acquire);
    const Cell c = order_.cell(p);
    return c.ahead_of(p) == 0 && c.slot() < region_->geometry().slots && is_unclaimed(c.slot(), p);
  }

  /// Whether try_take() would find something now, without taking it; puts right what says so in vain: the redeliver flag,
  /// which recovery raises whether or not it gave anything back, and a cursor that somebody did not move on.
  bool anything_to_take() noexcept {
    std::uint64_t loaded = state().redeliver.load(std::memory_order_seq_cst);
    if ((loaded & 1) != 0) {
      for (std::uint32_t s = 0; s < region_->geometry().slots; ++s) {
        if (is_pending(s) && claim(s).who() == slots::Claim::kRedeliver) return true;
      }
      if (!state().redeliver.compare_exchange_strong(loaded, loaded & ~std::uint64_t{1},
                                                     std::memory_order_acq_rel))
        return true;  // raised again meanwhile
    }
    std::uint64_t position = 0;
    std::uint32_t slot = 0;
    return next_unclaimed(position, slot);
  }

  /// For who was woken and takes nothing: another member has it then.
  void pass_on() noexcept {
    if (anything_waiting()) messages_.wake_one_if_anyone();
  }

  /// T0 to T2: takes the next message for participant `me`. False when there is none.
  bool try_take(std::uint32_t me, Held& held) noexcept {
    const std::uint32_t who = slots::Claim::holder(me);
    if (is_raised()) [[unlikely]] {
      if (take_given_back(who, held)) return true;
    }
    return take_at_cursor(who, held);
  }

  /// Takes the message at `position`, in slot `s`, for participant `me`, in whatever order: false when somebody has it, or
  /// is done with it. No cell is looked at: one that a whole lap of others has overwritten does not matter.
  bool try_take_at(std::uint32_t s, std::uint64_t position, std::uint32_t me, Held& held) noexcept {
    return claim_open_at(s, position, slots::Claim::holder(me), held);
  }

  /// The same to discard it: the caller releases it.
  bool try_withdraw_at(std::uint32_t s, std::uint64_t position, std::uint32_t me) noexcept {
    Held held{};
    return claim_open_at(s, position, slots::Claim::discarder(me), held);
  }

  /// The same for a message that nobody will see: the caller releases it. Of those that were never taken first, so
  /// that a message somebody works on is the last to go.
  bool try_discard(std::uint32_t me, Held& held) noexcept {
    const std::uint32_t who = slots::Claim::discarder(me);
    return take_at_cursor(who, held) || (is_raised() && take_given_back(who, held));
  }

  /// Takes the message at `position`, in slot `s`, to discard it: false when somebody has it, or is done with it.
  /// `may_advance`: the cursor goes past it.
  bool try_discard_at(std::uint32_t s, std::uint64_t position, std::uint32_t me,
                      bool may_advance = true) noexcept {
    const bool won = claim_at(s, position, slots::Claim::discarder(me));
    if (may_advance) advance(position, slots::next_position(position));
    return won;
  }

  /// The oldest position that may be unclaimed, and its slot: false when no message waits at the cursor. Moves the
  /// cursor over what needs nobody.
  bool next_unclaimed(std::uint64_t& position, std::uint32_t& slot) noexcept {
    for (;;) {
      const std::uint64_t p = state().cursor.load(std::memory_order_acquire);
      const Seen seen = look_at(p);
      if (seen.what == Look::Empty) return false;
      if (seen.what == Look::Message && is_unclaimed(seen.slot, p)) {
        position = p;
        slot = seen.slot;
        return true;
      }
      if (seen.what != Look::Again) advance(p, seen.next);
    }
  }

  /// The same without moving the cursor.
  bool find_unclaimed(std::uint64_t& position, std::uint32_t& slot) const noexcept {
    position = state().cursor.load(std::memory_order_acquire);
    for (std::uint64_t i = 0; i < region_->geometry().order_cells; ++i) {
      const Cell c = order_.cell(position);
      if (c.ahead_of(position) != 0) return false;
      slot = c.slot();
      if (slot < region_->geometry().slots && is_unclaimed(slot, position)) return true;
      position = slots::next_position(position);
    }
    return false;
  }

  /// Gives a held message back to the group, as if its holder had died.
  void give_back(const Held& held, std::uint32_t me, std::uint32_t pid) noexcept {
    note_holder(held.slot, pid, memory::kHolderGaveBack);
    DSLINE_POINT("nack.before_claim");
    slots::Claim mine = slots::Claim::make(held.position, held.attempts, slots::Claim::holder(me));
    if (region_->claim(held.slot, number_)
            .compare_exchange_strong(mine.bits, mine.given_back().bits, std::memory_order_acq_rel)) {
      DSLINE_POINT("nack.before_flag");
      raise();
    }
  }

  /// The same for a message that nobody has seen: it counts as not delivered.
  void put_back(const Held& held, std::uint32_t me) noexcept {
    slots::Claim mine = slots::Claim::make(held.position, held.attempts, slots::Claim::holder(me));
    if (region_->claim(held.slot, number_)
            .compare_exchange_strong(mine.bits, mine.with(held.attempts, slots::Claim::kRedeliver).bits,
                                     std::memory_order_acq_rel)) {
      raise();
    }
  }

  /// Who had the message of slot `s` last. Requires: the caller holds it, or recovers its holder.
  void note_holder(std::uint32_t s, std::uint32_t pid, std::uint32_t how) noexcept {
    region_->notes(s, number_).last_holder.store(std::uint64_t{pid} << 32 | how, std::memory_order_relaxed);
  }

  /// Tells the members to scan for messages that were given back.
  void raise() noexcept {
    base::Atomic<std::uint64_t>& flag = state().redeliver;
    std::uint64_t seen = flag.load(std::memory_order_acquire);
    while (!flag.compare_exchange_weak(seen, ((seen >> 1) + 1) << 1 | 1, std::memory_order_seq_cst)) {
    }
    DSLINE_POINT("redeliver.before_wake");
    base::fence_seq_cst_after_rmw();
    messages_.wake_one_if_anyone();
  }

  /// Offers what lies behind the cursor and was never claimed, as if it had been put back: a cursor that was moved by
  /// somebody who had stood still since the number belonged to another group, or that was damaged, has passed it.
  void offer_what_was_passed() noexcept {
    const std::uint64_t tail = order_.tail_guess();
    std::uint64_t cursor = state().cursor.load(std::memory_order_acquire);
    const std::int64_t cells = region_->geometry().order_cells;
    if (slots::distance(cursor & slots::kPositionMask, tail) > cells) advance(cursor, tail);
    bool any = false;
    for (std::uint32_t s = 0; s < region_->geometry().slots; ++s) {
      slots::Claim found = claim(s);
      const slots::SlotWord word{region_->slot(s).word.load(std::memory_order_acquire)};
      if (!word.is(slots::SlotPhase::Committed) || (word.pending() & bit()) == 0 || word.is_entering() ||
          found.who() != slots::Claim::kNobody || found.position_low() == slots::kNoPositionLow ||
          slots::distance(found.position_low(), cursor) >= 0)
        continue;
      const slots::Claim offered = found.with(0, slots::Claim::kRedeliver);
      any = region_->claim(s, number_)
                .compare_exchange_strong(found.bits, offered.bits, std::memory_order_acq_rel) ||
            any;
    }
    if (any) raise();
  }

  /// Messages that wait to be taken; exact while nobody sends or receives.
  std::uint64_t depth() const noexcept {
    std::uint64_t waiting = 0;
    std::uint64_t p = state().cursor.load(std::memory_order_acquire);
    for (std::uint64_t i = 0; i < region_->geometry().order_cells; ++i, p = slots::next_position(p)) {
      const Cell c = order_.cell(p);
      if (c.ahead_of(p) < 0) break;
      waiting += c.ahead_of(p) == 0 && c.slot() < region_->geometry().slots && is_unclaimed(c.slot(), p);
    }
    if (!is_raised()) return waiting;
    for (std::uint32_t s = 0; s < region_->geometry().slots; ++s) {
      waiting += is_pending(s) && claim(s).who() == slots::Claim::kRedeliver;
    }
    return waiting;
  }

  slots::Claim claim(std::uint32_t s) const noexcept {
    return {region_->claim(s, number_).load(std::memory_order_acquire)};
  }

  /// True while the group has not finished with the message of slot `s`.
  bool is_pending(std::uint32_t s) const noexcept {
    const slots::SlotWord word{region_->slot(s).word.load(std::memory_order_acquire)};
    return word.is(slots::SlotPhase::Committed) && (word.pending() & bit()) != 0;
  }

 private:
  // A cache line takes as long to come from another core as some messages take to be received.
  static constexpr std::uint64_t kPrefetchDistance = 4;

  enum class Look { Empty, Message, Nothing, Again };
  struct Seen {
    Look what;
    std::uint32_t slot;
    std::uint64_t next;  // where the cursor goes from here
  };

  bool is_raised() const noexcept { return (state().redeliver.load(std::memory_order_acquire) & 1) != 0; }

  bool is_unclaimed(std::uint32_t s, std::uint64_t position) const noexcept {
    return is_pending(s) && claim(s) == slots::Claim::make(position, 0, slots::Claim::kNobody);
  }

  // T1: what is at position `p`, which was loaded from the cursor?
  Seen look_at(std::uint64_t p) const noexcept {
    const Cell c = order_.cell(p);
    const std::int64_t ahead = c.ahead_of(p);
    if (ahead < 0) return {Look::Empty, 0, p};
    if (ahead == 0 && c.slot() < region_->geometry().slots) [[likely]]
      return {Look::Message, c.slot(), slots::next_position(p)};
    if (state().cursor.load(std::memory_order_acquire) != p) return {Look::Again, 0, p};
    return look_by_claims(p);
  }

  // The cell does not say: it is damaged, or the cursor is, or the group was made while a lap went by. The first message
  // at or behind `p` that the group needs is found by its claim, and the cursor goes there; never beyond the tail that
  // was loaded before, behind which messages enter. A message that is still entering does not have its final claim yet, so
  // it is waited for.
  Seen look_by_claims(std::uint64_t p) const noexcept {
    const std::uint64_t tail = order_.tail_guess();
    Seen seen{Look::Nothing, 0, tail};
    if (slots::distance(tail & slots::kPositionMask, p) < 0) seen.next = p;
    bool is_entering = false;
    for (std::uint32_t s = 0; s < region_->geometry().slots; ++s) {
      const slots::SlotWord word{region_->slot(s).word.load(std::memory_order_acquire)};
      if (!word.is(slots::SlotPhase::Committed) || (word.pending() & bit()) == 0) continue;
      const slots::Claim found = claim(s);
      const std::int64_t before_next = slots::distance(found.position_low(), seen.next);
      if (found.who() != slots::Claim::kNobody || found.position_low() == slots::kNoPositionLow ||
          slots::distance(found.position_low(), p) < 0 || before_next > 0 ||
          (before_next == 0 && seen.next != p))
        continue;
      seen.next += static_cast<std::uint64_t>(before_next);
      seen.slot = s;
      is_entering = word.is_entering();
      if (seen.next == p && !is_entering) return {Look::Message, s, slots::next_position(p)};
    }
    if (seen.next == p) seen.what = Look::Empty;
    return seen;
  }

  // T1 and T2.
  bool take_at_cursor(std::uint32_t who, Held& held) noexcept {
    memory::GroupState& group = state();
    for (;;) {
      const std::uint64_t p = group.cursor.load(std::memory_order_acquire);
      const Seen seen = look_at(p);
      if (seen.what == Look::Empty) return false;
      if (seen.what == Look::Again) continue;
      const bool won = seen.what == Look::Message && claim_at(seen.slot, p, who);
      if (won) DSLINE_POINT("take.claimed");
      advance(p, seen.next);
      if (won) {
        DSLINE_POINT("take.advanced");
        prefetch_ahead(p + kPrefetchDistance);
        held = Held{seen.slot, p, 0};
        return true;
      }
    }
  }

  bool claim_open_at(std::uint32_t s, std::uint64_t position, std::uint32_t who, Held& held) noexcept {
    if (!is_pending(s)) return false;
    // As in claim_at(): it is the message that the claim speaks of.
    if (region_->slot(s).position.load(std::memory_order_acquire) != position) return false;
    slots::Claim found = claim(s);
    const std::uint32_t attempts = found.attempts();
    if (found.position_low() != (position & slots::kPositionMask) ||
        (found.who() != slots::Claim::kNobody && found.who() != slots::Claim::kRedeliver))
      return false;
    // SYNC claim: as in claim_at(). A claim with this position is of this message for as long as there are positions.
    if (!region_->claim(s, number_)
             .compare_exchange_strong(found.bits, found.with(attempts, who).bits, std::memory_order_acq_rel))
      return false;
    note_time(s);
    advance(position, slots::next_position(position));
    held = Held{s, position, attempts};
    return true;
  }

  bool claim_at(std::uint32_t s, std::uint64_t position, std::uint32_t who) noexcept {
    if (!is_pending(s)) return false;
    // After the word: a late joiner may have left the claim of an earlier message of this slot behind (offer_old()), and
    // until its sender has entered it the message that is there now carries that claim.
    if (region_->slot(s).position.load(std::memory_order_acquire) != position) return false;
    slots::Claim unclaimed = slots::Claim::make(position, 0, slots::Claim::kNobody);
    DSLINE_POINT("take.before_claim");
    // SYNC claim: pairs with enter() (position and frame) and with recovery's hand-over.
    if (!region_->claim(s, number_)
             .compare_exchange_strong(unclaimed.bits, unclaimed.with(0, who).bits, std::memory_order_acq_rel))
      return false;
    note_time(s);
    return true;
  }

  void note_time(std::uint32_t s) noexcept {
    region_->notes(s, number_)
        .taken_ns.store(static_cast<std::uint64_t>(base::coarse_ns()), std::memory_order_relaxed);
  }

  void prefetch_ahead(std::uint64_t position) const noexcept {
    Cell c = order_.cell(position);
    if (c.ahead_of(position) != 0 || c.slot() >= region_->geometry().slots) return;
    __builtin_prefetch(&region_->slot(c.slot()), 1);
    const std::byte* frame = region_->read_frame(c.slot());
    __builtin_prefetch(frame);
    __builtin_prefetch(frame + base::kCacheLine);
  }

  void advance(std::uint64_t position, std::uint64_t next) noexcept {
    state().cursor.compare_exchange_strong(position, next, std::memory_order_relaxed);
  }

  // T0: the oldest message that was given back.
  bool take_given_back(std::uint32_t who, Held& held) noexcept {
    base::Atomic<std::uint64_t>& flag = state().redeliver;
    for (;;) {
      std::uint64_t loaded = flag.load(std::memory_order_seq_cst);
      if ((loaded & 1) == 0) return false;
      std::uint32_t oldest = region_->geometry().slots;
      std::uint64_t oldest_position = 0;
      slots::Claim oldest_claim{};
      for (std::uint32_t s = 0; s < region_->geometry().slots; ++s) {
        if (!is_pending(s)) continue;
        const slots::Claim found = claim(s);
        if (found.who() != slots::Claim::kRedeliver) continue;
        std::uint64_t position = region_->slot(s).position.load(std::memory_order_relaxed);
        if (oldest == region_->geometry().slots || position < oldest_position) {
          oldest = s;
          oldest_position = position;
          oldest_claim = found;
        }
      }
      if (oldest == region_->geometry().slots) {
        DSLINE_POINT("redeliver.before_lowering");
        flag.compare_exchange_strong(loaded, loaded & ~std::uint64_t{1}, std::memory_order_acq_rel);
        return false;
      }
      slots::Claim wanted = oldest_claim;
      DSLINE_POINT("redeliver.before_claim");
      if (region_->claim(oldest, number_)
              .compare_exchange_strong(wanted.bits, oldest_claim.with(oldest_claim.attempts(), who).bits,
                                       std::memory_order_acq_rel)) {
        DSLINE_POINT("redeliver.claimed");
        note_time(oldest);
        held = Held{oldest, oldest_position, oldest_claim.attempts()};
        return true;
      }
    }
  }

  memory::Region* region_;
  OrderRing order_;
  std::uint32_t number_;
  waiting::WaitPoint messages_;
};

}  // namespace dsline::order
