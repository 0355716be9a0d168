#include "liveness/recovery.hpp"

#include <gtest/gtest.h>

#include <unistd.h>

#include <map>
#include <vector>

#include "delivery/publication.hpp"
#include "liveness/membership.hpp"
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

// --- groups ----------------------------------------------------------------------------------------------------------

TEST_P(RecoveryTest, AGroupThatDropsReleasesWhatItsDeadMemberHeld) {
  make(3, 2);
  region->group(1).state.store(memory::kGroupNamed | memory::kGroupDurable | memory::kGroupDrops);
  const std::uint32_t s = send(*region, me, 0b11);
  Held held{}, mine{};
  ASSERT_TRUE(Group(*dying, 0).try_take(dead, held));
  ASSERT_TRUE(Group(*dying, 1).try_take(dead, held));
  die();
  recover();
  EXPECT_EQ(word(*region, s).pending(), 0b01u);
  EXPECT_FALSE(take(mine, 1)) << "at most once";
  ASSERT_TRUE(take(mine, 0)) << "the other group's rule is another";
  EXPECT_EQ(mine.attempts, 1u);
  release(mine);
  expect_whole();
}

TEST_P(RecoveryTest, WhatADeadMemberHeldForAGroupThatIsGoneIsReleased) {
  make(3, 2);
  const std::uint32_t s = send(*region, me, 0b10);
  Held held{};
  ASSERT_TRUE(Group(*dying, 1).try_take(dead, held));
  region->header().active.store(0b01);
  die();
  recover();
  EXPECT_TRUE(word(*region, s).is_free());
  EXPECT_EQ(region->free_map(0).load() >> s & 1, 1u);
  expect_whole();
}

TEST_P(RecoveryTest, WhatTheDeadHadTakenToDiscardIsReleasedAndCounted) {
  make(3, 2);
  const std::uint32_t s = send(*region, me, 0b11);
  ASSERT_TRUE(Group(*dying, 0).try_discard_at(s, GetParam(), dead));
  die();
  recover();
  EXPECT_EQ(word(*region, s).pending(), 0b10u);
  EXPECT_EQ(region->group(0).dropped_oldest.load(), 1u);
  EXPECT_EQ(region->group(1).dropped_oldest.load(), 0u);
  Held held{};
  EXPECT_FALSE(take(held, 0)) << "it is not delivered";
  ASSERT_TRUE(take(held, 1));
  EXPECT_EQ(held.attempts, 0u);
  release(held, 1);
  recover_again();
  EXPECT_EQ(region->group(0).dropped_oldest.load(), 1u);
  expect_whole();
}

TEST_P(RecoveryTest, WhatTheDeadHadTakenToSweepAGroupThatIsGoneIsNotCounted) {
  make(3, 2);
  const std::uint32_t s = send(*region, me, 0b10);
  ASSERT_TRUE(Group(*dying, 1).try_discard_at(s, GetParam(), dead));
  region->header().active.store(0b01);
  die();
  recover();
  EXPECT_TRUE(word(*region, s).is_free());
  EXPECT_EQ(region->group(1).dropped_oldest.load(), 0u);
}

TEST_P(RecoveryTest, WhatOthersAreDiscardingStaysTheirs) {
  make(3);
  const std::uint32_t s = send(*region, me);
  ASSERT_TRUE(Group(*region, 0).try_discard_at(s, GetParam(), me));
  die();
  recover();
  EXPECT_EQ(claim(*region, s).who(), Claim::discarder(me));
  EXPECT_EQ(word(*region, s).pending(), 1u);
}

TEST_P(RecoveryTest, TheHistoryThatTheDeadWasTrimmingIsTrimmed) {
  region = make_region({.slots = 4, .groups = 2, .first_position = GetParam(), .rules = {1, 2, 3, 16, 1, 0}});
  me = Participants(*region).try_join();
  dying = open_again(*region);
  dead = Participants(*dying).try_join();
  const std::uint32_t s = send(*region, me, 0b11);
  EXPECT_EQ(drain().size(), 1u);
  ASSERT_TRUE(Group(*dying, 1).try_discard_at(s, GetParam(), dead));
  die();
  recover();
  EXPECT_TRUE(word(*region, s).is_free());
}

