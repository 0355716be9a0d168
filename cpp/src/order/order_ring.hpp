#pragma once

#include <algorithm>
#include <cstdint>

#include "base/points.hpp"
#include "memory/region.hpp"
#include "order/cell.hpp"
#include "slots/claim.hpp"

namespace dsline::order {

/// The order of the messages: a ring of cells that carry slot numbers, never payload.
///
/// Threads: any number of producers, of any processes.
/// Invariants: 1. A message enters by one compare-and-swap on one cell, and only a COMMITTED slot with ENQ is
///   entered, by its publisher or by the one that holds its dead publisher's lock. 2. The ring has at least
///   kCellsPerSlot times as many cells as there are slots, so a cell that some group still needs is never overwritten.
///   3. The tail is never beyond the true tail; a producer walks from it to the true one. 4. From a tail that has not
///   changed since it was loaded, a walk meets no cell of a later lap: whoever entered behind it and has not moved it
///   still keeps its slot (ENQ is cleared after the tail has moved, by recovery too), and there are fewer slots than cells.
/// Death: before the cell's CAS the message is not in the order and position and claims say so (protocol V2–V4);
///   behind it the message is delivered, only the hint and a wake-up may be missing.
class OrderRing {
 public:
  explicit OrderRing(memory::Region& region) noexcept : region_(&region) {}

  static void initialise(memory::Region& region, std::uint64_t first_position) noexcept {
    const std::uint64_t cells = region.geometry().order_cells;
    for (std::uint64_t k = 0; k < cells; ++k) {
      // One lap before the position that the cell will hold first.
      region.cell(first_position + k)
          .store(Cell::make(first_position + k - cells, 0).bits, std::memory_order_relaxed);
    }
    region.order().tail.store(first_position, std::memory_order_relaxed);
  }

  Cell cell(std::uint64_t position) const noexcept {
    // SYNC cell: acquire pairs with the CAS in enter(); makes word, position and claims of the slot visible.
    return {region_->cell(position).load(std::memory_order_acquire)};
  }

  std::uint64_t tail_guess() const noexcept { return region_->order().tail.load(std::memory_order_acquire); }

  /// The position that the next message will get; exact while nobody enters one. All messages before it are visible.
  std::uint64_t end() const noexcept {
    const std::uint64_t cells = region_->geometry().order_cells;
    for (;;) {
      const std::uint64_t hint = tail_guess();
      std::uint64_t t = hint;
      for (std::uint64_t i = 0; i < cells && cell(t).ahead_of(t) == 0; ++i) t = slots::next_position(t);
      if (cell(t).ahead_of(t) < 0 || tail_guess() == hint)
        return t;  // else lapped while this process stood still
    }
  }

  struct Entered {
    std::uint64_t position;
    std::uint64_t hint;  ///< the tail that the walk started from
  };

  /// P2: enters slot `s` for `groups` at the next free position.
  /// Requires: `s` is COMMITTED with ENQ, and the caller is its publisher or acts for it under its lock.
  Entered enter(std::uint32_t s, std::uint32_t groups) noexcept {
    std::uint64_t hint = tail_guess();
    std::uint64_t t = hint;
    int jumps_left = kMostJumps;
    for (;;) {
      Cell seen = cell(t);
      const std::int64_t ahead = seen.ahead_of(t);
      if (ahead == 0) {  // taken; walking makes a stale hint harmless
        t = slots::next_position(t);
        continue;
      }
      if (ahead > 0) [[unlikely]] {
        const std::uint64_t now = tail_guess();
        if (now != hint) {  // lapped while this process stood still
          hint = t = now;
          continue;
        }
        // Invariant 4: something is damaged. The tail, if a cell beside this one is of the same later lap: cells are taken
        // in order, so all but the last lap before a taken one are taken. Else this cell, which is mended by overwriting.
        const bool same_lap = cell(t - 1).ahead_of(t - 1) == ahead || cell(t + 1).ahead_of(t + 1) == ahead;
        if (same_lap && jumps_left-- > 0) {
          const std::int64_t cells = region_->geometry().order_cells;
          t = slots::next_position(t + static_cast<std::uint64_t>(std::max<std::int64_t>(ahead - cells, 0)));
          continue;
        }
      }
      DSLINE_POINT("enter.before_claims");
      // Ordered by the CAS below. A death after these stores leaves position t in a slot that is not in cell t.
      region_->slot(s).position.store(t, std::memory_order_relaxed);
      for (std::uint32_t left = groups; left != 0; left &= left - 1) {
        std::uint32_t g = static_cast<std::uint32_t>(__builtin_ctz(left));
        region_->claim(s, g).store(slots::Claim::make(t, 0, slots::Claim::kNobody).bits,
                                   std::memory_order_relaxed);
      }
      DSLINE_POINT("enter.before_cell");
      // SYNC cell: release half pairs with cell(); sequentially consistent with a waiter's last look.
      if (region_->cell(t).compare_exchange_strong(seen.bits, Cell::make(t, s).bits,
                                                   std::memory_order_seq_cst)) {
        return {t, hint};
      }
    }
  }

  /// P3, before ENQ is cleared: moves the hint from the value that enter() started from; never from t to t + 1, since then
  /// one death would freeze it.
  void advance_tail(Entered entered) noexcept {
    region_->order().tail.compare_exchange_strong(entered.hint, slots::next_position(entered.position),
                                                  std::memory_order_release, std::memory_order_relaxed);
  }

  /// The same for a message that its dead publisher had entered at `position`.
  void advance_tail_past(std::uint64_t position) noexcept {
    std::uint64_t hint = tail_guess();
    if (slots::distance(position & slots::kPositionMask, hint) >= 0) advance_tail({position, hint});
  }

 private:
  // After a damaged tail one jump and at most a lap of steps lead to the true one; words that keep changing end it, too.
  static constexpr int kMostJumps = 64;

  memory::Region* region_;
};

}  // namespace dsline::order
