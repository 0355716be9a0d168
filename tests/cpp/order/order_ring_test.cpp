#include "order/order_ring.hpp"

#include <gtest/gtest.h>

#include <algorithm>
#include <thread>
#include <vector>

#include "support/small_region.hpp"

namespace dsline::order {
namespace {

using slots::Claim;
using support::make_region;

constexpr std::uint64_t kLap = std::uint64_t{1} << 44;

TEST(Cell, FieldsComeBackAsTheyWereMade) {
  Cell cell = Cell::make(0x123456789AB, 0xFFFFF);
  EXPECT_EQ(cell.position_low(), 0x123456789ABu);
  EXPECT_EQ(cell.slot(), 0xFFFFFu);
}

TEST(Cell, ASlotNumberPastItsWidthDoesNotChangeThePosition) {
  EXPECT_EQ(Cell::make(3, 1u << 20).position_low(), 3u);
}

TEST(Cell, IsBehindAtAndAheadOfPositions) {
  EXPECT_EQ(Cell::make(10, 0).ahead_of(10), 0);
  EXPECT_EQ(Cell::make(10, 0).ahead_of(14), -4);
  EXPECT_EQ(Cell::make(14, 0).ahead_of(10), 4);
  EXPECT_EQ(Cell::make(kLap + 1, 0).ahead_of(kLap - 3), 4);
}

class OrderRingTest : public testing::TestWithParam<std::uint64_t> {
 protected:
  void make(std::uint32_t slots, std::uint32_t groups = 1) {
    region = make_region({.slots = slots, .groups = groups, .first_position = GetParam()});
    ring.emplace(*region);
  }
  std::unique_ptr<memory::Region> region;
  std::optional<OrderRing> ring;
};

TEST_P(OrderRingTest, EveryCellOfANewRingIsOneLapBehind) {
  make(4);
  for (std::uint64_t p = GetParam(), k = 0; k < 8; ++k, p = slots::next_position(p)) {
    EXPECT_LT(ring->cell(p).ahead_of(p), 0) << k;
  }
}

TEST_P(OrderRingTest, PositionsAreGivenOneAfterTheOther) {
  make(4);
  std::uint64_t expected = GetParam();
  for (int i = 0; i < 50; ++i) {
    OrderRing::Entered entered = ring->enter(static_cast<std::uint32_t>(i % 4), 1);
    ring->advance_tail(entered);
    ASSERT_EQ(entered.position, expected);
    EXPECT_EQ(ring->cell(expected).slot(), static_cast<std::uint32_t>(i % 4));
    EXPECT_EQ(ring->cell(expected).ahead_of(expected), 0);
    expected = slots::next_position(expected);
    EXPECT_EQ(ring->tail_guess(), expected);
  }
}

TEST_P(OrderRingTest, EnteringSetsPositionAndTheClaimsOfTheGroupsAlone) {
  make(2, 3);
  ring->enter(1, 0b101);
  EXPECT_EQ(region->slot(1).position.load(), GetParam());
  Claim entered = Claim::make(GetParam(), 0, Claim::kNobody);
  EXPECT_EQ(support::claim(*region, 1, 0), entered);
  EXPECT_EQ(support::claim(*region, 1, 1), Claim::none());
  EXPECT_EQ(support::claim(*region, 1, 2), entered);
}

TEST_P(OrderRingTest, AStaleTailIsWalkedAndThenCorrectedInOneStep) {
  make(4);
  std::uint64_t expected = GetParam();
  for (std::uint32_t s = 0; s < 3; ++s) {
    EXPECT_EQ(ring->enter(s, 1).position, expected);  // the publisher dies before P3
    expected = slots::next_position(expected);
  }
  EXPECT_EQ(ring->tail_guess(), GetParam());
  OrderRing::Entered entered = ring->enter(3, 1);
  EXPECT_EQ(entered.position, expected);
  EXPECT_EQ(entered.hint, GetParam());
  ring->advance_tail(entered);
  EXPECT_EQ(ring->tail_guess(), slots::next_position(expected));
}

TEST_P(OrderRingTest, ATailThatAnotherMovedIsLeftAlone) {
  make(4);
  OrderRing::Entered first = ring->enter(0, 1);
  OrderRing::Entered second = ring->enter(1, 1);
  ring->advance_tail(second);
  std::uint64_t tail = ring->tail_guess();
  ring->advance_tail(first);
  EXPECT_EQ(ring->tail_guess(), tail) << "the hint went backwards";
}

TEST_P(OrderRingTest, ALapLaterTheSameCellHoldsTheLaterPosition) {
  make(2);
  const std::uint64_t first = GetParam();
  const std::int64_t cells = region->geometry().order_cells;
  const std::uint64_t lap_later = first + static_cast<std::uint64_t>(cells);
  for (std::uint64_t position = first - 1; position != lap_later;) {
    OrderRing::Entered entered = ring->enter(1, 1);
    ring->advance_tail(entered);
    position = entered.position;
    ASSERT_LE(position, lap_later);
    EXPECT_EQ(ring->cell(first).ahead_of(first), position == lap_later ? cells : 0);
  }
}

TEST_P(OrderRingTest, ADamagedCellAheadIsMendedByTheNextMessage) {
  make(2);
  const std::uint64_t first = GetParam();
  for (std::uint64_t ahead : {std::uint64_t{1}, std::uint64_t{8}, std::uint64_t{1} << 43}) {
    const std::uint64_t next = ring->tail_guess();
    region->cell(next).store(Cell::make(next + ahead - 1, 1).bits);
    if (ahead == 1) region->cell(next).store(Cell::make(next + 3, 1).bits);
    OrderRing::Entered entered = ring->enter(0, 1);
    ring->advance_tail(entered);
    EXPECT_EQ(entered.position, next) << first << " + " << ahead;
    EXPECT_EQ(ring->cell(next).bits, Cell::make(next, 0).bits);
  }
}

TEST_P(OrderRingTest, ADamagedTailIsMendedByTheNextMessage) {
  make(2);
  std::uint64_t next = 0;
  for (std::uint32_t i = 0; i < 2 * region->geometry().order_cells; ++i) {
    OrderRing::Entered entered = ring->enter(0, 1);
    ring->advance_tail(entered);
    next = ring->tail_guess();
  }
  for (std::uint64_t behind :
       {std::uint64_t{1}, std::uint64_t{9}, std::uint64_t{8000}, (std::uint64_t{1} << 43) - 8}) {
    region->order().tail.store(next - behind);
    OrderRing::Entered entered = ring->enter(1, 1);
    ring->advance_tail(entered);
    EXPECT_EQ(entered.position, next) << behind;
    next = ring->tail_guess();
    EXPECT_EQ(next, slots::next_position(entered.position));
  }
}

// Shows that every publisher gets a position of its own and none is left out.
TEST_P(OrderRingTest, CompetingPublishersGetDifferentPositionsWithoutGaps) {
  make(4);
  constexpr int kEach = 3000;
  std::vector<std::uint64_t> positions[4];
  std::vector<std::thread> threads;
  for (std::uint32_t me = 0; me < 4; ++me) {
    threads.emplace_back([&, me] {
      for (int i = 0; i < kEach; ++i) {
        OrderRing::Entered entered = ring->enter(me, 1);
        positions[me].push_back(entered.position);
        if (i % 3 != 0) ring->advance_tail(entered);
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  std::vector<std::uint64_t> all;
  for (const auto& part : positions) {
    EXPECT_TRUE(std::is_sorted(part.begin(), part.end()));
    all.insert(all.end(), part.begin(), part.end());
  }
  std::sort(all.begin(), all.end());
  std::uint64_t expected = GetParam();
  for (std::uint64_t position : all) {
    ASSERT_EQ(position, expected);
    expected = slots::next_position(expected);
  }
  EXPECT_EQ(all.size(), 4u * kEach);
}

// From zero, across the wrap of the 44 bits of a cell (whose last position is skipped), and across a later one.
INSTANTIATE_TEST_SUITE_P(From, OrderRingTest,
                         testing::Values(0, 7, kLap - 2, kLap - 3, kLap - 6, kLap, 5 * kLap - 4));

}  // namespace
}  // namespace dsline::order
