#pragma once

#include <bit>
#include <cstdint>

#include "base/points.hpp"
#include "memory/region.hpp"
#include "slots/claim.hpp"
#include "slots/slot_word.hpp"
#include "waiting/wait_point.hpp"

namespace dsline::slots {

inline constexpr std::uint32_t kNoSlot = ~std::uint32_t{0};
// Pools that are larger cannot be scanned whenever the map shows nothing, so their hints stay in the map.
inline constexpr std::uint32_t kMostSlotsForHints = 64;

/// Hints that one handle took out of the free map to use up by itself, so that producer and consumers do not fight for
/// the map's cache line with every message. Threads of the handle may lose each other's updates: a hint too many or
/// too few is harmless.
struct HintCache {
  base::Atomic<std::uint32_t> map_word{0};
  base::Atomic<std::uint64_t> bits{0};
};

/// The slots of a region as a pool: take a free one, commit it, release it. protocol.md names the steps (A1 …).
///
/// Threads: any number, of any processes; every step that decides is one compare-and-swap on the slot's word.
/// Invariants: 1. A WRITING slot is reached by its owner alone: it is in no cell of the order, and its word has no bit of
///   a group, without which nobody looks at a claim. 2. A slot becomes free by one atomic step, after its last reader
///   and its publisher are done with it. 3. The free map is a hint: a bit that is missing is found by scanning the
///   words, a bit too many costs a failed look.
/// Death: a slot in the hands of a dead participant carries its number (WRITING), or its number and ENQ
///   (COMMITTED), or its number in a claim, so recovery finds it by scanning.
class SlotPool {
 public:
  explicit SlotPool(memory::Region& region) noexcept
      : region_(&region),
        slots_(region.geometry().slots),
        group_bits_(region.group_bits()),
        hints_per_handle_(slots_ <= kMostSlotsForHints ? slots_ / 8 : 0),
        space_(region.header().space, region.geometry().participants) {}

  /// Makes every slot of a new region free.
  static void initialise(memory::Region& region) noexcept {
    const memory::Geometry& geometry = region.geometry();
    for (std::uint32_t s = 0; s < geometry.slots; ++s) {
      region.slot(s).word.store(SlotWord::make(0, kNoOwner, SlotPhase::Free, 0).bits,
                                std::memory_order_relaxed);
      region.slot(s).position.store(kNoPosition, std::memory_order_relaxed);
      for (std::uint32_t g = 0; g < geometry.groups; ++g) {
        region.claim(s, g).store(Claim::none().bits, std::memory_order_relaxed);
      }
      region.free_map(s / 64).fetch_or(map_bit(s), std::memory_order_relaxed);
    }
  }

  SlotWord word(std::uint32_t s) const noexcept {
    return {region_->slot(s).word.load(std::memory_order_acquire)};
  }

  /// A1, A2: takes a free slot, the lowest that the free map shows, so that a stream that keeps up goes through few
  /// slots that are still in cache. kNoSlot when the map shows none.
  std::uint32_t try_alloc(std::uint32_t me) noexcept {
    const std::uint32_t words = (slots_ + 63) / 64;
    for (std::uint32_t i = 0; i < words; ++i) {
      std::uint64_t bits = region_->free_map(i).load(std::memory_order_relaxed);
      while (bits != 0) {
        std::uint32_t s = i * 64 + static_cast<std::uint32_t>(std::countr_zero(bits));
        bits &= bits - 1;
        if (s >= slots_) {
          region_->free_map(i).fetch_and(~map_bit(s), std::memory_order_relaxed);
          continue;
        }
        if (try_alloc_at(s, me)) return s;
        drop_stale_hint(s);
      }
    }
    return kNoSlot;
  }

  /// A1, A2 by looking at every word: finds free slots whose hint was lost with a dead process, and quarantined ones.
  std::uint32_t try_alloc_by_scan(std::uint32_t me) noexcept {
    std::uint32_t quarantined = kNoSlot;
    for (std::uint32_t s = 0; s < slots_; ++s) {
      if (try_alloc_at(s, me)) return s;
      SlotWord seen = word(s);
      if (!is_possible(seen)) poison(s, seen);
      if (seen.is_quarantined()) quarantined = s;
    }
    if (quarantined != kNoSlot) {
      SlotWord seen = word(quarantined);
      if (seen.is_quarantined() && take_as_writer(quarantined, seen, me)) return quarantined;
    }
    return kNoSlot;
  }

