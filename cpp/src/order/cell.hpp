#pragma once

#include <cstdint>

#include "slots/position.hpp"

namespace dsline::order {

/// One cell of the order: position:44 | slot:20. Written once per lap, by one compare-and-swap; never cleared.
struct Cell {
  std::uint64_t bits;

  static constexpr Cell make(std::uint64_t position, std::uint32_t slot) noexcept {
    return {(position & slots::kPositionMask) << 20 | (slot & 0xFFFFF)};
  }
  constexpr std::uint64_t position_low() const noexcept { return bits >> 20; }
  constexpr std::uint32_t slot() const noexcept { return static_cast<std::uint32_t>(bits) & 0xFFFFF; }

  /// Positions from `position` to this cell's: negative when the cell still holds an earlier lap.
  constexpr std::int64_t ahead_of(std::uint64_t position) const noexcept {
    return slots::distance(position_low(), position);
  }
};
static_assert(sizeof(Cell) == 8);

}  // namespace dsline::order