TEST_P(RecoveryTest, TheGroupOfTheLastMemberGoesWithItAndADurableOneStays) {
  for (std::uint32_t rules : {0u, memory::kGroupDurable}) {
    region = make_region({.slots = 3, .groups = 2, .first_position = GetParam(), .active = 1});
    me = Participants(*region).try_join();
    dying = open_again(*region);
    dead = Participants(*dying).try_join();
    SlotPool pool(*region);
    Membership groups(*region, pool);
    ASSERT_EQ(groups.make("viewers", rules, JoinAt::Next, dead), 1u);
    send(*region, me, 0b11);
    send(*region, me, 0b11);
    Held held{};
    ASSERT_TRUE(Group(*dying, 1).try_take(dead, held));
    die();
    recover();
    const bool stays = rules != 0;
    EXPECT_EQ(region->header().active.load(), stays ? 0b11u : 0b01u);
    EXPECT_EQ(groups.find("viewers"), stays ? 1u : Membership::kNoGroup);
    EXPECT_EQ(drain().size(), 2u);
    EXPECT_EQ(free_slots(*region), stays ? 1u : 3u);
    EXPECT_EQ(Group(*region, 1).depth(), stays ? 2u : 0u);
  }
}

TEST_P(RecoveryTest, AGroupWithAnotherMemberGoesOn) {
  region = make_region({.slots = 3, .groups = 2, .first_position = GetParam(), .active = 1});
  me = Participants(*region).try_join();
  dying = open_again(*region);
  dead = Participants(*dying).try_join();
  SlotPool pool(*region);
  Membership groups(*region, pool);
  ASSERT_EQ(groups.make("viewers", 0, JoinAt::Next, dead), 1u);
  groups.enter(1, me);
  send(*region, me, 0b10);
  Held held{};
  ASSERT_TRUE(Group(*dying, 1).try_take(dead, held));
  die();
  recover();
  ASSERT_TRUE(take(held, 1));
  EXPECT_EQ(held.attempts, 1u);
}

TEST_P(RecoveryTest, WhileAnotherHasTheControlLockAMemberIsLeftForTheNextTimeAndItsMessagesAreNot) {
  region = make_region({.slots = 3, .groups = 2, .first_position = GetParam(), .active = 1});
  me = Participants(*region).try_join();
  dying = open_again(*region);
  dead = Participants(*dying).try_join();
  auto third = open_again(*region);
  SlotPool pool(*region);
  Membership groups(*region, pool);
  ASSERT_EQ(groups.make("viewers", 0, JoinAt::Next, dead), 1u);
  groups.enter(1, me);
  send(*region, me, 0b11);
  Held held{};
  ASSERT_TRUE(Group(*dying, 1).try_take(dead, held));
  ASSERT_EQ(SlotPool(*dying).try_alloc(dead), 1u);
  die();
  ASSERT_TRUE(third->storage().try_lock(memory::kControlLock));
  for (int i = 0; i < 3; ++i) EXPECT_EQ(recover_the_dead(*region, me, false), 0u);
  EXPECT_EQ(Participants(*region).entry(dead).state(), EntryState::Used);
  EXPECT_EQ(region->header().deaths.load(), 0u);
  EXPECT_EQ(free_slots(*region), 2u);
  ASSERT_TRUE(take(held, 1)) << "it waits for nobody";
  EXPECT_EQ(held.attempts, 1u);
  third->storage().unlock(memory::kControlLock);
  EXPECT_EQ(recover_the_dead(*region, me, false), 1u);
  EXPECT_EQ(Participants(*region).entry(dead).state(), EntryState::Free);
  EXPECT_EQ(region->header().deaths.load(), 1u);
  EXPECT_EQ(region->header().death[0].held.load(), 1u) << "what was given back at the first try counts";
  EXPECT_EQ(region->header().death[0].writing.load(), 1u);
  EXPECT_FALSE(third->storage().is_locked(memory::kControlLock));
}

