#include "liveness/membership.hpp"

#include <gtest/gtest.h>

#include <algorithm>
#include <string>
#include <thread>
#include <vector>

#include "liveness/recovery.hpp"
#include "order/group.hpp"
#include "support/crash_points.hpp"
#include "support/small_region.hpp"

namespace dsline::liveness {
namespace {

using order::Group;
using order::Held;
using slots::Claim;
using slots::SlotPhase;
using slots::SlotPool;
using slots::SlotWord;
using support::claim;
using support::free_slots;
using support::make_region;
using support::Peer;
using support::word;

constexpr std::uint64_t kLap = std::uint64_t{1} << 44;
constexpr std::uint32_t kNoGroup = Membership::kNoGroup;
constexpr std::uint32_t kDefault = 1;  // the bit of the default group

/// The default group is active, `named` numbers are there for others; the first of them is 1.
class MembershipTest : public testing::TestWithParam<std::uint64_t> {
 protected:
  void make(std::uint32_t slots, std::uint32_t named = 2, std::uint32_t history = 0) {
    support::Shape shape{.slots = slots, .groups = 1 + named + (history != 0), .participants = 8};
    shape.first_position = GetParam();
    shape.rules.history = history;
    shape.active = kDefault | (history != 0 ? 1u << (named + 1) : 0);
    region = make_region(shape);
    pool.emplace(*region);
    groups.emplace(*region, *pool);
    me = Participants(*region).try_join();
    other.emplace(*region);
  }

  std::uint32_t join(JoinAt start = JoinAt::Next, const std::string& name = "viewers") {
    return groups->make(name, 0, start, me);
  }
  std::uint32_t active() const { return static_cast<std::uint32_t>(region->header().active.load()); }
  bool is_active(std::uint32_t g) const { return (active() >> g & 1) != 0; }
  /// A message for whoever is there.
  std::uint32_t send() { return support::send(*region, me, active()); }
  /// The same up to P1: committed with ENQ, not in the order.
  std::uint32_t commit(std::uint32_t bits) {
    const std::uint32_t s = pool->try_alloc(other->number);
    pool->commit(s, pool->word(s), bits);
    return s;
  }
  void finish(std::uint32_t s, std::uint32_t bits) {
    order::OrderRing ring(*region);
    order::OrderRing::Entered entered = ring.enter(s, bits);
    pool->clear_pending(s, slots::kEnqueueing);
    ring.advance_tail(entered);
  }
  Held take(std::uint32_t g, std::uint32_t who) {
    Held held{~0u, 0, 0};
    EXPECT_TRUE(Group(*region, g).try_take(who, held));
    return held;
  }
  void release(std::uint32_t s, std::uint32_t g) { pool->clear_pending(s, 1u << g); }
  /// Positions of what group `g` still gets, counted from the first of the channel; each is released.
  std::vector<std::uint64_t> drain(std::uint32_t g) {
    std::vector<std::uint64_t> all;
    for (Held held{}; Group(*region, g).try_take(me, held);) {
      EXPECT_EQ(region->slot(held.slot).position.load(), held.position);
      all.push_back(index_of(held.position));
      release(held.slot, g);
    }
    return all;
  }
  /// How manieth position it is: one value is skipped at each wrap.
  std::uint64_t index_of(std::uint64_t position) const {
    std::uint64_t p = GetParam(), n = 0;
    for (; p != position && n < 1000; ++n) p = slots::next_position(p);
    return n;
  }
  std::uint64_t free() const { return free_slots(*region); }

