#include "delivery/publication.hpp"

#include <gtest/gtest.h>

#include <optional>
#include <string>
#include <vector>

#include "liveness/recovery.hpp"
#include "support/crash_points.hpp"
#include "support/small_region.hpp"

namespace dsline::delivery {
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

using Positions = std::vector<std::uint64_t>;

class PublicationTest : public testing::TestWithParam<std::uint64_t> {
 protected:
  /// `receiving` groups are active from the start; the history has the number behind them.
  void make(std::uint32_t slots, std::uint32_t receiving = 1, std::uint32_t history = 0) {
    support::Shape shape{.slots = slots, .groups = receiving + (history != 0)};
    shape.first_position = GetParam();
    shape.rules.history = history;
    region = make_region(shape);
    pool.emplace(*region);
    publication.emplace(*region, *pool);
    me = liveness::Participants(*region).try_join();
    all = (1u << receiving) - 1 + (history != 0 ? 1u << receiving : 0);
  }
  /// A whole send; the slot it took, kNoSlot where none is free.
  std::uint32_t send(std::uint32_t groups) {
    const std::uint32_t s = pool->try_alloc(me);
    if (s != slots::kNoSlot) {
      EXPECT_TRUE(publication->publish(s, pool->word(s), groups, me));
    }
    return s;
  }
  std::uint32_t send() { return send(all); }
  void fill() {
    while (send() != slots::kNoSlot) {
    }
  }
  Held take(std::uint32_t g = 0) {
    Held held{~0u, 0, 0};
    EXPECT_TRUE(Group(*region, g).try_take(me, held));
    return held;
  }
  void release(const Held& held, std::uint32_t g = 0) { pool->clear_pending(held.slot, 1u << g); }
  Positions drain(std::uint32_t g = 0) {
    Positions got;
    for (Held held{}; Group(*region, g).try_take(me, held);) {
      got.push_back(index_of(held.position));
      release(held, g);
    }
    return got;
  }
  std::uint64_t index_of(std::uint64_t position) const {
    std::uint64_t p = GetParam(), n = 0;
    for (; p != position && n < 1000; ++n) p = slots::next_position(p);
    return n;
  }
  std::uint64_t dropped(std::uint32_t g = 0) const { return region->group(g).dropped_oldest.load(); }
  std::uint32_t free() const { return free_slots(*region); }

