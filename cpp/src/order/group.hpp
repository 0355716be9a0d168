#pragma once

#include <cstdint>

#include "memory/region.hpp"
#include "order/cell.hpp"
#include "order/order_ring.hpp"
#include "slots/claim.hpp"
#include "slots/slot_word.hpp"
#include "waiting/wait_point.hpp"

namespace dsline::order {

/// A message that a member holds for its group.
struct Held {
  std::uint32_t slot;
  std::uint64_t position;
  std::uint32_t attempts;  ///< deliveries before this one
};

/// One subscriber group: its members compete for messages, in the order of positions.
///
/// Threads: any number of members, of any processes.
/// Invariants: 1. Who wins the compare-and-swap on the claim holds the message; a claim goes from nobody or kRedeliver
///   to one holder at a time. 2. No message before the cursor is unclaimed. 3. A message that was given back
///   is found by scanning as long as the redeliver flag is raised; it is lowered only from the value that was
///   loaded before a scan that found nothing.
/// Death: a dead member's claims carry its number, and recovery gives them back.
class Group {
 public:
  Group(memory::Region& region, std::uint32_t number) noexcept
      : region_(&region),
        order_(region),
        number_(number),
        messages_(region.group(number).messages, region.geometry().participants) {}

  std::uint32_t bit() const noexcept { return 1u << number_; }
  waiting::WaitPoint& messages() noexcept { return messages_; }
  memory::GroupState& state() const noexcept { return region_->group(number_); }

  /// False when try_take() would surely have found nothing a moment ago.
  bool anything_waiting() const noexcept {
    if (is_raised()) return true;
    std::uint64_t p = state().cursor.load(std::memory_order_acquire);
    return order_.cell(p).ahead_of(p) >= 0;
  }

  /// T0 to T2: takes the next message for participant `me`. False when there is none.
  bool try_take(std::uint32_t me, Held& held) noexcept {
    if (is_raised()) [[unlikely]] {
      if (take_given_back(me, held)) return true;
    }
    memory::GroupState& group = state();
    for (;;) {
      std::uint64_t p = group.cursor.load(std::memory_order_acquire);
      Cell c = order_.cell(p);
      std::int64_t ahead = c.ahead_of(p);
      if (ahead < 0) return false;
      if (ahead > 0 || c.slot() >= region_->geometry().slots) {
        // Lapped: nobody needed it. Or a damaged cell, which no group can use. Everything before the cell's lap has
        // been overwritten, so a cursor that is far behind catches up in one step.
        advance(p, ahead);
        continue;
      }
      const std::uint32_t s = c.slot();
      const bool won = claim_at(s, p, me);
      advance(p, 0);
      if (won) {
        prefetch_ahead(p + kPrefetchDistance);
        held = Held{s, p, 0};
        return true;
      }
    }
  }

  /// Gives a held message back to the group, as if its holder had died.
  void give_back(const Held& held, std::uint32_t me) noexcept {
    slots::Claim mine = slots::Claim::make(held.position, held.attempts, slots::Claim::holder(me));
    if (region_->claim(held.slot, number_)
            .compare_exchange_strong(mine.bits, mine.given_back().bits, std::memory_order_acq_rel)) {
      raise();
    }
  }

  /// Tells the members to scan for messages that were given back.
  void raise() noexcept {
    base::Atomic<std::uint64_t>& flag = state().redeliver;
    std::uint64_t seen = flag.load(std::memory_order_acquire);
    while (!flag.compare_exchange_weak(seen, ((seen >> 1) + 1) << 1 | 1, std::memory_order_seq_cst)) {
    }
    base::fence_seq_cst_after_rmw();
    messages_.wake_one_if_anyone();
  }

