#include "liveness/recovery.hpp"

#include <gtest/gtest.h>

#include <map>
#include <vector>

#include "liveness/participants.hpp"
#include "order/group.hpp"
#include "support/crash_points.hpp"
#include "support/small_region.hpp"

namespace dsline::liveness {
namespace {

using order::Cell;
using order::Group;
using order::Held;
using order::OrderRing;
using slots::Claim;
using slots::SlotPhase;
using slots::SlotPool;
using slots::SlotWord;
using support::claim;
using support::free_slots;
using support::make_region;
using support::open_again;
using support::send;
using support::word;

constexpr std::uint64_t kLap = std::uint64_t{1} << 44;

class RecoveryTest : public testing::TestWithParam<std::uint64_t> {
 protected:
  void make(std::uint32_t slots, std::uint32_t groups = 1) {
    region = make_region({.slots = slots, .groups = groups, .first_position = GetParam()});
    me = Participants(*region).try_join();
    dying = open_again(*region);
    dead = Participants(*dying).try_join();
    ASSERT_NE(dead, Participants::kNobody);
  }
  /// Its kernel locks go, its entry stays.
  void die() { dying.reset(); }
  void recover() { EXPECT_EQ(recover_the_dead(*region, me, true), 1u); }
  /// As if the recoverer had died at its last step: the entry is still used, everything is done once more.
  void recover_again() {
    region->participant(dead).word.store(EntryWord::make(77, EntryState::Used).bits);
    recover();
  }
  bool take(Held& held, std::uint32_t g = 0) { return Group(*region, g).try_take(me, held); }
  void release(const Held& held, std::uint32_t g = 0) { SlotPool(*region).clear_pending(held.slot, 1u << g); }
  /// Takes and releases everything: slots in the order in which they came.
  std::vector<std::uint32_t> drain() {
    std::vector<std::uint32_t> slots;
    for (Held held{}; take(held);) {
      slots.push_back(held.slot);
      release(held);
    }
    return slots;
  }
  /// Every slot can be used, filled and emptied again.
  void expect_whole() {
    drain();
    EXPECT_EQ(free_slots(*region), region->geometry().slots);
    SlotPool pool(*region);
    for (std::uint32_t i = 0; i < region->geometry().slots; ++i) {
      std::uint32_t s = pool.try_alloc_by_scan(me);
      ASSERT_NE(s, slots::kNoSlot);
      support::publish(*region, s, me);
    }
    EXPECT_EQ(drain().size(), region->geometry().slots);
  }

