#pragma once

#include <algorithm>
#include <cstdint>

#include "base/points.hpp"
#include "memory/region.hpp"
#include "order/group.hpp"
#include "slots/claim.hpp"
#include "slots/slot_pool.hpp"

namespace dsline::delivery {

/// Messages that were delivered as often as the channel allows. They stay in their slots, pending for their group with
/// the claim kDead, until somebody takes them as dead letters. At most so many as the channel's rules say, and at most
/// half of its slots: the oldest goes for a newer one.
///
/// Threads: any number, of any processes; every step is one compare-and-swap on the claim.
/// Death: whoever dies with a message that was delivered often enough, about to bury it or reading the letter, leaves a
///   dead letter.
class DeadLetters {
 public:
  DeadLetters(memory::Region& region, slots::SlotPool& pool) noexcept : region_(&region), pool_(&pool) {}

  /// Takes the next message of `group` that may still be delivered; buries what may not.
  bool try_take(order::Group& group, std::uint32_t me, order::Held& held) noexcept {
    while (group.try_take(me, held)) {
      if (held.attempts < region_->rules().max_deliveries) [[likely]] {
        if (held.attempts != 0) group.state().redelivered.fetch_add(1, std::memory_order_relaxed);
        return true;
      }
      bury(group, held, me);
    }
    return false;
  }

  /// Requires: `me` holds it.
  void bury(order::Group& group, const order::Held& held, std::uint32_t me) noexcept {
    slots::Claim mine = slots::Claim::make(held.position, held.attempts, slots::Claim::holder(me));
    DSLINE_POINT("bury.before_claim");
    if (!region_->claim(held.slot, group.number())
             .compare_exchange_strong(mine.bits, mine.with(held.attempts, slots::Claim::kDead).bits,
                                      std::memory_order_acq_rel))
      return;
    DSLINE_POINT("bury.claimed");
    region_->header().buried.fetch_add(1, std::memory_order_relaxed);
    while (count() > most()) {
      Found oldest{};
      if (!find_oldest(oldest, false)) return;
      if (!try_claim(oldest, slots::Claim::discarder(me))) continue;
      DSLINE_POINT("bury.dropping");
      pool_->clear_pending(oldest.slot, 1u << oldest.group);
      region_->header().letters_dropped.fetch_add(1, std::memory_order_relaxed);
    }
  }

  /// Takes the oldest dead letter of any group; `group` is its number.
  bool try_take_letter(std::uint32_t me, order::Held& held, std::uint32_t& group) noexcept {
    Found oldest{};
    while (find_oldest(oldest, true)) {
      if (!try_claim(oldest, slots::Claim::holder(me))) continue;
      DSLINE_POINT("letter.claimed");
      held = order::Held{oldest.slot, oldest.position, oldest.claim.attempts()};
      group = oldest.group;
      return true;
    }
    return false;
  }

  /// Makes what `me` took as a letter one again.
  void put_back(order::Group& group, const order::Held& held, std::uint32_t me) noexcept {
    slots::Claim mine = slots::Claim::make(held.position, held.attempts, slots::Claim::holder(me));
    region_->claim(held.slot, group.number())
        .compare_exchange_strong(mine.bits, mine.with(held.attempts, slots::Claim::kDead).bits,
                                 std::memory_order_acq_rel);
  }

  /// Gives a letter that `me` holds to its group again, as a message that was delivered once.
  void revive(order::Group& group, const order::Held& held, std::uint32_t me) noexcept {
    slots::Claim mine = slots::Claim::make(held.position, held.attempts, slots::Claim::holder(me));
    const std::uint32_t attempts = std::min(1u, region_->rules().max_deliveries - 1);
    if (region_->claim(held.slot, group.number())
            .compare_exchange_strong(mine.bits, mine.with(attempts, slots::Claim::kRedeliver).bits,
                                     std::memory_order_acq_rel)) {
      DSLINE_POINT("letter.before_flag");
      group.raise();
    }
  }

  std::uint32_t count() const noexcept {
    std::uint32_t letters = 0;
    for_each([&](std::uint32_t, std::uint32_t, slots::Claim claim) {
      letters += claim.who() == slots::Claim::kDead;
    });
    return letters;
  }

 private:
  struct Found {
    std::uint32_t slot;
    std::uint32_t group;
    std::uint64_t position;
    slots::Claim claim;
  };

  std::uint32_t most() const noexcept {
    return std::min(region_->rules().dead_letters, region_->geometry().slots / 2);
  }

  bool try_claim(const Found& found, std::uint32_t who) noexcept {
    slots::Claim seen = found.claim;
    return region_->claim(found.slot, found.group)
        .compare_exchange_strong(seen.bits, found.claim.with(found.claim.attempts(), who).bits,
                                 std::memory_order_acq_rel);
  }

  // `given_back`: also what its reader gave back or died with, and nobody has buried again.
  bool find_oldest(Found& oldest, bool given_back) const noexcept {
    bool found = false;
    for_each([&](std::uint32_t s, std::uint32_t g, slots::Claim claim) {
      const bool is_letter =
          claim.who() == slots::Claim::kDead || (given_back && claim.who() == slots::Claim::kRedeliver &&
                                                 claim.attempts() >= region_->rules().max_deliveries);
      const std::uint64_t position = region_->slot(s).position.load(std::memory_order_relaxed);
      if (!is_letter || (found && position >= oldest.position)) return;
      oldest = Found{s, g, position, claim};
      found = true;
    });
    return found;
  }

  template <class Visit>
  void for_each(Visit&& visit) const noexcept {
    const memory::Geometry& geometry = region_->geometry();
    for (std::uint32_t s = 0; s < geometry.slots; ++s) {
      const slots::SlotWord word = pool_->word(s);
      if (!word.is(slots::SlotPhase::Committed)) continue;
      for (std::uint32_t g = 0; g < geometry.groups; ++g) {
        if ((word.pending() >> g & 1) == 0) continue;
        visit(s, g, slots::Claim{region_->claim(s, g).load(std::memory_order_acquire)});
      }
    }
  }

  memory::Region* region_;
  slots::SlotPool* pool_;
};

}  // namespace dsline::delivery
