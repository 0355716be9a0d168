#pragma once

#include <cstdint>

namespace dsline::slots {

/// The word that is the truth about a slot. Every change of ownership is one atomic step on it.
///
///      63        40  39    38    30 29   24 23   22          0
///     +------------+------+--------+-------+-----+------------+
///     | generation | KEPT | owner  | state | ENQ | group bits |
///     +------------+------+--------+-------+-----+------------+
///                                           `---- pending ---'
///
/// generation  counts allocations, so that a stale compare-and-swap fails
/// owner       participant that allocated it; kNoOwner when FREE after an abort or a recovery
/// pending     groups that have not finished with the message, and ENQ: the publisher itself, until the message is
///             in the order, or for as long as it looks at the payload
/// KEPT        with ENQ: the message is in the order, its claims are final, and the publisher still looks at the payload
inline constexpr std::uint32_t kNoOwner = 0x1FF;
inline constexpr std::uint64_t kKept = std::uint64_t{1} << 39;
inline constexpr std::uint32_t kEnqueueing = 1u << 23;
inline constexpr std::uint32_t kGroupBits = kEnqueueing - 1;
inline constexpr std::uint32_t kPendingMask = 0xFFFFFF;

enum class SlotPhase : std::uint32_t {
  Free = 0,
  Writing = 1,
  Committed = 2,
  Pinned = 3,  ///< never stored: COMMITTED with a group whose claim has a holder, as people see it
  Corrupted = 4,
};

/// Every step that the protocol makes on a word, and no other. FREE also stands for COMMITTED with nothing pending.
///
///   from \ to   FREE  WRITING  COMMITTED  CORRUPTED
///   FREE          -    alloc       -      damaged control word
///   WRITING     abort    -      publish          "
///   COMMITTED  release alloc*   release   bad frame after its last release (* nothing pending)
///   CORRUPTED     -    alloc**     -          -     (** bad frame only, and no other slot is free)
constexpr bool may_change(SlotPhase from, SlotPhase to) noexcept {
  switch (from) {
    case SlotPhase::Free:
      return to == SlotPhase::Writing || to == SlotPhase::Corrupted;
    case SlotPhase::Writing:
      return to == SlotPhase::Free || to == SlotPhase::Committed || to == SlotPhase::Corrupted;
    case SlotPhase::Committed:
      return to == SlotPhase::Free || to == SlotPhase::Writing || to == SlotPhase::Committed ||
             to == SlotPhase::Corrupted;
    case SlotPhase::Corrupted:
      return to == SlotPhase::Writing;
    case SlotPhase::Pinned:
      return false;
  }
  return false;
}

struct SlotWord {
  std::uint64_t bits;

  static constexpr SlotWord make(std::uint32_t generation, std::uint32_t owner, SlotPhase phase,
                                 std::uint32_t pending) noexcept {
    return {std::uint64_t{generation & 0xFFFFFF} << 40 | std::uint64_t{owner & 0x1FF} << 30 |
            std::uint64_t{static_cast<std::uint32_t>(phase)} << 24 | (pending & kPendingMask)};
  }

  constexpr std::uint32_t generation() const noexcept { return static_cast<std::uint32_t>(bits >> 40); }
  constexpr std::uint32_t owner() const noexcept { return static_cast<std::uint32_t>(bits >> 30) & 0x1FF; }
  constexpr SlotPhase phase() const noexcept { return static_cast<SlotPhase>(bits >> 24 & 0x3F); }
  constexpr std::uint32_t pending() const noexcept { return static_cast<std::uint32_t>(bits) & kPendingMask; }

  constexpr bool is(SlotPhase wanted) const noexcept { return phase() == wanted; }
  /// The publisher has not finished putting the message into the order: its position and its claims may still change.
  constexpr bool is_entering() const noexcept {
    return is(SlotPhase::Committed) && (pending() & kEnqueueing) != 0 && (bits & kKept) == 0;
  }
  /// The message is in the order, and its publisher still looks at the payload.
  constexpr bool is_kept() const noexcept {
    return is(SlotPhase::Committed) && (pending() & kEnqueueing) != 0 && (bits & kKept) != 0;
  }
  constexpr bool is_free() const noexcept {
    return is(SlotPhase::Free) || (is(SlotPhase::Committed) && pending() == 0);
  }
  /// A slot whose frame failed its check: reused when no other slot is free, since a writer replaces all of it.
  constexpr bool is_quarantined() const noexcept { return is(SlotPhase::Corrupted) && pending() == 0; }
  constexpr bool is_possible() const noexcept {
    if (phase() > SlotPhase::Corrupted || is(SlotPhase::Pinned)) return false;
    return is(SlotPhase::Committed) || is(SlotPhase::Corrupted) || pending() == 0;
  }

  friend constexpr bool operator==(SlotWord, SlotWord) = default;
};
static_assert(sizeof(SlotWord) == 8);

}  // namespace dsline::slots