  /// Messages that wait to be taken; exact while nobody sends or receives.
  std::uint64_t depth() const noexcept {
    std::uint64_t waiting = 0;
    const std::uint64_t cells = region_->geometry().order_cells;
    for (std::uint64_t p = state().cursor.load(std::memory_order_acquire);
         waiting < cells && order_.cell(p).ahead_of(p) >= 0; p = slots::next_position(p)) {
      ++waiting;
    }
    if (!is_raised()) return waiting;
    for (std::uint32_t s = 0; s < region_->geometry().slots; ++s) {
      slots::SlotWord word{region_->slot(s).word.load(std::memory_order_acquire)};
      slots::Claim claim{region_->claim(s, number_).load(std::memory_order_acquire)};
      waiting += word.is(slots::SlotPhase::Committed) && (word.pending() & bit()) != 0 &&
                 claim.who() == slots::Claim::kRedeliver;
    }
    return waiting;
  }

 private:
  // A cache line takes as long to come from another core as some messages take to be received.
  static constexpr std::uint64_t kPrefetchDistance = 4;

  bool is_raised() const noexcept { return (state().redeliver.load(std::memory_order_acquire) & 1) != 0; }

  bool claim_at(std::uint32_t s, std::uint64_t position, std::uint32_t me) noexcept {
    slots::SlotWord word{region_->slot(s).word.load(std::memory_order_acquire)};
    if (!word.is(slots::SlotPhase::Committed) || (word.pending() & bit()) == 0) return false;
    slots::Claim unclaimed = slots::Claim::make(position, 0, slots::Claim::kNobody);
    // SYNC claim: pairs with enter() (position and frame) and with recovery's hand-over.
    return region_->claim(s, number_)
        .compare_exchange_strong(unclaimed.bits, unclaimed.with(0, slots::Claim::holder(me)).bits,
                                 std::memory_order_acq_rel);
  }

  void prefetch_ahead(std::uint64_t position) const noexcept {
    Cell c = order_.cell(position);
    if (c.ahead_of(position) != 0 || c.slot() >= region_->geometry().slots) return;
    __builtin_prefetch(&region_->slot(c.slot()), 1);
    const std::byte* frame = region_->read_frame(c.slot());
    __builtin_prefetch(frame);
    __builtin_prefetch(frame + base::kCacheLine);
  }

  void advance(std::uint64_t position, std::int64_t ahead) noexcept {
    const std::int64_t overwritten = ahead - static_cast<std::int64_t>(region_->geometry().order_cells);
    const std::uint64_t skipped = overwritten > 0 ? static_cast<std::uint64_t>(overwritten) : 0;
    state().cursor.compare_exchange_strong(position, slots::next_position(position + skipped),
                                           std::memory_order_relaxed);
  }

  // T0: the oldest message that was given back.
  bool take_given_back(std::uint32_t me, Held& held) noexcept {
    base::Atomic<std::uint64_t>& flag = state().redeliver;
    for (;;) {
      std::uint64_t loaded = flag.load(std::memory_order_seq_cst);
      if ((loaded & 1) == 0) return false;
      std::uint32_t oldest = region_->geometry().slots;
      std::uint64_t oldest_position = 0;
      slots::Claim oldest_claim{};
      for (std::uint32_t s = 0; s < region_->geometry().slots; ++s) {
        slots::SlotWord word{region_->slot(s).word.load(std::memory_order_acquire)};
        if (!word.is(slots::SlotPhase::Committed) || (word.pending() & bit()) == 0) continue;
        slots::Claim claim{region_->claim(s, number_).load(std::memory_order_acquire)};
        if (claim.who() != slots::Claim::kRedeliver) continue;
        std::uint64_t position = region_->slot(s).position.load(std::memory_order_relaxed);
        if (oldest == region_->geometry().slots || position < oldest_position) {
          oldest = s;
          oldest_position = position;
          oldest_claim = claim;
        }
      }
      if (oldest == region_->geometry().slots) {
        flag.compare_exchange_strong(loaded, loaded & ~std::uint64_t{1}, std::memory_order_acq_rel);
        return false;
      }
      slots::Claim wanted = oldest_claim;
      if (region_->claim(oldest, number_)
              .compare_exchange_strong(
                  wanted.bits, oldest_claim.with(oldest_claim.attempts(), slots::Claim::holder(me)).bits,
                  std::memory_order_acq_rel)) {
        held = Held{oldest, oldest_position, oldest_claim.attempts()};
        state().redelivered.fetch_add(1, std::memory_order_relaxed);
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