  std::unique_ptr<memory::Region> region;
  std::optional<SlotPool> pool;
  std::optional<Publication> publication;
  std::uint32_t me = 0;
  std::uint32_t all = 0;
};

INSTANTIATE_TEST_SUITE_P(From, PublicationTest, testing::Values(0, kLap - 2, kLap - 3));

// --- publish ---------------------------------------------------------------------------------------------------------

TEST_P(PublicationTest, APublishedMessageIsInTheOrderWithoutEnqAndTheTailIsBehindIt) {
  make(3, 2);
  const std::uint32_t s = send();
  EXPECT_EQ(word(*region, s), SlotWord::make(1, me, SlotPhase::Committed, 0b11));
  EXPECT_EQ(region->order().tail.load(), slots::next_position(GetParam()));
  EXPECT_EQ(drain(0), (Positions{0}));
  EXPECT_EQ(drain(1), (Positions{0}));
  EXPECT_EQ(free(), 3u);
  EXPECT_EQ(region->header().unheard.load(), 0u);
}

TEST_P(PublicationTest, AMessageThatNobodyListensToIsCountedAndTakesNoPosition) {
  make(2);
  EXPECT_EQ(send(0), 0u);
  EXPECT_EQ(region->header().unheard.load(), 1u);
  EXPECT_EQ(free(), 2u);
  EXPECT_EQ(region->free_map(0).load() & 0b11, 0b11u);
  EXPECT_EQ(region->order().tail.load(), GetParam());
  send();
  EXPECT_EQ(drain(), (Positions{0})) << "sequences have no gap for it";
}

TEST_P(PublicationTest, ASlotThatWasTakenAwayIsNotPublished) {
  make(2);
  const std::uint32_t s = pool->try_alloc(me);
  const SlotWord mine = pool->word(s);
  ASSERT_TRUE(pool->abort(s, mine));
  EXPECT_FALSE(publication->publish(s, mine, all, me));
  EXPECT_EQ(drain(), Positions{});
  EXPECT_EQ(region->order().tail.load(), GetParam());
  EXPECT_EQ(free(), 2u);
}

TEST_P(PublicationTest, OneWaiterOfEachGroupIsWokenAndNoneOfOthers) {
  make(2, 3);
  for (std::uint32_t g = 0; g < 3; ++g) Group(*region, g).messages().add(me);
  send(0b011);
  EXPECT_EQ(region->group(0).messages.sequence.load(), 1u);
  EXPECT_EQ(region->group(1).messages.sequence.load(), 1u);
  EXPECT_EQ(region->group(2).messages.sequence.load(), 0u);
}

TEST_P(PublicationTest, WhereNobodyWaitsNobodyIsWoken) {
  make(2, 2);
  send();
  EXPECT_EQ(region->group(0).messages.sequence.load(), 0u);
  EXPECT_EQ(region->group(1).messages.sequence.load(), 0u);
}

TEST_P(PublicationTest, WhoeverLooksAtTheHistoryIsWoken) {
  make(3, 1, 1);
  Group(*region, 1).messages().add(me);
  send();
  EXPECT_EQ(region->group(1).messages.sequence.load(), 1u);
}

// --- drop oldest -----------------------------------------------------------------------------------------------------

TEST_P(PublicationTest, NothingIsDroppedFromAnEmptyChannel) {
  make(2, 2);
  EXPECT_FALSE(publication->drop_oldest(me));
  send();
  drain(0);
  drain(1);
  EXPECT_FALSE(publication->drop_oldest(me));
  EXPECT_EQ(dropped(0) + dropped(1), 0u);
}

TEST_P(PublicationTest, TheOldestMessageGoesAndIsCounted) {
  make(3);
  fill();
  EXPECT_TRUE(publication->drop_oldest(me));
  EXPECT_EQ(free(), 1u);
  EXPECT_EQ(dropped(), 1u);
  EXPECT_EQ(drain(), (Positions{1, 2}));
}

TEST_P(PublicationTest, EveryGroupThatHadNotTakenItLosesItAndCounts) {
  make(3, 3);
  fill();
  EXPECT_TRUE(publication->drop_oldest(me));
  EXPECT_EQ(free(), 1u);
  for (std::uint32_t g = 0; g < 3; ++g) {
    EXPECT_EQ(dropped(g), 1u) << g;
    EXPECT_EQ(drain(g), (Positions{1, 2})) << g;
  }
}

TEST_P(PublicationTest, OnlyTheSlowestGroupLosesWhatTheOthersAreDoneWith) {
  make(4, 3);
  fill();
  for (int i = 0; i < 2; ++i) release(take(0), 0);
  release(take(1), 1);
  EXPECT_TRUE(publication->drop_oldest(me));
  EXPECT_EQ(dropped(0), 0u);
  EXPECT_EQ(dropped(1), 0u);
  EXPECT_EQ(dropped(2), 1u);
  EXPECT_EQ(free(), 1u);
  EXPECT_TRUE(publication->drop_oldest(me)) << "the next one is unread by two";
  EXPECT_EQ(dropped(0), 0u);
  EXPECT_EQ(dropped(1), 1u);
  EXPECT_EQ(dropped(2), 2u);
  EXPECT_EQ(free(), 2u);
  EXPECT_EQ(drain(0), (Positions{2, 3}));
  EXPECT_EQ(drain(1), (Positions{2, 3}));
  EXPECT_EQ(drain(2), (Positions{2, 3}));
}

TEST_P(PublicationTest, ASlowGroupThatLosesEverythingKeepsTheNewest) {
  make(3, 2);
  std::uint32_t sent = 0;
  for (int i = 0; i < 20; ++i) {
    for (int tries = 0; send() == slots::kNoSlot; ++tries) {
      ASSERT_LT(tries, 3);
      ASSERT_TRUE(publication->drop_oldest(me));
    }
    ++sent;
    EXPECT_EQ(drain(0), (Positions{sent - 1}));
  }
  EXPECT_EQ(dropped(0), 0u);
  EXPECT_EQ(dropped(1), 17u);
  EXPECT_EQ(drain(1), (Positions{17, 18, 19}));
}

TEST_P(PublicationTest, WhatSomebodyHoldsIsNeverDropped) {
  make(2);
  fill();
  const Held first = take(), second = take();
  EXPECT_FALSE(publication->drop_oldest(me));
  EXPECT_EQ(dropped(), 0u);
  EXPECT_EQ(claim(*region, first.slot).who(), Claim::holder(me));
  EXPECT_EQ(claim(*region, second.slot).who(), Claim::holder(me));
  EXPECT_EQ(free(), 0u);
}

TEST_P(PublicationTest, AMessageThatOneGroupHoldsIsDroppedForTheOthersAndStaysWithItsHolder) {
  make(2, 2);
  fill();
  const Held held = take(0);
  EXPECT_TRUE(publication->drop_oldest(me));
  EXPECT_EQ(dropped(0), 0u);
  EXPECT_EQ(dropped(1), 1u);
  EXPECT_EQ(word(*region, held.slot).pending(), 0b01u);
  EXPECT_EQ(free(), 0u);
  EXPECT_TRUE(publication->drop_oldest(me)) << "the next one is nobody's";
  EXPECT_EQ(free(), 1u);
  EXPECT_EQ(dropped(0), 1u);
  EXPECT_EQ(dropped(1), 2u);
  EXPECT_FALSE(publication->drop_oldest(me));
  release(held, 0);
  EXPECT_EQ(free(), 2u);
}

TEST_P(PublicationTest, WhatWasGivenBackGoesLast) {
  make(3);
  fill();
  Group(*region, 0).give_back(take(), me, 0);
  EXPECT_TRUE(publication->drop_oldest(me));
  EXPECT_TRUE(publication->drop_oldest(me));
  EXPECT_EQ(dropped(), 2u);
  EXPECT_EQ(claim(*region, 0).who(), Claim::kRedeliver) << "somebody had begun with it";
  EXPECT_TRUE(publication->drop_oldest(me));
  EXPECT_EQ(dropped(), 3u);
  EXPECT_EQ(free(), 3u);
  EXPECT_FALSE(publication->drop_oldest(me));
}

TEST_P(PublicationTest, DeadLettersAreNotDropped) {
  make(2);
  fill();
  for (std::uint32_t s = 0; s < 2; ++s) {
    const Held held = take();
    region->claim(held.slot, 0).store(claim(*region, held.slot).with(3, Claim::kDead).bits);
  }
  EXPECT_FALSE(publication->drop_oldest(me));
  EXPECT_EQ(free(), 0u);
  EXPECT_EQ(dropped(), 0u);
}

TEST_P(PublicationTest, AGroupThatIsNotActiveNeitherLosesNorKeepsAnything) {
  make(2, 2);
  fill();
  region->header().active.store(0b01);
  EXPECT_TRUE(publication->drop_oldest(me));
  EXPECT_EQ(dropped(0), 1u);
  EXPECT_EQ(dropped(1), 0u);
  EXPECT_EQ(word(*region, 0).pending(), 0b10u) << "the sweep releases it";
}

TEST_P(PublicationTest, AGroupThatIsStillJoiningLosesMessagesButItsCursorStands) {
  make(3, 2);
  send(0b01);  // its sender had not seen the second group, whose joiner may still add the message to it
  send();
  send();
  release(take());
  const std::uint64_t cursor = region->group(1).cursor.load();
  region->group(1).state.fetch_or(memory::kGroupJoining);
  ASSERT_TRUE(publication->drop_oldest(me));
  EXPECT_EQ(dropped(1), 1u);
  EXPECT_EQ(region->group(1).cursor.load(), cursor) << "what the joiner adds would lie behind it";
  EXPECT_EQ(free(), 2u);
  region->group(1).state.fetch_and(~memory::kGroupJoining);
  ASSERT_TRUE(publication->drop_oldest(me));
  EXPECT_NE(region->group(1).cursor.load(), cursor);
  EXPECT_EQ(dropped(1), 2u);
  EXPECT_EQ(free(), 3u);
}

TEST_P(PublicationTest, WhatSomebodyLostIsNotCountedForTheHistory) {
  make(3, 1, 2);
  fill();
  EXPECT_TRUE(publication->drop_oldest(me));
  EXPECT_EQ(dropped(0), 1u);
  EXPECT_EQ(dropped(1), 0u);
  EXPECT_EQ(drain(0), (Positions{1, 2}));
}

// --- history ---------------------------------------------------------------------------------------------------------

TEST_P(PublicationTest, TheHistoryKeepsTheLastMessagesAndNoMore) {
  make(6, 1, 3);
  for (std::uint64_t i = 0; i < 20; ++i) {
    ASSERT_NE(send(), slots::kNoSlot) << i;
    EXPECT_EQ(drain(0), (Positions{i}));
    const std::uint64_t kept = 6 - free();
    // At the wrap the position that is skipped counts as kept.
    EXPECT_LE(kept, std::min<std::uint64_t>(i + 1, 3)) << i;
    EXPECT_GE(kept, std::min<std::uint64_t>(i + 1, GetParam() == 0 || i > 8 ? 3 : 2)) << i;
  }
  EXPECT_EQ(drain(1), (Positions{17, 18, 19}));
  EXPECT_EQ(free(), 6u);
}

TEST_P(PublicationTest, AMessageThatLeavesTheHistoryStaysForWhoeverNeedsIt) {
  make(6, 1, 2);
  for (int i = 0; i < 5; ++i) send();
  EXPECT_EQ(free(), 1u);
  EXPECT_EQ(Group(*region, 1).depth(), 2u);
  EXPECT_EQ(drain(0), (Positions{0, 1, 2, 3, 4}));
  EXPECT_EQ(free(), 4u);
}

TEST_P(PublicationTest, DroppingTheHistoryFreesItsOldestMessage) {
  make(6, 1, 3);
  for (int i = 0; i < 8; ++i) {
    send();
    drain(0);
  }
  EXPECT_EQ(free(), 3u);
  EXPECT_TRUE(publication->drop_history(me));
  EXPECT_EQ(free(), 4u);
  EXPECT_EQ(Group(*region, 1).depth(), 2u);
  EXPECT_TRUE(publication->drop_history(me));
  EXPECT_TRUE(publication->drop_history(me));
  EXPECT_EQ(free(), 6u);
  EXPECT_FALSE(publication->drop_history(me));
  EXPECT_EQ(dropped(1), 0u) << "nobody was to receive it";
}

TEST_P(PublicationTest, WithoutAHistoryThereIsNoneToDrop) {
  make(2, 2);
  fill();
  EXPECT_FALSE(publication->drop_history(me));
  EXPECT_EQ(drain(1), (Positions{0, 1}));
}

TEST_P(PublicationTest, AHistoryThatADeadSenderDidNotTrimIsTrimmedByTheNextOne) {
  make(6, 1, 1);
  for (int i = 0; i < 3; ++i) {
    const std::uint32_t s = pool->try_alloc(me);
    support::publish(*region, s, me, all);  // without trim_history()
  }
  drain(0);
  EXPECT_EQ(free(), 3u);
  send();
  drain(0);
  EXPECT_EQ(free(), 5u);
  EXPECT_EQ(drain(1), (Positions{3}));
}

// --- death -----------------------------------------------------------------------------------------------------------

#if defined(DSLINE_CRASH_POINTS)

using support::CrashPoint;
using support::Ending;

TEST_P(PublicationTest, ADropThatWasCutAnywhereLosesNothingElseAndNoSlot) {
  int most = 0;
  Ending ending = Ending::Died;
  for (int store = 1; ending == Ending::Died; ++store) {
    make(3, 2);
    fill();
    release(take(1), 1);
    ending = CrashPoint::die_before(store, [this](CrashPoint& point) {
      Peer sender(*region);
      SlotPool its_pool(*sender.region);
      Publication its(*sender.region, its_pool);
      point.arm(region->storage().descriptor());
      its.drop_oldest(sender.number);
      its.drop_oldest(sender.number);
    });
    ASSERT_NE(ending, Ending::Failed) << store;
    most = store;
    ASSERT_EQ(liveness::recover_the_dead(*region, me, true), 1u);
    const std::uint64_t lost_0 = dropped(0), lost_1 = dropped(1);
    const Positions got_0 = drain(0), got_1 = drain(1);
    // What a group lost it lost from its front; a death between release and count leaves one uncounted.
    Positions all_of{0, 1, 2};
    ASSERT_LE(got_0.size(), 3u);
    ASSERT_LE(got_1.size(), 2u);
    EXPECT_EQ(got_0, Positions(all_of.end() - static_cast<std::ptrdiff_t>(got_0.size()), all_of.end()))
        << store;
    EXPECT_EQ(got_1, Positions(all_of.end() - static_cast<std::ptrdiff_t>(got_1.size()), all_of.end()))
        << store;
    EXPECT_LE(3 - got_0.size() - lost_0, 1u) << store;
    EXPECT_LE(2 - got_1.size() - lost_1, 1u) << store;
    ASSERT_EQ(free(), 3u) << "cut before store " << store;
  }
  EXPECT_GT(most, 9) << "it was not watched";
}

TEST_P(PublicationTest, APublishWithAHistoryThatWasCutAnywhereLosesNoSlot) {
  int most = 0;
  Ending ending = Ending::Died;
  for (int store = 1; ending == Ending::Died; ++store) {
    make(4, 1, 1);
    send();
    ending = CrashPoint::die_before(store, [this](CrashPoint& point) {
      Peer sender(*region);
      SlotPool its_pool(*sender.region);
      Publication its(*sender.region, its_pool);
      const std::uint32_t s = its_pool.try_alloc(sender.number);
      point.arm(region->storage().descriptor());
      its.publish(s, its_pool.word(s), all, sender.number);
    });
    ASSERT_NE(ending, Ending::Failed) << store;
    most = store;
    ASSERT_EQ(liveness::recover_the_dead(*region, me, true), 1u);
    // The claims of two groups, then the word: the commit.
    EXPECT_EQ(drain(0), store <= 3 ? Positions{0} : (Positions{0, 1})) << "cut before store " << store;
    send();
    EXPECT_EQ(drain(0).size(), 1u) << store;
    EXPECT_EQ(free(), 3u) << "the history has one: cut before store " << store;
    while (publication->drop_history(me)) {
    }
    ASSERT_EQ(free(), 4u) << "cut before store " << store;
  }
  EXPECT_GT(most, 8) << "it was not watched";
}

#endif

}  // namespace
}  // namespace dsline::delivery