  std::unique_ptr<memory::Region> region;
  std::unique_ptr<memory::Region> dying;
  std::uint32_t me = 0;
  std::uint32_t dead = 0;
};

TEST_P(RecoveryTest, WithNobodyDeadNothingHappens) {
  make(2);
  SlotPool(*dying).try_alloc(dead);
  EXPECT_EQ(recover_the_dead(*region, me, true), 0u);
  EXPECT_TRUE(word(*region, 0).is(SlotPhase::Writing));
}

TEST_P(RecoveryTest, TheNumberOfTheDeadIsFreeAfterwards) {
  make(2);
  die();
  recover();
  EXPECT_EQ(Participants(*region).entry(dead).state(), EntryState::Free);
  EXPECT_EQ(region->header().deaths.load(), 1u);
  EXPECT_EQ(recover_the_dead(*region, me, true), 0u);
}

TEST_P(RecoveryTest, ARecovererDoesNotTakeItselfForDead) {
  make(2);
  SlotPool(*region).try_alloc(me);
  EXPECT_EQ(recover_the_dead(*region, me, true), 0u);
  EXPECT_TRUE(word(*region, 0).is(SlotPhase::Writing));
}

TEST_P(RecoveryTest, ASlotThatWasBeingWrittenIsFreed) {
  make(2);
  ASSERT_EQ(SlotPool(*dying).try_alloc(dead), 0u);
  die();
  recover();
  EXPECT_TRUE(word(*region, 0).is(SlotPhase::Free));
  EXPECT_EQ(word(*region, 0).owner(), slots::kNoOwner);
  EXPECT_EQ(region->free_map(0).load() & 1, 1u);
  expect_whole();
}

TEST_P(RecoveryTest, ASlotThatSomebodyElseIsWritingIsNotTouched) {
  make(3);
  ASSERT_EQ(SlotPool(*region).try_alloc(me), 0u);
  ASSERT_EQ(SlotPool(*dying).try_alloc(dead), 1u);
  die();
  recover();
  EXPECT_EQ(word(*region, 0), SlotWord::make(1, me, SlotPhase::Writing, 0));
}

TEST_P(RecoveryTest, ACommittedMessageWithoutAPositionIsRolledForward) {
  make(3);
  SlotPool pool(*dying);
  std::uint32_t s = pool.try_alloc(dead);
  pool.commit(s, pool.word(s), 1);
  die();
  recover();
  EXPECT_EQ(word(*region, s).pending(), 1u);
  recover_again();
  EXPECT_EQ(drain(), std::vector<std::uint32_t>{s}) << "delivered once";
  expect_whole();
}

TEST_P(RecoveryTest, ACommittedMessageThatMissedItsCellIsRolledForward) {
  make(3);
  SlotPool pool(*dying);
  std::uint32_t s = pool.try_alloc(dead);
  pool.commit(s, pool.word(s), 1);
  // It died between the stores of P2 and the compare-and-swap, and another message has the cell since.
  region->slot(s).position.store(GetParam());
  region->claim(s, 0).store(Claim::make(GetParam(), 0, Claim::kNobody).bits);
  std::uint32_t other = send(*region, me);
  die();
  recover();
  recover_again();
  EXPECT_EQ(drain(), (std::vector<std::uint32_t>{other, s}));
  expect_whole();
}

TEST_P(RecoveryTest, ACommittedMessageWhoseCellIsStillFreeIsRolledForward) {
  make(3);
  SlotPool pool(*dying);
  std::uint32_t s = pool.try_alloc(dead);
  pool.commit(s, pool.word(s), 1);
  region->slot(s).position.store(GetParam());
  region->claim(s, 0).store(Claim::make(GetParam(), 0, Claim::kNobody).bits);
  die();
  recover();
  recover_again();
  EXPECT_EQ(drain(), std::vector<std::uint32_t>{s});
  expect_whole();
}

TEST_P(RecoveryTest, ACommittedMessageThatWasLappedOutsideTheOrderIsRolledForward) {
  make(2);
  SlotPool pool(*dying);
  std::uint32_t s = pool.try_alloc(dead);
  pool.commit(s, pool.word(s), 1);
  region->slot(s).position.store(GetParam());
  region->claim(s, 0).store(Claim::make(GetParam(), 0, Claim::kNobody).bits);
  for (int i = 0; i < 11; ++i) {
    ASSERT_NE(send(*region, me), slots::kNoSlot);
    ASSERT_EQ(drain().size(), 1u);
  }
  die();
  recover();
  recover_again();
  EXPECT_EQ(drain(), std::vector<std::uint32_t>{s});
  expect_whole();
}

TEST_P(RecoveryTest, AMessageInTheOrderWithEnqIsDeliveredOnce) {
  make(3);
  SlotPool pool(*dying);
  std::uint32_t s = pool.try_alloc(dead);
  pool.commit(s, pool.word(s), 1);
  OrderRing(*dying).enter(s, 1);
  die();
  recover();
  EXPECT_EQ(word(*region, s).pending(), 1u);
  recover_again();
  EXPECT_EQ(drain(), std::vector<std::uint32_t>{s});
  expect_whole();
}

TEST_P(RecoveryTest, AMessageInTheOrderThatWasReleasedBeforeItsPublisherDiedFreesItsSlot) {
  make(2);
  SlotPool pool(*dying);
  std::uint32_t s = pool.try_alloc(dead);
  pool.commit(s, pool.word(s), 1);
  OrderRing(*dying).enter(s, 1);
  EXPECT_EQ(drain(), std::vector<std::uint32_t>{s});
  EXPECT_FALSE(word(*region, s).is_free());
  die();
  recover();
  EXPECT_TRUE(word(*region, s).is_free());
  expect_whole();
}

TEST_P(RecoveryTest, AMessageInTheOrderThatIsHeldAndLappedStaysWithItsHolder) {
  make(2);
  SlotPool pool(*dying);
  std::uint32_t s = pool.try_alloc(dead);
  pool.commit(s, pool.word(s), 1);
  OrderRing(*dying).enter(s, 1);
  Held held{};
  ASSERT_TRUE(take(held));
  for (int i = 0; i < 11; ++i) {
    ASSERT_NE(send(*region, me), slots::kNoSlot);
    ASSERT_EQ(drain().size(), 1u);
  }
  die();
  recover();
  EXPECT_EQ(claim(*region, s).who(), Claim::holder(me));
  EXPECT_TRUE(drain().empty()) << "it was entered a second time";
  release(held);
  expect_whole();
}

TEST_P(RecoveryTest, AStaleTailLeftByTheDeadDoesNotHarm) {
  make(3);
  SlotPool pool(*dying);
  std::uint32_t s = pool.try_alloc(dead);
  pool.commit(s, pool.word(s), 1);
  OrderRing(*dying).enter(s, 1);
  pool.clear_pending(s, slots::kEnqueueing);  // died before P3
  die();
  recover();
  std::uint32_t next = send(*region, me);
  EXPECT_EQ(drain(), (std::vector<std::uint32_t>{s, next}));
  expect_whole();
}

TEST_P(RecoveryTest, WhatTheDeadHeldIsDeliveredAgainBeforeNewerMessagesAndFlagged) {
  make(4);
  std::uint32_t a = send(*region, me);
  std::uint32_t b = send(*region, me);
  std::uint32_t c = send(*region, me);
  Held held{};
  ASSERT_TRUE(Group(*dying, 0).try_take(dead, held));
  ASSERT_TRUE(Group(*dying, 0).try_take(dead, held));
  die();
  recover();
  std::vector<std::pair<std::uint32_t, std::uint32_t>> got;
  while (take(held)) {
    got.emplace_back(held.slot, held.attempts);
    release(held);
  }
  EXPECT_EQ(got, (std::vector<std::pair<std::uint32_t, std::uint32_t>>{{a, 1}, {b, 1}, {c, 0}}));
  expect_whole();
}

TEST_P(RecoveryTest, RecoveringTwiceCountsOneAttempt) {
  make(2);
  send(*region, me);
  Held held{};
  ASSERT_TRUE(Group(*dying, 0).try_take(dead, held));
  die();
  recover();
  recover_again();
  ASSERT_TRUE(take(held));
  EXPECT_EQ(held.attempts, 1u);
  recover_again();
  EXPECT_EQ(claim(*region, held.slot).who(), Claim::holder(me)) << "the new holder is not the dead one";
}

TEST_P(RecoveryTest, AClaimThatWasGivenBackWithoutItsFlagIsFound) {
  make(2);
  send(*region, me);
  Held held{};
  ASSERT_TRUE(Group(*dying, 0).try_take(dead, held));
  // An earlier recoverer died between V7's two halves.
  region->claim(held.slot, 0).store(Claim{region->claim(held.slot, 0).load()}.given_back().bits);
  die();
  recover();
  ASSERT_TRUE(take(held));
  EXPECT_EQ(held.attempts, 1u);
}

TEST_P(RecoveryTest, AClaimWithoutTheMoveOfTheCursorIsRedelivered) {
  make(2);
  std::uint32_t s = send(*region, me);
  region->claim(s, 0).store(Claim::make(GetParam(), 0, Claim::holder(dead)).bits);
  die();
  recover();
  Held held{};
  ASSERT_TRUE(take(held));
  EXPECT_EQ(held.slot, s);
  EXPECT_EQ(held.attempts, 1u);
  release(held);
  expect_whole();
}

TEST_P(RecoveryTest, WhatOthersHoldStaysTheirs) {
  make(3);
  send(*region, me);
  send(*region, me);
  Held mine{}, theirs{};
  ASSERT_TRUE(take(mine));
  ASSERT_TRUE(Group(*dying, 0).try_take(dead, theirs));
  die();
  recover();
  EXPECT_EQ(claim(*region, mine.slot).who(), Claim::holder(me));
  EXPECT_EQ(claim(*region, theirs.slot).who(), Claim::kRedeliver);
}

TEST_P(RecoveryTest, EveryGroupGetsBackWhatTheDeadHeldForIt) {
  make(3, 2);
  std::uint32_t s = send(*region, me, 0b11);
  Held held{};
  ASSERT_TRUE(Group(*dying, 1).try_take(dead, held));
  ASSERT_TRUE(take(held, 0));
  die();
  recover();
  EXPECT_EQ(claim(*region, s, 0).who(), Claim::holder(me));
  ASSERT_TRUE(take(held, 1));
  EXPECT_EQ(held.attempts, 1u);
  release(held, 0);
  release(held, 1);
  EXPECT_TRUE(word(*region, s).is_free());
}

TEST_P(RecoveryTest, RolledForwardMessagesReachEveryGroupTheyWereCommittedFor) {
  make(3, 3);
  SlotPool pool(*dying);
  std::uint32_t s = pool.try_alloc(dead);
  pool.commit(s, pool.word(s), 0b101);
  die();
  recover();
  Held held{};
  EXPECT_TRUE(take(held, 0));
  EXPECT_FALSE(take(held, 1));
  EXPECT_TRUE(take(held, 2));
  EXPECT_EQ(held.slot, s);
}

TEST_P(RecoveryTest, TheWaiterBitsOfTheDeadAreCleared) {
  make(2, 2);
  SlotPool(*dying).space().add(dead);
  Group(*dying, 0).messages().add(dead);
  Group(*dying, 1).messages().add(dead);
  SlotPool(*region).space().add(me);
  die();
  recover();
  EXPECT_EQ(region->header().space.waiters[0].load(), std::uint64_t{1} << me);
  EXPECT_FALSE(Group(*region, 0).messages().anyone());
  EXPECT_FALSE(Group(*region, 1).messages().anyone());
}

TEST_P(RecoveryTest, RecoveryWakesThoseWhoWait) {
  make(2);
  SlotPool(*dying).try_alloc(dead);
  SlotPool(*region).space().add(me);
  Group(*region, 0).messages().add(me);
  std::uint32_t space = region->header().space.sequence.load();
  std::uint32_t messages = region->group(0).messages.sequence.load();
  die();
  recover();
  EXPECT_NE(region->header().space.sequence.load(), space);
  EXPECT_NE(region->group(0).messages.sequence.load(), messages);
}

TEST_P(RecoveryTest, SeveralDeadAreRecoveredInOneCall) {
  make(3);
  auto second = open_again(*region);
  std::uint32_t other = Participants(*second).try_join();
  SlotPool(*dying).try_alloc(dead);
  SlotPool(*second).try_alloc(other);
  die();
  second.reset();
  EXPECT_EQ(recover_the_dead(*region, me, true), 2u);
  EXPECT_EQ(free_slots(*region), 3u);
}

// --- rebuild ---------------------------------------------------------------------------------------------------------

struct Delivery {
  std::uint32_t slot;
  std::uint64_t position;
  std::uint32_t attempts;
  friend bool operator==(const Delivery&, const Delivery&) = default;
  friend std::ostream& operator<<(std::ostream& out, const Delivery& d) {
    return out << "slot " << d.slot << " position " << d.position << " attempts " << d.attempts;
  }
};

class RebuildTest : public RecoveryTest {
 protected:
  std::vector<Delivery> deliveries() {
    std::vector<Delivery> all;
    for (Held held{}; take(held);) {
      all.push_back({held.slot, held.position, held.attempts});
      release(held);
    }
    return all;
  }
  std::uint64_t at(std::uint32_t n) const {
    std::uint64_t p = GetParam();
    while (n-- > 0) p = slots::next_position(p);
    return p;
  }
  void expect_usable() {
    for (std::uint32_t i = 0; i < 3 * region->geometry().order_cells; ++i) {
      ASSERT_NE(send(*region, me), slots::kNoSlot);
      ASSERT_EQ(deliveries().size(), 1u);
    }
    EXPECT_EQ(free_slots(*region), region->geometry().slots);
  }
};

TEST_P(RebuildTest, AnEmptyRegionIsEmptyAndUsable) {
  make(3);
  rebuild(*region);
  EXPECT_TRUE(deliveries().empty());
  EXPECT_EQ(free_slots(*region), 3u);
  expect_usable();
}

TEST_P(RebuildTest, ForgetsEveryParticipantAndWaiter) {
  make(3);
  SlotPool(*dying).space().add(dead);
  Group(*dying, 0).messages().add(dead);
  rebuild(*region);
  EXPECT_EQ(support::used_entries(*region), 0u);
  EXPECT_FALSE(SlotPool(*region).space().anyone());
  EXPECT_FALSE(Group(*region, 0).messages().anyone());
}

TEST_P(RebuildTest, KeepsOrderAndPositions) {
  make(4);
  std::uint32_t s[4];
  for (std::uint32_t& each : s) each = send(*region, me);
  Held held{};
  ASSERT_TRUE(take(held));
  release(held);
  std::uint32_t again = send(*region, me);
  ASSERT_EQ(again, s[0]) << "slots are out of the order of positions";
  rebuild(*region);
  EXPECT_EQ(Group(*region, 0).depth(), 4u);
  EXPECT_EQ(deliveries(),
            (std::vector<Delivery>{{s[1], at(1), 0}, {s[2], at(2), 0}, {s[3], at(3), 0}, {again, at(4), 0}}));
  expect_usable();
}

TEST_P(RebuildTest, WorksWithoutTheOrderThatDidNotReachTheDisk) {
  make(4);
  std::uint32_t s[3];
  for (std::uint32_t& each : s) each = send(*region, me);
  OrderRing::initialise(*region, GetParam());
  region->group(0).cursor.store(GetParam());
  region->free_map(0).store(0xF);
  rebuild(*region);
  EXPECT_EQ(deliveries(), (std::vector<Delivery>{{s[0], at(0), 0}, {s[1], at(1), 0}, {s[2], at(2), 0}}));
  expect_usable();
}

TEST_P(RebuildTest, WhatWasHeldIsDeliveredAgainAndFlagged) {
  make(4);
  std::uint32_t a = send(*region, me);
  std::uint32_t b = send(*region, me);
  Held held{};
  ASSERT_TRUE(Group(*dying, 0).try_take(dead, held));
  rebuild(*region);
  EXPECT_EQ(deliveries(), (std::vector<Delivery>{{a, at(0), 1}, {b, at(1), 0}}));
  expect_usable();
}

TEST_P(RebuildTest, KeepsTheAttemptsOfWhatWasGivenBack) {
  make(4);
  std::uint32_t a = send(*region, me);
  Held held{};
  for (int i = 0; i < 3; ++i) {
    ASSERT_TRUE(take(held));
    Group(*region, 0).give_back(held, me, 0);
  }
  rebuild(*region);
  EXPECT_EQ(deliveries(), (std::vector<Delivery>{{a, at(0), 3}}));
}

TEST_P(RebuildTest, HalfWrittenMessagesAreDroppedAndCommittedOnesKept) {
  make(4);
  SlotPool pool(*dying);
  ASSERT_EQ(pool.try_alloc(dead), 0u);
  std::uint32_t late = pool.try_alloc(dead);
  pool.commit(late, pool.word(late), 1);
  std::uint32_t b = send(*region, me);
  rebuild(*region);
  EXPECT_EQ(deliveries(), (std::vector<Delivery>{{b, at(0), 0}, {late, at(1), 0}}));
  expect_usable();
}

TEST_P(RebuildTest, AMessageFarBehindTheTailIsDelivered) {
  make(2);
  std::uint32_t old = send(*region, me);
  Held held{};
  ASSERT_TRUE(take(held));
  for (int i = 0; i < 30; ++i) {
    ASSERT_NE(send(*region, me), slots::kNoSlot);
    ASSERT_EQ(deliveries().size(), 1u);
  }
  rebuild(*region);
  EXPECT_EQ(deliveries(), (std::vector<Delivery>{{old, at(0), 1}}));
  expect_usable();
}

TEST_P(RebuildTest, DepthCountsMessagesAndNotTheGapsBetweenThem) {
  make(4);
  for (int i = 0; i < 3; ++i) send(*region, me);
  Held first{}, second{};
  ASSERT_TRUE(take(first));
  ASSERT_TRUE(take(second));
  release(second);
  rebuild(*region);
  EXPECT_EQ(Group(*region, 0).depth(), 2u);
}

TEST_P(RebuildTest, RebuildingTwiceIsRebuildingOnce) {
  make(4);
  std::uint32_t a = send(*region, me);
  std::uint32_t b = send(*region, me);
  Held held{};
  ASSERT_TRUE(take(held));
  rebuild(*region);
  rebuild(*region);
  EXPECT_EQ(deliveries(), (std::vector<Delivery>{{a, at(0), 1}, {b, at(1), 0}}));
  expect_usable();
}

#if defined(DSLINE_CRASH_POINTS)

TEST_P(RebuildTest, ARebuildThatWasCutAnywhereIsMadeGoodByTheNext) {
  std::vector<std::string> wrong;
  support::Ending ending = support::Ending::Died;
  for (int store = 1; ending == support::Ending::Died; ++store) {
    make(4);
    // Slot 0 waits again for its second delivery, 1 is held, 2 waits, 3 was not yet in the order.
    for (int i = 0; i < 3; ++i) send(*region, me);
    Held first{}, second{};
    ASSERT_TRUE(take(first));
    ASSERT_TRUE(take(second));
    Group(*region, 0).give_back(first, me, 0);
    SlotPool pool(*dying);
    ASSERT_EQ(pool.try_alloc(dead), 3u);
    pool.commit(3, pool.word(3), 1);
    ending = support::CrashPoint::die_before(store, [this](support::CrashPoint& point) {
      point.arm(region->storage().descriptor());
      rebuild(*region);
    });
    ASSERT_NE(ending, support::Ending::Failed) << "store " << store;
    rebuild(*region);
    std::vector<Delivery> got = deliveries();
    ASSERT_EQ(got.size(), 4u) << "cut before store " << store;
    for (std::uint32_t i = 0; i < 4; ++i) {
      if (got[i].slot != i || (i < 3 && got[i].position != at(i)) || got[i].attempts != (i < 2 ? 1u : 0u)) {
        wrong.push_back("cut before store " + std::to_string(store) + ": " + testing::PrintToString(got[i]));
      }
    }
    ASSERT_EQ(free_slots(*region), 4u) << "cut before store " << store;
  }
  EXPECT_TRUE(wrong.empty()) << testing::PrintToString(wrong);
}

#endif

INSTANTIATE_TEST_SUITE_P(From, RecoveryTest, testing::Values(0, kLap - 2, kLap - 3));
INSTANTIATE_TEST_SUITE_P(From, RebuildTest, testing::Values(0, kLap - 2, kLap - 3));

}  // namespace
}  // namespace dsline::liveness
