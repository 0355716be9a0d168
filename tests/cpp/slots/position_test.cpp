#include "slots/position.hpp"

#include <gtest/gtest.h>

namespace dsline::slots {
namespace {

constexpr std::uint64_t kLap = std::uint64_t{1} << 44;

TEST(Position, NextIsOneMore) { EXPECT_EQ(next_position(0), 1u); }

TEST(Position, TheOneWhoseLowBitsMeanNoneIsSkipped) {
  EXPECT_EQ(next_position(kLap - 2), kLap);
  EXPECT_EQ(next_position(kLap), kLap + 1);
}

TEST(Position, ItIsSkippedInEveryLap) { EXPECT_EQ(next_position(3 * kLap - 2), 3 * kLap); }

TEST(Position, NoneItselfIsNeverReached) {
  for (std::uint64_t p = kLap - 8; p < kLap + 8; p = next_position(p))
    EXPECT_NE(p & kPositionMask, kNoPositionLow);
}

TEST(Position, DistanceToItselfIsZero) { EXPECT_EQ(distance(5, 5), 0); }

TEST(Position, DistanceIsPositiveAheadAndNegativeBehind) {
  EXPECT_EQ(distance(9, 5), 4);
  EXPECT_EQ(distance(1, 5), -4);
}

TEST(Position, DistanceIgnoresTheLapsOfA64BitPosition) {
  EXPECT_EQ(distance(9, 7 * kLap + 5), 4);
  EXPECT_EQ(distance(1, 7 * kLap + 5), -4);
}

TEST(Position, DistanceCrossesTheWrapInBothDirections) {
  EXPECT_EQ(distance(2, kLap - 3), 5);
  EXPECT_EQ(distance((kLap - 3) & kPositionMask, kLap + 2), -5);
}

TEST(Position, BeforePositionZeroLiesThePreviousLap) { EXPECT_EQ(distance(kPositionMask, 0), -1); }

}  // namespace
}  // namespace dsline::slots
