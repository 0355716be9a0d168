#include "order/group.hpp"

#include <gtest/gtest.h>

#include <thread>
#include <vector>

#include "support/small_region.hpp"

namespace dsline::order {
namespace {

using slots::Claim;
using slots::SlotPhase;
using support::claim;
using support::make_region;
using support::send;
using support::word;

constexpr std::uint64_t kLap = std::uint64_t{1} << 44;

class GroupTest : public testing::Test {
 protected:
  void make(std::uint32_t slots, std::uint64_t first = 0, std::uint32_t groups = 1) {
    region = make_region({.slots = slots, .groups = groups, .first_position = first});
    group.emplace(*region, 0u);
    pool.emplace(*region);
  }
  void release(std::uint32_t s, std::uint32_t g = 0) { pool->clear_pending(s, 1u << g); }
  std::unique_ptr<memory::Region> region;
  std::optional<Group> group;
  std::optional<slots::SlotPool> pool;
  Held held{};
};

TEST_F(GroupTest, AnEmptyGroupHasNothingToTake) {
  make(4);
  EXPECT_FALSE(group->try_take(0, held));
  EXPECT_FALSE(group->anything_waiting());
  EXPECT_EQ(group->depth(), 0u);
}

TEST_F(GroupTest, TakeSeesNothingBeforePublish) {
  make(4);
  OrderRing ring(*region);
  std::uint32_t s = pool->try_alloc(1);
  EXPECT_FALSE(group->try_take(0, held));
  pool->commit(s, pool->word(s), 1);
  EXPECT_FALSE(group->try_take(0, held)) << "committed, but not in the order yet";
  ring.enter(s, 1);
  EXPECT_TRUE(group->try_take(0, held)) << "in the order; the tail hint and ENQ do not matter";
  EXPECT_EQ(held.slot, s);
}

TEST_F(GroupTest, AMessageIsTakenOnce) {
  make(4);
  send(*region);
  ASSERT_TRUE(group->try_take(2, held));
  EXPECT_EQ(claim(*region, held.slot), Claim::make(0, 0, Claim::holder(2)));
  EXPECT_EQ(held.attempts, 0u);
  EXPECT_FALSE(group->try_take(3, held));
}

TEST_F(GroupTest, MessagesComeInTheOrderOfTheirPositions) {
  make(4);
  for (int i = 0; i < 4; ++i) send(*region);
  EXPECT_EQ(group->depth(), 4u);
  for (std::uint64_t p = 0; p < 4; ++p) {
    ASSERT_TRUE(group->try_take(0, held));
    EXPECT_EQ(held.position, p);
  }
  EXPECT_EQ(group->depth(), 0u);
}

TEST_F(GroupTest, EveryGroupSeesEveryMessage) {
  make(2, 0, 2);
  Group other(*region, 1);
  std::uint32_t s = send(*region, 0, 0b11);
  ASSERT_TRUE(group->try_take(0, held));
  release(held.slot);
  EXPECT_FALSE(word(*region, s).is_free());
  ASSERT_TRUE(other.try_take(1, held));
  EXPECT_EQ(held.slot, s);
  release(held.slot, 1);
  EXPECT_TRUE(word(*region, s).is_free());
}

TEST_F(GroupTest, AGroupStepsOverMessagesThatAreNotForIt) {
  make(3, 0, 2);
  Group other(*region, 1);
  send(*region, 0, 0b01);
  std::uint32_t s = send(*region, 0, 0b10);
  ASSERT_TRUE(other.try_take(1, held));
  EXPECT_EQ(held.slot, s);
  EXPECT_EQ(held.position, 1u);
}

class GroupWrapTest : public GroupTest,
                      public testing::WithParamInterface<std::tuple<std::uint32_t, std::uint64_t>> {
 protected:
  std::uint32_t slots() const { return std::get<0>(GetParam()); }
  std::uint64_t first() const { return std::get<1>(GetParam()); }
};

TEST_P(GroupWrapTest, OneAtATimeGoesRoundManyTimes) {
  make(slots(), first());
  std::uint64_t expected = first();
  for (int i = 0; i < 100; ++i) {
    ASSERT_NE(send(*region), slots::kNoSlot);
    ASSERT_TRUE(group->try_take(0, held)) << i;
    ASSERT_EQ(held.position, expected);
    EXPECT_EQ(region->slot(held.slot).position.load(), expected);
    release(held.slot);
    EXPECT_FALSE(group->try_take(0, held));
    expected = slots::next_position(expected);
  }
}

TEST_P(GroupWrapTest, AFullPoolGoesRoundManyTimes) {
  make(slots(), first());
  std::uint64_t expected = first();
  for (int i = 0; i < 40; ++i) {
    for (std::uint32_t k = 0; k < slots(); ++k) ASSERT_NE(send(*region), slots::kNoSlot);
    EXPECT_EQ(send(*region), slots::kNoSlot);
    EXPECT_EQ(group->depth(), slots());
    for (std::uint32_t k = 0; k < slots(); ++k) {
      ASSERT_TRUE(group->try_take(0, held));
      ASSERT_EQ(held.position, expected);
      expected = slots::next_position(expected);
      release(held.slot);
    }
    EXPECT_FALSE(group->try_take(0, held));
  }
}

TEST_P(GroupWrapTest, AMessageThatIsHeldForManyLapsStaysItsHoldersAndIsRedelivered) {
  make(slots(), first());
  if (slots() == 1) {
    send(*region);
    ASSERT_TRUE(group->try_take(1, held));
    EXPECT_EQ(send(*region), slots::kNoSlot);
  } else {
    send(*region);
    ASSERT_TRUE(group->try_take(1, held));
    for (int i = 0; i < 50; ++i) {
      Held later{};
      ASSERT_NE(send(*region), slots::kNoSlot);
      ASSERT_TRUE(group->try_take(0, later));
      ASSERT_NE(later.slot, held.slot);
      release(later.slot);
    }
  }
  group->give_back(held, 1, 0);
  Held again{};
  ASSERT_TRUE(group->try_take(0, again));
  EXPECT_EQ(again.slot, held.slot);
  EXPECT_EQ(again.position, first());
  EXPECT_EQ(again.attempts, 1u);
}

INSTANTIATE_TEST_SUITE_P(Sizes, GroupWrapTest,
                         testing::Combine(testing::Values(1u, 2u, 3u, 4u, 5u),
                                          testing::Values(0, kLap - 2, kLap - 3, kLap - 20, 9 * kLap - 5)));

TEST_F(GroupTest, AMessageThatIsGivenBackComesFirstAndCountsTheAttempt) {
  make(4);
  for (int i = 0; i < 3; ++i) send(*region);
  ASSERT_TRUE(group->try_take(1, held));
  group->give_back(held, 1, 0);
  EXPECT_TRUE(group->anything_waiting());
  EXPECT_EQ(group->depth(), 3u);
  Held again{};
  ASSERT_TRUE(group->try_take(2, again));
  EXPECT_EQ(again.position, 0u);
  EXPECT_EQ(again.attempts, 1u);
  ASSERT_TRUE(group->try_take(2, again));
  EXPECT_EQ(again.position, 1u);
  EXPECT_EQ(again.attempts, 0u);
}

TEST_F(GroupTest, SeveralThatAreGivenBackComeOldestFirst) {
  make(4);
  Held all[3];
  for (int i = 0; i < 3; ++i) send(*region);
  for (Held& each : all) ASSERT_TRUE(group->try_take(1, each));
  group->give_back(all[2], 1, 0);
  group->give_back(all[0], 1, 0);
  group->give_back(all[1], 1, 0);
  for (std::uint64_t p = 0; p < 3; ++p) {
    ASSERT_TRUE(group->try_take(2, held));
    EXPECT_EQ(held.position, p);
  }
}

TEST_F(GroupTest, SeveralThatAreGivenBackComeOldestFirstAcrossTheWrap) {
  make(4, kLap - 3);
  Held all[3];
  for (int i = 0; i < 3; ++i) send(*region);
  for (Held& each : all) ASSERT_TRUE(group->try_take(1, each));
  for (const Held& each : all) group->give_back(each, 1, 0);
  for (const Held& each : all) {
    ASSERT_TRUE(group->try_take(2, held));
    EXPECT_EQ(held.position, each.position);
  }
}

TEST_F(GroupTest, OnlyTheHolderCanGiveBack) {
  make(4);
  send(*region);
  ASSERT_TRUE(group->try_take(1, held));
  group->give_back(held, 2, 0);
  EXPECT_EQ(claim(*region, held.slot).who(), Claim::holder(1));
  EXPECT_FALSE(group->anything_waiting());
}

TEST_F(GroupTest, AttemptsOfAMessageStopAtTheirLargestValue) {
  make(1);
  send(*region);
  for (std::uint32_t i = 0; i < 20; ++i) {
    ASSERT_TRUE(group->try_take(1, held));
    EXPECT_EQ(held.attempts, std::min(i, Claim::kMaxAttempts));
    group->give_back(held, 1, 0);
  }
}

TEST_F(GroupTest, TheFlagStaysUpUntilAScanFoundNothing) {
  make(4);
  for (int i = 0; i < 2; ++i) send(*region);
  Held first{}, second{};
  ASSERT_TRUE(group->try_take(1, first));
  ASSERT_TRUE(group->try_take(1, second));
  group->give_back(first, 1, 0);
  group->give_back(second, 1, 0);
  std::uint64_t raised = group->state().redeliver.load();
  EXPECT_EQ(raised & 1, 1u);
  ASSERT_TRUE(group->try_take(2, held));
  EXPECT_EQ(group->state().redeliver.load(), raised) << "one is still to be found";
  ASSERT_TRUE(group->try_take(2, held));
  EXPECT_EQ(group->state().redeliver.load(), raised) << "only a scan that finds nothing may lower it";
  EXPECT_FALSE(group->try_take(2, held));
  EXPECT_EQ(group->state().redeliver.load() & 1, 0u);
  EXPECT_EQ(group->state().redeliver.load() >> 1, raised >> 1);
}

TEST_F(GroupTest, EveryRaiseChangesTheFlagSoThatAnOldLookCannotLowerIt) {
  make(4);
  group->raise();
  std::uint64_t once = group->state().redeliver.load();
  group->raise();
  EXPECT_NE(group->state().redeliver.load(), once);
}

TEST_F(GroupTest, AFlagWithNothingToFindDoesNotHideNewMessages) {
  make(4);
  send(*region);
  group->raise();
  ASSERT_TRUE(group->try_take(0, held));
  EXPECT_EQ(held.position, 0u);
  EXPECT_EQ(group->state().redeliver.load() & 1, 0u);
}

TEST_F(GroupTest, RaisingWakesAMember) {
  make(4);
  group->messages().add(3);
  std::uint32_t before = group->messages().sequence();
  group->raise();
  EXPECT_EQ(group->messages().sequence(), before + 1);
}

TEST_F(GroupTest, ACursorThatWasLappedWalksToTheOldestMessageThatIsStillThere) {
  make(2);
  for (int i = 0; i < 20; ++i) {
    send(*region);
    ASSERT_TRUE(group->try_take(0, held));
    release(held.slot);
  }
  group->state().cursor.store(0);  // a member that looked long ago
  send(*region);
  ASSERT_TRUE(group->try_take(0, held));
  EXPECT_EQ(held.position, 20u);
  EXPECT_EQ(group->state().cursor.load(), 21u);
}

TEST_F(GroupTest, ACursorBehindATakenMessageDoesNotDeliverItAgain) {
  make(4);
  send(*region);
  ASSERT_TRUE(group->try_take(1, held));
  group->state().cursor.store(0);  // the member died between claim and cursor
  EXPECT_FALSE(group->try_take(2, held));
  EXPECT_EQ(group->state().cursor.load(), 1u);
}

TEST_F(GroupTest, AMessageWhoseCellIsDamagedIsFoundByItsClaim) {
  make(3);
  for (int i = 0; i < 3; ++i) send(*region);
  const Cell good = Cell{region->cell(1).load()};
  for (Cell bad :
       {Cell::make(1, 3), Cell::make(1, 0xFFFFF), Cell::make(17, 1), Cell::make(1 + (kLap >> 1) - 1, 1)}) {
    region->cell(1).store(bad.bits);
    group->state().cursor.store(1);
    ASSERT_TRUE(group->try_take(0, held)) << bad.position_low() << " " << bad.slot();
    EXPECT_EQ(held.position, 1u);
    EXPECT_EQ(held.slot, good.slot());
    region->claim(held.slot, 0).store(Claim::make(1, 0, Claim::kNobody).bits);
  }
}

TEST_F(GroupTest, ADamagedCellWhereNothingHasEnteredIsNoMessage) {
  make(3);
  send(*region);
  region->cell(1).store(Cell::make(1 + (kLap >> 1) - 1, 2).bits);
  ASSERT_TRUE(group->try_take(0, held));
  EXPECT_FALSE(group->try_take(0, held));
  EXPECT_FALSE(group->anything_waiting());
  EXPECT_EQ(group->state().cursor.load(), 1u) << "the next message would enter behind the cursor";
}

TEST_F(GroupTest, ACellThatNamesAnotherMessagesSlotDeliversNothing) {
  make(3);
  for (int i = 0; i < 2; ++i) send(*region);
  region->cell(0).store(Cell::make(0, 1).bits);
  ASSERT_TRUE(group->try_take(0, held));
  EXPECT_EQ(held.position, 1u);
  EXPECT_FALSE(group->try_take(0, held));
}

TEST_F(GroupTest, ASlotThatIsNoLongerCommittedIsSteppedOver) {
  make(2);
  std::uint32_t s = send(*region);
  region->slot(s).word.store(slots::SlotWord::make(9, 0, SlotPhase::Corrupted, 0).bits);
  EXPECT_FALSE(group->try_take(0, held));
  EXPECT_EQ(group->state().cursor.load(), 1u);
}

// Shows that each message has one taker and that every taker sees positions rise.
TEST_F(GroupTest, CompetingMembersTakeEveryMessageOnce) {
  make(8, kLap - 500);
  constexpr std::uint64_t kMessages = 20000;
  std::vector<base::Atomic<int>> taken(kMessages + 2);
  base::Atomic<std::uint64_t> total{0};
  base::Atomic<int> disorder{0};
  std::vector<std::thread> members;
  for (std::uint32_t me = 1; me < 4; ++me) {
    members.emplace_back([&, me] {
      Group mine(*region, 0);
      slots::SlotPool my_pool(*region);
      Held it{};
      std::uint64_t last = 0;
      while (total.load() < kMessages) {
        if (!mine.try_take(me, it)) {
          std::this_thread::yield();
          continue;
        }
        disorder += it.position <= last;
        last = it.position;
        taken[it.position - (kLap - 500)].fetch_add(1);
        total.fetch_add(1);
        my_pool.clear_pending(it.slot, 1);
      }
    });
  }
  for (std::uint64_t sent = 0; sent < kMessages;) {
    if (send(*region) != slots::kNoSlot) {
      ++sent;
    } else {
      std::this_thread::yield();
    }
  }
  for (std::thread& member : members) member.join();
  int wrong = 0;
  for (std::uint64_t i = 0; i <= kMessages; ++i) wrong += taken[i].load() != (i == 499 ? 0 : 1);
  EXPECT_EQ(wrong, 0) << "position 2^44 - 1 is skipped, every other one is taken once";
  EXPECT_EQ(disorder.load(), 0);
  EXPECT_EQ(support::free_slots(*region), 8u);
}

}  // namespace
}  // namespace dsline::order