TEST_P(RecoveryTest, OneWithoutANamedGroupNeedsNoControlLock) {
  make(2);
  auto third = open_again(*region);
  ASSERT_TRUE(third->storage().try_lock(memory::kControlLock));
  die();
  EXPECT_EQ(recover_the_dead(*region, me, false), 1u);
}

TEST_P(RecoveryTest, ADeathIsOnRecord) {
  make(4);
  region->participant(dead).group.store(1);
  memory::ParticipantState& entry = region->participant(dead);
  const std::uint64_t joined = entry.joined_ns.load(), started = entry.start_time.load();
  send(*region, me);
  send(*region, me);
  Held held{};
  ASSERT_TRUE(Group(*dying, 0).try_take(dead, held));
  ASSERT_TRUE(Group(*dying, 0).try_take(dead, held));
  SlotPool pool(*dying);
  ASSERT_NE(pool.try_alloc(dead), slots::kNoSlot);
  die();
  recover();
  EXPECT_EQ(region->header().deaths.load(), 1u);
  const memory::DeathState& record = region->header().death[0];
  EXPECT_EQ(record.sequence.load(), 1u);
  EXPECT_EQ(record.pid.load(), static_cast<std::uint32_t>(getpid()));
  EXPECT_EQ(record.participant.load(), dead);
  EXPECT_EQ(record.joined_ns.load(), joined);
  EXPECT_EQ(record.start_time.load(), started);
  EXPECT_EQ(record.group.load(), 1u);
  EXPECT_EQ(record.held.load(), 2u);
  EXPECT_EQ(record.writing.load(), 1u);
  EXPECT_GE(record.noticed_ns.load(), joined);
}

TEST_P(RecoveryTest, WhatOneDeadMemberHeldIsNotCountedForTheNextWithItsNumber) {
  make(4);
  send(*region, me);
  Held held{};
  ASSERT_TRUE(Group(*dying, 0).try_take(dead, held));
  die();
  recover();
  support::Peer next(*region);
  ASSERT_EQ(next.number, dead);
  next.die();
  recover();
  EXPECT_EQ(region->header().death[1].held.load(), 0u);
}

TEST_P(RecoveryTest, ManyDeathsKeepTheLastOnRecord) {
  make(2);
  die();
  recover();
  for (std::uint64_t i = 1; i < memory::kDeathsKept + 3; ++i) {
    support::Peer next(*region);
    next.die();
    ASSERT_EQ(recover_the_dead(*region, me, true), 1u);
  }
  EXPECT_EQ(region->header().deaths.load(), memory::kDeathsKept + 3);
  EXPECT_EQ(region->header().death[0].sequence.load(), memory::kDeathsKept + 1);
  EXPECT_EQ(region->header().death[2].sequence.load(), memory::kDeathsKept + 3);
  EXPECT_EQ(region->header().death[3].sequence.load(), 4u);
}

TEST_P(RecoveryTest, WhoDiedWithAMessageIsNotedForTheGroup) {
  make(3, 2);
  const std::uint32_t s = send(*region, me, 0b11);
  Held held{};
  ASSERT_TRUE(Group(*dying, 1).try_take(dead, held));
  die();
  recover();
  EXPECT_EQ(region->notes(s, 1).last_holder.load(),
            std::uint64_t{static_cast<std::uint32_t>(getpid())} << 32 | memory::kHolderDied);
  EXPECT_EQ(region->notes(s, 0).last_holder.load(), 0u);
}