  /// The same through the handle's own hints. What they hide from the map is found by others in try_alloc_by_scan().
  std::uint32_t try_alloc_cached(HintCache& cache, std::uint32_t me) noexcept {
    if (hints_per_handle_ == 0) return try_alloc(me);
    for (;;) {
      std::uint64_t bits = cache.bits.load(std::memory_order_relaxed);
      const std::uint32_t base = cache.map_word.load(std::memory_order_relaxed) * 64;
      while (bits != 0) {
        const std::uint32_t s = base + static_cast<std::uint32_t>(std::countr_zero(bits));
        bits &= bits - 1;
        // A hint for a slot in use is dropped: whoever frees the slot puts it back into the map.
        if (s < slots_ && try_take(s, me)) {
          cache.bits.store(bits, std::memory_order_relaxed);
          return s;
        }
      }
      cache.bits.store(0, std::memory_order_relaxed);
      if (!refill(cache)) return kNoSlot;
    }
  }

  /// Puts the hints back that the handle has not used.
  void return_hints(HintCache& cache) noexcept {
    std::uint64_t bits = cache.bits.exchange(0, std::memory_order_relaxed);
    const std::uint32_t i = cache.map_word.load(std::memory_order_relaxed);
    if (bits != 0) region_->free_map(i).fetch_or(bits, std::memory_order_seq_cst);
  }

  /// Puts back the hints that went with a dead process. One that a living handle keeps for itself is shown twice then,
  /// which costs a failed look.
  void restore_hints() noexcept {
    for (std::uint32_t s = 0; s < slots_; ++s) {
      if (!word(s).is_free()) continue;
      if ((region_->free_map(s / 64).load(std::memory_order_relaxed) & map_bit(s)) != 0) continue;
      region_->free_map(s / 64).fetch_or(map_bit(s), std::memory_order_seq_cst);
    }
  }

  /// As try_alloc(), for one slot that the caller would like best.
  bool try_alloc_at(std::uint32_t s, std::uint32_t me) noexcept {
    if (!try_take(s, me)) return false;
    region_->free_map(s / 64).fetch_and(~map_bit(s), std::memory_order_seq_cst);
    return true;
  }

  /// A1, A2 on one slot; its bit in the free map stays.
  bool try_take(std::uint32_t s, std::uint32_t me) noexcept {
    SlotWord seen = word(s);
    if (!seen.is_free()) return false;
    return take_as_writer(s, seen, me);
  }

  /// P1: from here the message will be delivered, whoever dies. Requires: `s` is WRITING and mine. `groups` is what
  /// `active` held after the slot was taken; 0 (nobody listens) frees the slot, unless its publisher keeps it.
  /// False when the word is no longer the one that alloc made: the slot has been taken away.
  bool commit(std::uint32_t s, SlotWord mine, std::uint32_t groups, bool keep = false) noexcept {
    std::uint32_t pending = groups == 0 && !keep ? 0 : groups | kEnqueueing;
    // What an earlier message left there must not pass for a claim on this one. Claims of other groups are nobody's to
    // look at. Only the owner touches these while the slot is WRITING; ordered by the compare-and-swap below.
    for (std::uint32_t left = groups; left != 0; left &= left - 1) {
      region_->claim(s, static_cast<std::uint32_t>(std::countr_zero(left)))
          .store(Claim::none().bits, std::memory_order_relaxed);
    }
    SlotWord committed = SlotWord::make(mine.generation(), mine.owner(), SlotPhase::Committed, pending);
    // SYNC word: pairs with the acquire loads of takers and recoverers; makes frame, position and claims visible. A
    // compare-and-swap, since a thread may come here after its process gave the slot back at its exit.
    if (!region_->slot(s).word.compare_exchange_strong(mine.bits, committed.bits, std::memory_order_acq_rel))
      return false;
    if (pending == 0) free(s);
    return true;
  }

  /// Instead of P2b: the slot stays the publisher's to look at until it clears ENQ. Requires: ENQ is the caller's.
  void keep(std::uint32_t s) noexcept {
    // SYNC word: release, so that whoever sees KEPT sees the message in the order.
    region_->slot(s).word.fetch_or(kKept, std::memory_order_acq_rel);
  }

