#pragma once

#include <cstdint>

namespace dsline::slots {

/// Positions in the order count messages. Hints and slots hold all 64 bits; a cell and a claim hold the low 44, which
/// are compared modulo their width: two positions that meet are never further apart than the order has cells.
inline constexpr std::uint32_t kPositionBits = 44;
inline constexpr std::uint64_t kPositionMask = (std::uint64_t{1} << kPositionBits) - 1;

/// "No position": in a slot, and its low bits in a claim. The order skips every position with these low bits.
inline constexpr std::uint64_t kNoPosition = ~std::uint64_t{0};
inline constexpr std::uint64_t kNoPositionLow = kPositionMask;

constexpr std::uint64_t next_position(std::uint64_t position) noexcept {
  ++position;
  return (position & kPositionMask) == kNoPositionLow ? position + 1 : position;
}

/// How far `low` (44 bits) lies ahead of `position`; negative when behind.
constexpr std::int64_t distance(std::uint64_t low, std::uint64_t position) noexcept {
  constexpr std::uint32_t kUnused = 64 - kPositionBits;
  return static_cast<std::int64_t>((low - position) << kUnused) >> kUnused;
}

}  // namespace dsline::slots