TEST_P(RecoveryTest, WhatCarriesANumberThatNobodyHadIsFreedForItsNewOwner) {
  make(4);
  const std::uint32_t s = send(*region, me);
  region->claim(s, 0).store(Claim::make(GetParam(), 0, Claim::holder(3)).bits);
  ASSERT_NE(SlotPool(*region).try_alloc(3), slots::kNoSlot);
  recover_leftovers(*region, 3);
  EXPECT_EQ(free_slots(*region), 3u);
  Held held{};
  ASSERT_TRUE(take(held));
  EXPECT_EQ(held.attempts, 1u);
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

TEST_P(RebuildTest, KeepsTheDefaultGroupAndDurableOnesAndEndsTheOthers) {
  region = make_region({.slots = 4, .groups = 3, .first_position = GetParam(), .active = 1});
  me = Participants(*region).try_join();
  SlotPool pool(*region);
  Membership groups(*region, pool);
  ASSERT_EQ(groups.make("durable", memory::kGroupDurable, JoinAt::Next, me), 1u);
  ASSERT_EQ(groups.make("viewers", 0, JoinAt::Next, me), 2u);
  const std::uint32_t both = send(*region, me, 0b011);
  const std::uint32_t gone = send(*region, me, 0b100);
  rebuild(*region);
  EXPECT_EQ(region->header().active.load(), 0b011u);
  EXPECT_EQ(groups.find("durable"), 1u);
  EXPECT_EQ(groups.find("viewers"), Membership::kNoGroup);
  EXPECT_TRUE(word(*region, gone).is_free());
  EXPECT_EQ(word(*region, both).pending(), 0b011u);
  EXPECT_EQ(drain(), (std::vector<std::uint32_t>{both}));
  Held held{};
  ASSERT_TRUE(take(held, 1));
  EXPECT_EQ(held.slot, both);
  EXPECT_EQ(held.attempts, 0u);
  EXPECT_FALSE(take(held, 1));
}

TEST_P(RebuildTest, KeepsDeadLettersWhatTheyWere) {
  make(4);
  send(*region, me);
  const std::uint32_t b = send(*region, me);
  Held held{};
  ASSERT_TRUE(take(held));
  region->claim(held.slot, 0).store(claim(*region, held.slot).with(3, Claim::kDead).bits);
  rebuild(*region);
  EXPECT_EQ(claim(*region, held.slot), Claim::make(GetParam(), 3, Claim::kDead));
  EXPECT_EQ(deliveries(), (std::vector<Delivery>{{b, at(1), 0}})) << "nobody is to receive it";
}

TEST_P(RebuildTest, WhatWasBeingDiscardedIsGone) {
  make(4);
  const std::uint32_t a = send(*region, me);
  const std::uint32_t b = send(*region, me);
  ASSERT_TRUE(Group(*region, 0).try_discard_at(a, GetParam(), me));
  rebuild(*region);
  EXPECT_TRUE(word(*region, a).is_free());
  EXPECT_EQ(deliveries(), (std::vector<Delivery>{{b, at(1), 0}}));
}

TEST_P(RebuildTest, KeepsTheHistory) {
  region = make_region({.slots = 5, .groups = 2, .first_position = GetParam(), .rules = {1, 3, 3, 16, 1, 0}});
  me = Participants(*region).try_join();
  for (int i = 0; i < 3; ++i) send(*region, me, 0b11);
  EXPECT_EQ(deliveries().size(), 3u);
  rebuild(*region);
  EXPECT_EQ(Group(*region, 1).depth(), 3u);
  SlotPool pool(*region);
  delivery::Publication publication(*region, pool);
  for (int i = 0; i < 3; ++i) EXPECT_TRUE(publication.drop_history(me)) << i;
  EXPECT_EQ(free_slots(*region), 5u);
}

TEST_P(RebuildTest, AShutDownChannelStaysOne) {
  make(2);
  region->header().active.fetch_or(memory::kShutDown);
  rebuild(*region);
  EXPECT_EQ(region->header().active.load(), memory::kShutDown | 1);
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