  /// P2b and release: takes `bits` off the pending ones; whoever takes the last one frees the slot.
  /// Requires: the bits are the caller's to clear (its own ENQ, or a group whose claim it holds).
  void clear_pending(std::uint32_t s, std::uint32_t bits) noexcept {
    // SYNC word: release pairs with A1's acquire, so that every reader is done before the next writer starts.
    SlotWord before{region_->slot(s).word.fetch_and(~std::uint64_t{bits}, std::memory_order_acq_rel)};
    DSLINE_POINT("free.before_map");
    if (before.is(SlotPhase::Committed) && (before.pending() & bits) != 0 && (before.pending() & ~bits) == 0)
      free(s);
  }

  /// The same for the message that `seen` is the word of, and for no later one in this slot: a thread may come here after
  /// its process gave the message back at its exit.
  void clear_pending_of(std::uint32_t s, SlotWord seen, std::uint32_t bits) noexcept {
    const std::uint32_t generation = seen.generation();
    while (seen.generation() == generation && seen.is(SlotPhase::Committed) && (seen.pending() & bits) != 0) {
      const SlotWord without{seen.bits & ~std::uint64_t{bits}};
      // SYNC word: as in clear_pending().
      if (!region_->slot(s).word.compare_exchange_weak(seen.bits, without.bits, std::memory_order_acq_rel,
                                                       std::memory_order_acquire))
        continue;
      if (without.pending() == 0) free(s);
      return;
    }
  }

  /// The last release of a message whose frame failed its check: the slot is kept out of use while others are free.
  void clear_pending_corrupted(std::uint32_t s, std::uint32_t bits) noexcept {
    SlotWord seen = word(s);
    while (seen.is(SlotPhase::Committed) && (seen.pending() & ~bits) == 0) {
      SlotWord quarantined = SlotWord::make(seen.generation(), kNoOwner, SlotPhase::Corrupted, 0);
      if (region_->slot(s).word.compare_exchange_weak(seen.bits, quarantined.bits,
                                                      std::memory_order_acq_rel)) {
        base::fence_seq_cst();
        space_.wake_one_if_anyone();  // a waiter may reuse it
        return;
      }
    }
    clear_pending(s, bits);
  }

  /// Gives a WRITING slot back. False when the word is no longer `seen` (recovery: somebody else was faster).
  bool abort(std::uint32_t s, SlotWord seen) noexcept {
    SlotWord freed = SlotWord::make(seen.generation() + 1, kNoOwner, SlotPhase::Free, 0);
    if (!region_->slot(s).word.compare_exchange_strong(seen.bits, freed.bits, std::memory_order_acq_rel))
      return false;
    free(s);
    return true;
  }

  /// A control word that cannot be: never used again.
  void poison(std::uint32_t s, SlotWord seen) noexcept {
    SlotWord bad = SlotWord::make(seen.generation(), kNoOwner, SlotPhase::Corrupted, kPendingMask);
    if (region_->slot(s).word.compare_exchange_strong(seen.bits, bad.bits, std::memory_order_acq_rel)) {
      region_->header().corrupted.fetch_add(1, std::memory_order_relaxed);
    }
  }

  /// False for a word that no step of the protocol makes in this region.
  bool is_possible(SlotWord seen) const noexcept {
    return seen.is_possible() &&
           (!seen.is(SlotPhase::Committed) || (seen.pending() & kGroupBits & ~group_bits_) == 0);
  }

  bool anything_free() const noexcept {
    const std::uint32_t words = (slots_ + 63) / 64;
    for (std::uint32_t i = 0; i < words; ++i) {
      const std::uint64_t real = i + 1 < words || slots_ % 64 == 0 ? ~std::uint64_t{0} : map_bit(slots_) - 1;
      if ((region_->free_map(i).load(std::memory_order_relaxed) & real) != 0) return true;
    }
    return false;
  }

  /// Looks at the words themselves: hints may be missing from the map.
  bool anything_free_by_scan() const noexcept {
    for (std::uint32_t s = 0; s < slots_; ++s) {
      SlotWord seen = word(s);
      if (seen.is_free() || seen.is_quarantined()) return true;
    }
    return false;
  }

  /// True when the map shows a free slot that is one. Looks at the last one that the map shows, since senders take the
  /// first: the look leaves their cache line alone.
  bool shows_a_free_slot() const noexcept {
    for (std::uint32_t i = (slots_ + 63) / 64; i-- > 0;) {
      const std::uint64_t bits = region_->free_map(i).load(std::memory_order_relaxed);
      if (bits == 0) continue;
      const std::uint32_t s = i * 64 + 63 - static_cast<std::uint32_t>(std::countl_zero(bits));
      return s < slots_ && word(s).is_free();
    }
    return false;
  }