  std::unique_ptr<memory::Region> region;
  std::optional<SlotPool> pool;
  std::optional<Membership> groups;
  std::optional<Peer> other;
  std::uint32_t me = 0;
};

INSTANTIATE_TEST_SUITE_P(From, MembershipTest, testing::Values(0, kLap - 2, kLap - 3));

using Positions = std::vector<std::uint64_t>;

// --- names and numbers -----------------------------------------------------------------------------------------------

TEST_P(MembershipTest, AGroupIsFoundByExactlyItsName) {
  make(2, 3);
  EXPECT_EQ(groups->find("viewers"), kNoGroup);
  const std::uint32_t g = join();
  ASSERT_EQ(g, 1u);
  EXPECT_EQ(groups->find("viewers"), g);
  EXPECT_EQ(groups->name(g), "viewers");
  for (const char* name : {"viewer", "viewers2", "Viewers", "", "v"})
    EXPECT_EQ(groups->find(name), kNoGroup) << name;
}

TEST_P(MembershipTest, NamesThatDifferInTheirLastByteAreTwoGroups) {
  make(2);
  const std::string a(memory::kMaxGroupName, 'n'), b = std::string(memory::kMaxGroupName - 1, 'n') + "m";
  ASSERT_EQ(join(JoinAt::Next, a), 1u);
  ASSERT_EQ(join(JoinAt::Next, b), 2u);
  EXPECT_EQ(groups->find(a), 1u);
  EXPECT_EQ(groups->find(b), 2u);
  EXPECT_EQ(groups->name(1), a);
  EXPECT_EQ(groups->name(2), b);
}

TEST_P(MembershipTest, AShorterNameDoesNotKeepTheEndOfTheLongerOneBeforeIt) {
  make(2, 1);
  ASSERT_EQ(join(JoinAt::Next, std::string(60, 'x')), 1u);
  groups->leave(me);
  ASSERT_EQ(join(JoinAt::Next, "y"), 1u);
  EXPECT_EQ(groups->name(1), "y");
  EXPECT_EQ(groups->find("y"), 1u);
}

TEST_P(MembershipTest, AGroupHasTheRulesItWasMadeWith) {
  make(2, 4);
  for (std::uint32_t rules :
       {0u, memory::kGroupDurable, memory::kGroupDrops, memory::kGroupDurable | memory::kGroupDrops}) {
    const std::uint32_t g =
        groups->make("g" + std::to_string(rules), rules, JoinAt::Next, Peer(*region).number);
    ASSERT_NE(g, kNoGroup);
    EXPECT_EQ(groups->rules(g), rules);
  }
}

TEST_P(MembershipTest, WhoeverMakesAGroupIsItsMemberAndItIsActive) {
  make(2);
  const std::uint32_t g = join();
  EXPECT_EQ(region->participant(me).group.load(), g + 1);
  EXPECT_TRUE(is_active(g));
  EXPECT_FALSE(groups->anything_stale());
}

TEST_P(MembershipTest, WhenAllNumbersAreTakenThereIsNone) {
  make(2, 2);
  Peer third(*region);
  ASSERT_EQ(groups->make("a", 0, JoinAt::Next, me), 1u);
  ASSERT_EQ(groups->make("b", 0, JoinAt::Next, other->number), 2u);
  EXPECT_EQ(groups->make("c", 0, JoinAt::Next, third.number), kNoGroup);
  EXPECT_EQ(groups->find("c"), kNoGroup);
  EXPECT_EQ(region->participant(third.number).group.load(), 0u);
}

TEST_P(MembershipTest, TheNumberOfTheHistoryIsNeverGiven) {
  make(3, 1, 1);
  ASSERT_EQ(join(), 1u);
  EXPECT_EQ(groups->make("more", 0, JoinAt::Next, other->number), kNoGroup);
  EXPECT_EQ(active(), 0b111u);
}

TEST_P(MembershipTest, CountersStartAnewWithANewGroup) {
  make(2, 1);
  const std::uint32_t g = join();
  const std::uint32_t before = region->group(g).joined.load();
  region->group(g).dropped_oldest.store(7);
  region->group(g).redelivered.store(8);
  groups->leave(me);
  ASSERT_EQ(join(), g);
  EXPECT_EQ(region->group(g).dropped_oldest.load(), 0u);
  EXPECT_EQ(region->group(g).redelivered.load(), 0u);
  EXPECT_EQ(region->group(g).joined.load(), before + 1);
}

// --- leaving ---------------------------------------------------------------------------------------------------------

TEST_P(MembershipTest, AGroupEndsWithItsLastMemberAndNotBefore) {
  make(2);
  const std::uint32_t g = join();
  groups->enter(g, other->number);
  groups->leave(me);
  EXPECT_TRUE(is_active(g));
  EXPECT_EQ(region->participant(me).group.load(), 0u);
  groups->leave(other->number);
  EXPECT_FALSE(is_active(g));
  EXPECT_EQ(groups->find("viewers"), kNoGroup);
}

TEST_P(MembershipTest, WhatWaitedForAGroupThatEndedIsReleased) {
  make(3);
  join();
  for (int i = 0; i < 3; ++i) send();
  EXPECT_EQ(drain(0).size(), 3u);
  EXPECT_EQ(free(), 0u);
  groups->leave(me);
  EXPECT_EQ(free(), 3u);
  EXPECT_EQ(region->free_map(0).load() & 0b111, 0b111u);
}

TEST_P(MembershipTest, WhatOtherGroupsStillNeedStays) {
  make(3);
  join();
  for (int i = 0; i < 3; ++i) send();
  groups->leave(me);
  EXPECT_EQ(free(), 0u);
  EXPECT_EQ(drain(0), (Positions{0, 1, 2}));
  EXPECT_EQ(free(), 3u);
}

TEST_P(MembershipTest, LeavingTheDefaultGroupEndsNothing) {
  make(2);
  groups->enter(0, me);
  send();
  groups->leave(me);
  EXPECT_TRUE(is_active(0));
  EXPECT_EQ(drain(0), (Positions{0}));
}

TEST_P(MembershipTest, LeavingWhereOneIsNoMemberEndsNobodysGroup) {
  make(2);
  const std::uint32_t g = join();
  groups->leave(other->number);
  EXPECT_TRUE(is_active(g));
}

TEST_P(MembershipTest, ADurableGroupStaysWithoutMembersAndCollectsMessages) {
  make(3);
  const std::uint32_t g = groups->make("viewers", memory::kGroupDurable, JoinAt::Next, me);
  groups->leave(me);
  EXPECT_TRUE(is_active(g));
  EXPECT_FALSE(groups->anything_stale());
  groups->remove_abandoned(kNoGroup, me);
  send();
  send();
  ASSERT_EQ(groups->find("viewers"), g);
  groups->enter(g, other->number);
  EXPECT_EQ(drain(g), (Positions{0, 1}));
}

TEST_P(MembershipTest, RemovingAGroupWakesItsMembersAndReleasesWhatWaited) {
  make(2);
  const std::uint32_t g = groups->make("viewers", memory::kGroupDurable, JoinAt::Next, me);
  groups->enter(g, other->number);
  send();
  drain(0);
  Group(*region, g).messages().add(other->number);
  const std::uint32_t before = Group(*region, g).messages().sequence();
  groups->remove(g, me);
  EXPECT_FALSE(is_active(g));
  EXPECT_NE(Group(*region, g).messages().sequence(), before);
  EXPECT_EQ(free(), 2u);
  EXPECT_EQ(groups->rules(g), 0u);
}

TEST_P(MembershipTest, OneGroupEndingLeavesTheOthers) {
  make(2);
  const std::uint32_t a = join(JoinAt::Next, "a");
  const std::uint32_t b = groups->make("b", 0, JoinAt::Next, other->number);
  send();
  groups->leave(me);
  EXPECT_FALSE(is_active(a));
  EXPECT_EQ(drain(b), (Positions{0}));
  EXPECT_EQ(drain(0), (Positions{0}));
  EXPECT_EQ(free(), 2u);
}

TEST_P(MembershipTest, AGroupWithoutMembersIsAbandonedWhoeverLooks) {
  make(2);
  const std::uint32_t g = join();
  region->participant(me).group.store(0);  // left without the control lock
  EXPECT_TRUE(groups->anything_stale());
  groups->remove_abandoned(kNoGroup, other->number);
  EXPECT_FALSE(is_active(g));
  EXPECT_FALSE(groups->anything_stale());
}

TEST_P(MembershipTest, TheOneThatIsBeingRecoveredDoesNotCountAsAMember) {
  make(2);
  const std::uint32_t g = groups->make("viewers", 0, JoinAt::Next, other->number);
  groups->remove_abandoned(kNoGroup, me);
  EXPECT_TRUE(is_active(g));
  groups->remove_abandoned(other->number, me);
  EXPECT_FALSE(is_active(g));
}

TEST_P(MembershipTest, ADeadMemberKeepsItsGroupUntilItIsRecovered) {
  make(2);
  const std::uint32_t g = groups->make("viewers", 0, JoinAt::Next, other->number);
  send();
  drain(0);
  other->die();
  groups->remove_abandoned(kNoGroup, me);
  EXPECT_TRUE(is_active(g)) << "its claims are still to be recovered";
  EXPECT_EQ(recover_the_dead(*region, me, true), 1u);
  EXPECT_FALSE(is_active(g));
  EXPECT_EQ(free(), 2u);
}

TEST_P(MembershipTest, JoiningClearsAwayAbandonedGroupsFirst) {
  make(2, 1);
  join(JoinAt::Next, "old");
  send();
  drain(0);
  region->participant(me).group.store(0);
  EXPECT_EQ(groups->make("new", 0, JoinAt::Next, other->number), 1u);
  EXPECT_EQ(free(), 2u);
  EXPECT_EQ(drain(1), Positions{});
}

// --- what is swept ---------------------------------------------------------------------------------------------------

TEST_P(MembershipTest, ASweepReleasesUnclaimedGivenBackAndDeadOnes) {
  make(3);
  const std::uint32_t g = join();
  for (int i = 0; i < 3; ++i) send();
  drain(0);
  const Held back = take(g, other->number), dead = take(g, other->number);
  Group(*region, g).give_back(back, other->number, 0);
  region->claim(dead.slot, g).store(claim(*region, dead.slot, g).with(3, Claim::kDead).bits);
  region->header().active.fetch_and(~(std::uint64_t{1} << g));
  EXPECT_TRUE(groups->anything_stale());
  groups->sweep(me);
  EXPECT_EQ(free(), 3u);
  EXPECT_FALSE(groups->anything_stale());
}

TEST_P(MembershipTest, ASweepTouchesNothingOfActiveGroups) {
  make(2);
  const std::uint32_t g = join();
  send();
  groups->sweep(me);
  EXPECT_EQ(drain(0), (Positions{0}));
  EXPECT_EQ(drain(g), (Positions{0}));
}

TEST_P(MembershipTest, ASweepLeavesWhatALiveMemberHoldsUntilItIsReleased) {
  make(2);
  const std::uint32_t g = join();
  const std::uint32_t s = send();
  drain(0);
  take(g, other->number);
  groups->leave(me);
  groups->sweep(me);
  EXPECT_EQ(word(*region, s).pending(), 1u << g);
  EXPECT_EQ(claim(*region, s, g).who(), Claim::holder(other->number));
  EXPECT_TRUE(groups->anything_stale());
  release(s, g);
  EXPECT_EQ(free(), 2u);
  EXPECT_FALSE(groups->anything_stale());
}

TEST_P(MembershipTest, ASweepLeavesWhatItsSenderIsStillEntering) {
  make(2);
  const std::uint32_t g = join();
  const std::uint32_t s = commit(kDefault | 1u << g);
  groups->leave(me);
  EXPECT_EQ(word(*region, s).pending(), kDefault | 1u << g | slots::kEnqueueing);
  order::OrderRing ring(*region);
  const auto entered = ring.enter(s, kDefault | 1u << g);
  groups->sweep(me);
  EXPECT_EQ(claim(*region, s, g).who(), Claim::kNobody) << "in the order, and ENQ is set";
  pool->clear_pending(s, slots::kEnqueueing);
  ring.advance_tail(entered);
  groups->sweep(me);
  EXPECT_EQ(word(*region, s).pending(), kDefault);
  EXPECT_EQ(drain(0), (Positions{0}));
  EXPECT_EQ(free(), 2u);
}

TEST_P(MembershipTest, ASweepLeavesWhatAnotherParticipantIsDiscarding) {
  make(2);
  const std::uint32_t g = join();
  const std::uint32_t s = send();
  drain(0);
  ASSERT_TRUE(Group(*region, g).try_discard_at(s, GetParam(), other->number));
  groups->leave(me);
  EXPECT_EQ(claim(*region, s, g).who(), Claim::discarder(other->number));
  EXPECT_EQ(word(*region, s).pending(), 1u << g);
}

TEST_P(MembershipTest, ASweepFinishesThatOfOneWhoWasNoParticipantYetWhenItDied) {
  make(2);
  const std::uint32_t g = join();
  const std::uint32_t s = send();
  drain(0);
  region->header().active.fetch_and(~(std::uint64_t{1} << g));
  region->claim(s, g).store(claim(*region, s, g).with(0, Claim::discarder(Participants::kNobody)).bits);
  ASSERT_EQ(claim(*region, s, g).who(), Claim::kDiscard);
  groups->sweep(me);
  EXPECT_EQ(free(), 2u);
}

TEST_P(MembershipTest, ASweepByOneWhoIsNoParticipantYetLeavesNoNumberBehind) {
  make(2);
  join();
  send();
  drain(0);
  region->participant(me).group.store(0);
  groups->remove_abandoned(kNoGroup, Participants::kNobody);
  EXPECT_EQ(free(), 2u);
}

TEST_P(MembershipTest, ASweepTakesNoClaimWithoutAPosition) {
  make(2);
  const std::uint32_t s = send();
  region->slot(s).word.store(SlotWord::make(1, me, SlotPhase::Committed, kDefault | 0b10).bits);
  ASSERT_EQ(claim(*region, s, 1), Claim::none());
  groups->sweep(me);
  EXPECT_EQ(claim(*region, s, 1), Claim::none());
}

// --- a number is used again ------------------------------------------------------------------------------------------

TEST_P(MembershipTest, ANumberIsNotGivenWhileAMessageOfTheOldGroupIsHeld) {
  make(2, 1);
  const std::uint32_t g = join();
  const std::uint32_t s = send();
  take(g, other->number);
  groups->leave(me);
  EXPECT_EQ(join(JoinAt::Next, "new"), kNoGroup);
  EXPECT_EQ(region->participant(me).group.load(), 0u);
  EXPECT_FALSE(is_active(g));
  release(s, g);
  EXPECT_EQ(join(JoinAt::Next, "new"), g);
}

TEST_P(MembershipTest, AnotherNumberIsGivenMeanwhile) {
  make(2, 2);
  const std::uint32_t g = join();
  const std::uint32_t s = send();
  take(g, other->number);
  groups->leave(me);
  EXPECT_EQ(join(JoinAt::Next, "new"), 2u);
  EXPECT_EQ(region->participant(me).group.load(), 3u);
  release(s, g);
}

TEST_P(MembershipTest, ANumberIsNotGivenWhileASenderIsEnteringAMessageForTheOldGroup) {
  make(2, 1);
  const std::uint32_t g = join();
  const std::uint32_t s = commit(kDefault | 1u << g);
  groups->leave(me);
  EXPECT_EQ(join(JoinAt::Next, "new"), kNoGroup);
  finish(s, kDefault | 1u << g);
  ASSERT_EQ(join(JoinAt::Next, "new"), g);
  EXPECT_EQ(drain(g), Positions{}) << "a message of the old group";
  EXPECT_EQ(drain(0), (Positions{0}));
  EXPECT_EQ(free(), 2u);
}

TEST_P(MembershipTest, ANumberIsNotGivenWhileSomebodyIsDiscardingAMessageOfTheOldGroup) {
  make(2, 1);
  const std::uint32_t g = join();
  const std::uint32_t s = send();
  ASSERT_TRUE(Group(*region, g).try_discard_at(s, GetParam(), other->number));
  groups->leave(me);
  EXPECT_EQ(join(JoinAt::Next, "new"), kNoGroup);
  release(s, g);
  EXPECT_EQ(join(JoinAt::Next, "new"), g);
}

TEST_P(MembershipTest, WhatWaitedUnclaimedForTheOldGroupIsNotTheNewOnes) {
  make(3, 1);
  const std::uint32_t g = join();
  send();
  send();
  region->header().active.fetch_and(~(std::uint64_t{1} << g));  // died in leave(), before the sweep
  region->participant(me).group.store(0);
  ASSERT_EQ(join(JoinAt::Next, "new"), g);
  send();
  EXPECT_EQ(drain(g), (Positions{2}));
  EXPECT_EQ(drain(0), (Positions{0, 1, 2}));
  EXPECT_EQ(free(), 3u);
}

TEST_P(MembershipTest, ASenderThatHadSeenAGroupThatLeftLeavesItsBitToTheSweep) {
  make(2);
  const std::uint32_t g = join();
  const std::uint32_t seen = active();
  const std::uint32_t s = pool->try_alloc(other->number);
  groups->leave(me);
  support::publish(*region, s, other->number, seen);
  EXPECT_TRUE(groups->anything_stale());
  groups->sweep(me);
  EXPECT_FALSE(groups->anything_stale());
  EXPECT_EQ(word(*region, s).pending(), kDefault);
  EXPECT_EQ(drain(g), Positions{});
  EXPECT_EQ(drain(0), (Positions{0}));
  EXPECT_EQ(free(), 2u);
}

TEST_P(MembershipTest, ASenderThatHadSeenTheOldOwnerOfANumberSendsToTheNewOne) {
  make(3, 1);
  const std::uint32_t g = join();
  const std::uint32_t seen = active();
  const std::uint32_t s = pool->try_alloc(other->number);
  groups->leave(me);
  ASSERT_EQ(join(JoinAt::Next, "new"), g);
  const std::uint32_t later = send();
  support::publish(*region, s, other->number, seen);
  EXPECT_NE(later, s);
  EXPECT_EQ(drain(g), (Positions{0, 1}));
  EXPECT_EQ(drain(0), (Positions{0, 1}));
  EXPECT_EQ(free(), 3u);
}

// --- late joiners ----------------------------------------------------------------------------------------------------

TEST_P(MembershipTest, NextStartsWithTheFirstMessageAfterTheJoin) {
  make(4);
  send();
  send();
  const std::uint32_t g = join(JoinAt::Next);
  EXPECT_EQ(drain(g), Positions{});
  send();
  EXPECT_EQ(drain(g), (Positions{2}));
  EXPECT_EQ(drain(0), (Positions{0, 1, 2}));
  EXPECT_EQ(free(), 4u);
}

TEST_P(MembershipTest, OldestStartsWithTheOldestMessageThatSomebodyNeeds) {
  make(4);
  for (int i = 0; i < 3; ++i) send();
  release(take(0, me).slot, 0);
  const std::uint32_t g = join(JoinAt::Oldest);
  send();
  EXPECT_EQ(drain(g), (Positions{1, 2, 3})) << "0 was released before";
  EXPECT_EQ(drain(0), (Positions{1, 2, 3}));
  EXPECT_EQ(free(), 4u);
}

TEST_P(MembershipTest, LatestStartsWithTheNewestMessage) {
  make(4);
  for (int i = 0; i < 3; ++i) send();
  const std::uint32_t g = join(JoinAt::Latest);
  send();
  EXPECT_EQ(drain(g), (Positions{2, 3}));
  EXPECT_EQ(drain(0), (Positions{0, 1, 2, 3}));
  EXPECT_EQ(free(), 4u);
}

TEST_P(MembershipTest, AnEmptyChannelStartsEveryGroupAtItsEnd) {
  make(4, 2);
  send();
  drain(0);
  for (JoinAt start : {JoinAt::Oldest, JoinAt::Latest}) {
    const std::uint32_t g = join(start);
    EXPECT_EQ(drain(g), Positions{});
    send();
    EXPECT_EQ(drain(g).size(), 1u);
    drain(0);
    groups->leave(me);
  }
  EXPECT_EQ(free(), 4u);
}

TEST_P(MembershipTest, OldMessagesComeInTheOrderOfPositionsWhateverTheirSlots) {
  make(5);
  for (int i = 0; i < 4; ++i) send();
  Held first = take(0, me), second = take(0, me), third = take(0, me);
  release(second.slot, 0);
  send();
  release(first.slot, 0);
  send();
  release(third.slot, 0);
  send();
  const std::uint32_t g = join(JoinAt::Oldest);
  EXPECT_EQ(drain(g), (Positions{3, 4, 5, 6}));
  EXPECT_EQ(drain(0), (Positions{3, 4, 5, 6}));
}

TEST_P(MembershipTest, TheHistoryIsOfferedThoughNobodyElseNeedsIt) {
  make(5, 1, 3);
  const std::uint32_t retained = region->retention_group();
  for (int i = 0; i < 3; ++i) send();
  EXPECT_EQ(drain(0), (Positions{0, 1, 2}));
  const std::uint32_t g = join(JoinAt::Oldest);
  EXPECT_EQ(drain(g), (Positions{0, 1, 2}));
  EXPECT_EQ(Group(*region, retained).depth(), 3u) << "the history still has them";
}

TEST_P(MembershipTest, WhatTheLastOwnerOfTheNumberHadReadIsOfferedToTheNextOne) {
  make(5, 1, 3);
  for (int i = 0; i < 3; ++i) send();
  for (int round = 0; round < 3; ++round) {
    ASSERT_EQ(join(JoinAt::Oldest), 1u) << round;
    if (round != 1) {
      EXPECT_EQ(drain(1), (Positions{0, 1, 2})) << round;
    }
    groups->leave(me);
  }
  EXPECT_EQ(drain(0), (Positions{0, 1, 2}));
}

TEST_P(MembershipTest, WhatAnotherGroupsMemberHoldsIsOffered) {
  make(3);
  send();
  const Held held = take(0, other->number);
  const std::uint32_t g = join(JoinAt::Oldest);
  EXPECT_EQ(drain(g), (Positions{0}));
  EXPECT_EQ(claim(*region, held.slot, 0).who(), Claim::holder(other->number));
}

TEST_P(MembershipTest, DeadLettersAreNotOfferedUnlessSomebodyElseNeedsThem) {
  make(4, 2);
  const std::uint32_t second = groups->make("second", 0, JoinAt::Next, other->number);
  send();
  send();
  for (int i = 0; i < 2; ++i) {
    const Held held = take(0, other->number);
    region->claim(held.slot, 0).store(claim(*region, held.slot, 0).with(3, Claim::kDead).bits);
  }
  release(take(second, other->number).slot, second);
  const std::uint32_t g = join(JoinAt::Oldest, "late");
  EXPECT_EQ(drain(g), (Positions{1})) << "0 is a dead letter for all that still have it";
}

TEST_P(MembershipTest, OnlyTheLastPoolOfPositionsIsOffered) {
  for (std::uint32_t later : {1u, 2u, 3u, 20u}) {
    make(3, 1);
    send();
    const Held old = take(0, other->number);
    for (std::uint32_t i = 0; i < later; ++i) {
      send();
      drain(0);
    }
    const std::uint32_t g = join(JoinAt::Oldest);
    // Around a wrap the skipped position counts as well.
    const std::uint64_t tail = order::OrderRing(*region).tail_guess();
    const bool near = slots::distance(old.position & slots::kPositionMask, tail) >= -3;
    EXPECT_TRUE(near ? later <= 2 : later >= 2) << later;
    EXPECT_EQ(drain(g), near ? Positions{0} : Positions{}) << later << " later messages";
    release(old.slot, 0);
    EXPECT_EQ(free(), 3u);
  }
}

TEST_P(MembershipTest, AMessageThatIsNotInTheOrderYetIsNotOffered) {
  make(3, 1);
  const std::uint32_t s = commit(kDefault);
  const std::uint32_t g = join(JoinAt::Oldest);  // waits a moment for its sender
  EXPECT_EQ(word(*region, s).pending(), kDefault | slots::kEnqueueing);
  finish(s, kDefault);
  send();
  EXPECT_EQ(drain(g), (Positions{1}));
  EXPECT_EQ(drain(0), (Positions{0, 1}));
}

// The sender had looked at the active groups before the join; the joiner waits for it, for a moment. A thread that the
// machine does not run in that moment misses it, so several tries are made.
TEST_P(MembershipTest, AMessageWhoseSenderHadNotSeenTheGroupIsOfferedWhenItIsInTheOrder) {
  bool offered = false;
  for (int round = 0; round < 50 && !offered; ++round) {
    make(3, 1);
    send();
    const std::uint32_t s = pool->try_alloc(other->number);
    std::thread sender([&] {
      while (!is_active(1)) std::this_thread::yield();
      support::publish(*region, s, other->number, kDefault);
    });
    const std::uint32_t g = join(JoinAt::Oldest);
    sender.join();
    const Positions got = drain(g);
    ASSERT_FALSE(got.empty());
    EXPECT_EQ(got.front(), 0u);
    offered = got == Positions{0, 1};
    EXPECT_EQ(drain(0), (Positions{0, 1}));
    ASSERT_EQ(free(), 3u);
  }
  EXPECT_TRUE(offered);
}

// A pool of messages before the join, a pool by senders that had not seen it, a pool behind: the cells of the first
// are still there when the late joiner comes to them.
TEST_P(MembershipTest, TheCellOfAnOldMessageOutlivesWhatCanBeSentBeforeItIsTaken) {
  constexpr std::uint32_t kSlots = 4;
  make(kSlots, 1);
  send();
  Held held = take(0, other->number);
  for (std::uint32_t i = 2; i < kSlots; ++i) {
    send();
    drain(0);
  }
  // 0 is still in the window. All other slots are in the hands of senders that look at the groups before the join.
  std::vector<std::uint32_t> writing;
  for (std::uint32_t s = 0; (s = pool->try_alloc(other->number)) != slots::kNoSlot;) writing.push_back(s);
  ASSERT_EQ(writing.size(), kSlots - 1);
  const std::uint32_t g = join(JoinAt::Oldest);
  for (std::uint32_t s : writing) {
    support::publish(*region, s, other->number, kDefault);
    drain(0);
  }
  Positions expected{0};
  for (std::uint32_t i = 0; i + 1 < kSlots; ++i) {
    send();
    drain(0);
    expected.push_back(2 * kSlots - 2 + i);
  }
  release(held.slot, 0);
  EXPECT_EQ(support::send(*region, me, active()), slots::kNoSlot) << "the unread messages fill the pool";
  EXPECT_EQ(drain(g), expected);
  EXPECT_EQ(free(), kSlots);
}

TEST_P(MembershipTest, ALateJoinerOverManyLapsSeesNoGap) {
  make(4, 1);
  std::uint64_t sent = 0;
  for (int round = 0; round < 30; ++round) {
    while (send() != slots::kNoSlot) ++sent;
    release(take(0, me).slot, 0);
    const std::uint32_t g = join(JoinAt::Oldest);
    ASSERT_EQ(g, 1u);
    send();
    ++sent;
    const Positions got = drain(g);
    ASSERT_EQ(got.size(), 4u) << round;
    for (std::size_t i = 0; i < 4; ++i) EXPECT_EQ(got[i], sent - 4 + i) << round;
    EXPECT_EQ(drain(0), got);
    groups->leave(me);
    ASSERT_EQ(free(), 4u);
  }
}

// --- death -----------------------------------------------------------------------------------------------------------

TEST_P(MembershipTest, AJoinerThatDiedBeforeItsGroupWasActiveLeavesTheNumberUsable) {
  make(2, 1);
  groups->enter(1, other->number);
  region->group(1).state.store(memory::kGroupNamed);
  region->group(1).joined.fetch_add(1);
  other->die();
  EXPECT_EQ(recover_the_dead(*region, me, true), 1u);
  EXPECT_EQ(join(), 1u);
  send();
  EXPECT_EQ(drain(1), (Positions{0}));
}

TEST_P(MembershipTest, WhatWasOfferedToAJoinerThatDiedBeforeItsGroupWasActiveIsReleased) {
  make(2, 1);
  const std::uint32_t s = send();
  groups->enter(1, other->number);
  region->claim(s, 1).store(Claim::make(GetParam(), 0, Claim::kNobody).bits);
  region->slot(s).word.fetch_or(0b10);
  other->die();
  EXPECT_EQ(recover_the_dead(*region, me, true), 1u);
  EXPECT_EQ(drain(0), (Positions{0}));
  EXPECT_EQ(free(), 2u) << "nobody takes it any more";
}

TEST_P(MembershipTest, AClaimThatWasWrittenForAJoinerThatDiedIsNobodysMessage) {
  make(2, 1);
  const std::uint32_t s = send();
  groups->enter(1, other->number);
  region->claim(s, 1).store(Claim::make(GetParam(), 0, Claim::kNobody).bits);
  other->die();
  EXPECT_EQ(recover_the_dead(*region, me, true), 1u);
  EXPECT_EQ(join(), 1u);
  EXPECT_EQ(drain(1), Positions{}) << "its bit was never set";
  EXPECT_EQ(drain(0), (Positions{0}));
  EXPECT_EQ(free(), 2u);
}

TEST_P(MembershipTest, AGroupWhoseMakerDiedAtOnceGoesWithIt) {
  make(2, 1);
  send();
  ASSERT_EQ(groups->make("viewers", 0, JoinAt::Oldest, other->number), 1u);
  other->die();
  EXPECT_EQ(recover_the_dead(*region, me, true), 1u);
  EXPECT_FALSE(is_active(1));
  EXPECT_EQ(drain(0), (Positions{0}));
  EXPECT_EQ(free(), 2u);
}

TEST_P(MembershipTest, ADurableGroupOutlivesItsDeadMaker) {
  make(2, 1);
  ASSERT_EQ(groups->make("viewers", memory::kGroupDurable, JoinAt::Next, other->number), 1u);
  send();
  const Held held = take(1, other->number);
  EXPECT_EQ(held.attempts, 0u);
  other->die();
  EXPECT_EQ(recover_the_dead(*region, me, true), 1u);
  EXPECT_TRUE(is_active(1));
  EXPECT_EQ(take(1, me).attempts, 1u);
}

#if defined(DSLINE_CRASH_POINTS)

using support::CrashPoint;
using support::Ending;

TEST_P(MembershipTest, AJoinThatWasCutAnywhereIsMadeGoodByRecovery) {
  int most = 0;
  bool outlived = false;
  Ending ending = Ending::Died;
  for (int store = 1; ending == Ending::Died; ++store) {
    make(4, 1);
    for (int i = 0; i < 3; ++i) send();
    release(take(0, me).slot, 0);
    ending = CrashPoint::die_before(store, [this](CrashPoint& point) {
      Peer joiner(*region);
      SlotPool its_pool(*joiner.region);
      Membership its(*joiner.region, its_pool);
      point.arm(region->storage().descriptor());
      its.make("viewers", memory::kGroupDurable, JoinAt::Oldest, joiner.number);
    });
    ASSERT_NE(ending, Ending::Failed) << store;
    most = store;
    ASSERT_EQ(recover_the_dead(*region, me, true), 1u) << store;
    if (is_active(1)) {
      outlived = true;
      const Positions got = drain(1);
      // What the dead one had not offered is not this group's; what it had comes once.
      EXPECT_TRUE(std::is_sorted(got.begin(), got.end())) << store;
      EXPECT_TRUE(ending == Ending::Died || got == (Positions{1, 2})) << store;
      groups->remove(1, me);
    }
    const std::uint32_t g = join(JoinAt::Oldest, "next");
    ASSERT_EQ(g, 1u) << "cut before store " << store;
    EXPECT_EQ(drain(g), (Positions{1, 2})) << "cut before store " << store;
    EXPECT_EQ(drain(0), (Positions{1, 2})) << "cut before store " << store;
    ASSERT_EQ(free(), 4u) << "cut before store " << store;
    EXPECT_FALSE(groups->anything_stale()) << store;
  }
  EXPECT_GT(most, 25) << "the joiner was not watched";
  EXPECT_TRUE(outlived);
}

TEST_P(MembershipTest, LeavingThatWasCutAnywhereIsMadeGoodByRecovery) {
  int most = 0;
  Ending ending = Ending::Died;
  for (int store = 1; ending == Ending::Died; ++store) {
    make(4, 1);
    ending = CrashPoint::die_before(store, [this](CrashPoint& point) {
      Peer member(*region);
      SlotPool its_pool(*member.region);
      Membership its(*member.region, its_pool);
      its.make("viewers", 0, JoinAt::Next, member.number);
      for (int i = 0; i < 4; ++i) send();
      Held held{};
      Group(*member.region, 1).try_take(member.number, held);
      Group(*member.region, 1).give_back(held, member.number, 0);
      Group(*member.region, 1).try_take(member.number, held);
      point.arm(region->storage().descriptor());
      its.leave(member.number);
    });
    ASSERT_NE(ending, Ending::Failed) << store;
    most = store;
    ASSERT_EQ(recover_the_dead(*region, me, true), 1u) << store;
    EXPECT_FALSE(is_active(1)) << store;
    EXPECT_EQ(drain(0), (Positions{0, 1, 2, 3})) << store;
    ASSERT_EQ(free(), 4u) << "cut before store " << store;
    EXPECT_EQ(join(), 1u) << store;
  }
  EXPECT_GT(most, 8) << "it was not watched";
}

#endif

}  // namespace
}  // namespace dsline::liveness
