#pragma once

#include <bit>
#include <cstdint>

#include "base/points.hpp"
#include "memory/region.hpp"
#include "order/group.hpp"
#include "order/order_ring.hpp"
#include "slots/slot_pool.hpp"

namespace dsline::delivery {

/// What a sender does with slots and order together: publish (P1 to P4), make room, keep the history short.
///
/// Threads: any number, of any processes.
/// Death: between P1 and P2b the slot has ENQ and its owner's number, and recovery goes on from there; with KEPT it only
///   clears ENQ. A message that was
///   taken to be discarded carries the claim kDiscard with its taker's number, and recovery releases it. A history that
///   is too long is cut by the next sender.
class Publication {
 public:
  Publication(memory::Region& region, slots::SlotPool& pool) noexcept
      : region_(&region), pool_(&pool), ring_(region) {}

  /// P1 to P4 for the slot that `me` wrote. `groups` is what `active` held after the slot was taken. False when the slot
  /// has been taken away. `keep`: the slot is not free before end_keeping(), whoever is done with the message.
  /// `entered_at` becomes its position; it stays as it is where no group is there for the message.
  bool publish(std::uint32_t s, slots::SlotWord word, std::uint32_t groups, std::uint32_t me,
               bool keep = false, std::uint64_t* entered_at = nullptr) noexcept {
    DSLINE_POINT("publish.before_commit");
    if (!pool_->commit(s, word, groups, keep)) [[unlikely]]
      return false;
    DSLINE_POINT("publish.committed");
    if (groups == 0) [[unlikely]] {
      region_->header().unheard.fetch_add(1, std::memory_order_relaxed);
      if (keep) pool_->keep(s);
      return true;
    }
    const std::uint64_t position = enter(s, groups, keep);
    if (entered_at != nullptr) *entered_at = position;
    if (region_->keeps_history()) [[unlikely]] {
      DSLINE_POINT("history.before_cut");
      trim_history(position, me);
    }
    return true;
  }

  /// P2 to P4: enters a committed slot; its position.
  /// Requires: the caller is its publisher, or acts for it under its lock.
  std::uint64_t enter(std::uint32_t s, std::uint32_t groups, bool keep = false) noexcept {
    order::OrderRing::Entered entered = ring_.enter(s, groups);
    DSLINE_POINT("publish.entered");
    ring_.advance_tail(entered);
    DSLINE_POINT("publish.tail_moved");
    if (keep) {
      pool_->keep(s);
      DSLINE_POINT("publish.kept");
    } else {
      pool_->clear_pending(s, slots::kEnqueueing);
    }
    DSLINE_POINT("publish.before_wake");
    base::fence_seq_cst_after_rmw();
    wake(groups);
    return entered.position;
  }

  /// A slot that is not published after all while its owner still looks at it: kept, as if nobody had been there to hear
  /// it. False when the slot has been taken away. Death: between the two steps it has ENQ and no group, which recovery clears.
  bool withhold(std::uint32_t s, slots::SlotWord word) noexcept {
    if (!pool_->commit(s, word, 0, true)) return false;
    pool_->keep(s);
    return true;
  }

  /// The publisher of `word` no longer looks at the payload. Does nothing for a later message of the slot.
  void end_keeping(std::uint32_t s, slots::SlotWord word) noexcept {
    DSLINE_POINT("keep.before_end");
    pool_->clear_pending_of(s, word, slots::kEnqueueing);
  }

  /// DROP_OLDEST: takes the oldest message that some group has not claimed, for every group that has not, and releases
  /// it. True when something may have become free; false when everything is held.
  bool drop_oldest(std::uint32_t me) noexcept {
    const std::uint32_t active = listening();
    std::uint32_t slot = 0;
    std::uint64_t oldest = 0;
    bool found = false;
    for_each(active, [&](order::Group group) {
      std::uint64_t position = 0;
      std::uint32_t s = 0;
      if (!(is_joining(group) ? group.find_unclaimed(position, s) : group.next_unclaimed(position, s)))
        return false;
      if (!found || slots::distance(position & slots::kPositionMask, oldest) < 0) {
        oldest = position;
        slot = s;
        found = true;
      }
      return false;
    });
    if (found) {
      for_each(active, [&](order::Group group) {
        if (group.try_discard_at(slot, oldest, me, !is_joining(group))) finish_drop(group, slot);
        return false;
      });
      return true;
    }
    return for_each(active, [&](order::Group group) {
      order::Held held{};
      if (is_joining(group) || !group.try_discard(me, held)) return false;
      finish_drop(group, held.slot);
      return true;
    });
  }

  /// Releases the oldest message of the history: false when there is none.
  bool drop_history(std::uint32_t me) noexcept {
    if (!region_->keeps_history()) return false;
    order::Group retention(*region_, region_->retention_group());
    order::Held held{};
    if (!retention.try_discard(me, held)) return false;
    DSLINE_POINT("history.claimed");
    pool_->clear_pending(held.slot, retention.bit());
    return true;
  }

  void wake(std::uint32_t groups) noexcept {
    for_each(groups, [&](order::Group group) {
      // Whoever waits at the history only looks, so one of them does not stand for the others.
      if (region_->keeps_history() && group.number() == region_->retention_group()) {
        if (group.messages().anyone()) group.messages().wake_all();
      } else {
        group.messages().wake_one_if_anyone();
      }
      return false;
    });
  }

 private:
  // Groups whose messages DROP_OLDEST may take.
  std::uint32_t listening() const noexcept {
    const std::uint64_t active = region_->header().active.load(std::memory_order_acquire);
    std::uint32_t groups = static_cast<std::uint32_t>(active) & region_->group_bits();
    if (region_->keeps_history()) groups &= ~(1u << region_->retention_group());
    return groups;
  }

  // SYNC joining: pairs with the release when its first member is done with the messages that were there before it. Until
  // then it may still add one where there was none, so nobody else moves the group's cursor over such a place.
  bool is_joining(const order::Group& group) const noexcept {
    return (group.state().state.load(std::memory_order_acquire) & memory::kGroupJoining) != 0;
  }

  template <class Step>
  bool for_each(std::uint32_t groups, Step&& step) noexcept {
    for (std::uint32_t left = groups; left != 0; left &= left - 1) {
      if (step(order::Group(*region_, static_cast<std::uint32_t>(std::countr_zero(left))))) return true;
    }
    return false;
  }

  void finish_drop(order::Group& group, std::uint32_t slot) noexcept {
    DSLINE_POINT("drop.claimed");
    pool_->clear_pending(slot, group.bit());
    DSLINE_POINT("drop.before_count");
    group.state().dropped_oldest.fetch_add(1, std::memory_order_relaxed);
  }

  // The retention group is active from the start and releases in order, so what it keeps are the positions from its
  // cursor to the tail.
  void trim_history(std::uint64_t position, std::uint32_t me) noexcept {
    const std::int64_t most = region_->rules().history;
    memory::GroupState& retention = region_->group(region_->retention_group());
    for (std::uint32_t i = 0; i < region_->geometry().slots; ++i) {
      const std::uint64_t cursor = retention.cursor.load(std::memory_order_acquire);
      if (slots::distance(position & slots::kPositionMask, cursor) < most || !drop_history(me)) return;
    }
  }

  memory::Region* region_;
  slots::SlotPool* pool_;
  order::OrderRing ring_;
};

}  // namespace dsline::delivery