  /// True when a slot is left for a later message, whoever keeps what he holds now: one that is free, or is being
  /// written, or is kept by `retained` groups alone (their bits), which give way.
  bool anything_circulates(std::uint32_t retained) const noexcept {
    for (std::uint32_t s = 0; s < slots_; ++s) {
      const SlotWord seen = word(s);
      if (seen.is_free() || seen.is_quarantined() || seen.is(SlotPhase::Writing)) return true;
      if (seen.is(SlotPhase::Committed) && (seen.pending() & ~retained) == 0) return true;
    }
    return false;
  }

  waiting::WaitPoint& space() noexcept { return space_; }

 private:
  static std::uint64_t map_bit(std::uint32_t s) noexcept { return std::uint64_t{1} << (s % 64); }

  // free(s) of the protocol: every way of freeing a slot ends here.
  void free(std::uint32_t s) noexcept {
    // SYNC free: bit, full fence, load of the waiters; pairs with a waiter's bit, fence, look at the map.
    region_->free_map(s / 64).fetch_or(map_bit(s), std::memory_order_seq_cst);
    DSLINE_POINT("free.before_wake");
    base::fence_seq_cst_after_rmw();
    space_.wake_one_if_anyone();
  }

  bool take_as_writer(std::uint32_t s, SlotWord seen, std::uint32_t me) noexcept {
    SlotWord writing = SlotWord::make(seen.generation() + 1, me, SlotPhase::Writing, 0);
    // SYNC word: acquire pairs with the last release. Sequentially consistent with the load of `active` in publish:
    // whoever changes `active` and then reads this word sees WRITING, or the publisher sees the change.
    if (!region_->slot(s).word.compare_exchange_strong(seen.bits, writing.bits, std::memory_order_seq_cst))
      return false;
    DSLINE_POINT("alloc.word");
    // SYNC latest: whoever reads a payload without holding it sees the new word before it can see new bytes.
    base::fence_seq_cst_after_rmw();
    // Only the owner touches it while the slot is WRITING; ordered by the commit's release.
    region_->slot(s).position.store(kNoPosition, std::memory_order_relaxed);
    return true;
  }

  bool refill(HintCache& cache) noexcept {
    const std::uint32_t words = (slots_ + 63) / 64;
    for (std::uint32_t i = 0; i < words; ++i) {
      std::uint64_t seen = region_->free_map(i).load(std::memory_order_relaxed);
      if (seen == 0) continue;
      std::uint64_t rest = seen;
      for (std::uint32_t n = 0; n < hints_per_handle_ && rest != 0; ++n) rest &= rest - 1;
      const std::uint64_t lowest = seen & ~rest;
      std::uint64_t taken = region_->free_map(i).fetch_and(~lowest, std::memory_order_seq_cst) & lowest;
      if (taken == 0) continue;
      DSLINE_POINT("alloc.hints");
      cache.map_word.store(i, std::memory_order_relaxed);
      cache.bits.store(taken, std::memory_order_relaxed);
      for (; taken != 0; taken &= taken - 1)
        prefetch_for_writing(i * 64 + static_cast<std::uint32_t>(std::countr_zero(taken)));
      return true;
    }
    return false;
  }

  void prefetch_for_writing(std::uint32_t s) const noexcept {
    if (s >= slots_) return;
    __builtin_prefetch(&region_->slot(s), 1);
    const std::byte* frame = region_->frame_to_prefetch(s);
    __builtin_prefetch(frame, 1);
    __builtin_prefetch(frame + base::kCacheLine, 1);
  }

  void drop_stale_hint(std::uint32_t s) noexcept {
    SlotWord seen = word(s);
    if (!is_possible(seen)) poison(s, seen);
    region_->free_map(s / 64).fetch_and(~map_bit(s), std::memory_order_seq_cst);
    // Freed between the look and the clearing: its bit was lost, so it is set again.
    if (word(s).is_free()) region_->free_map(s / 64).fetch_or(map_bit(s), std::memory_order_seq_cst);
  }

  memory::Region* region_;
  std::uint32_t slots_;
  std::uint32_t group_bits_;
  std::uint32_t hints_per_handle_;
  waiting::WaitPoint space_;
};

}  // namespace dsline::slots
