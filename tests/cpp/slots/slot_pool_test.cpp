#include "slots/slot_pool.hpp"

#include <gtest/gtest.h>

#include <set>
#include <thread>
#include <vector>

#include "support/small_region.hpp"

namespace dsline::slots {
namespace {

using support::claim;
using support::make_region;
using support::word;

class SlotPoolTest : public testing::Test {
 protected:
  void make(std::uint32_t slots, std::uint32_t groups = 1) {
    region = make_region({.slots = slots, .groups = groups});
    pool.emplace(*region);
  }
  bool map_shows(std::uint32_t s) const { return (region->free_map(s / 64).load() >> (s % 64) & 1) != 0; }
  void hide(std::uint32_t s) { region->free_map(s / 64).fetch_and(~(std::uint64_t{1} << (s % 64))); }
  /// Commits slot `s` for one group, already in the order.
  void commit(std::uint32_t s) {
    pool->commit(s, pool->word(s), 1);
    pool->clear_pending(s, kEnqueueing);
  }
  std::uint32_t commit_next() {
    std::uint32_t s = pool->try_alloc(0);
    commit(s);
    return s;
  }
  std::unique_ptr<memory::Region> region;
  std::optional<SlotPool> pool;
};

TEST_F(SlotPoolTest, ANewPoolIsFreeAndInNoOrder) {
  make(3, 2);
  for (std::uint32_t s = 0; s < 3; ++s) {
    EXPECT_TRUE(word(*region, s).is(SlotPhase::Free));
    EXPECT_EQ(region->slot(s).position.load(), kNoPosition);
    EXPECT_EQ(claim(*region, s, 0), Claim::none());
    EXPECT_EQ(claim(*region, s, 1), Claim::none());
    EXPECT_TRUE(map_shows(s));
  }
  EXPECT_FALSE(map_shows(3));
}

TEST_F(SlotPoolTest, AnAllocatedSlotIsWritingAndCarriesItsOwner) {
  make(2);
  std::uint32_t s = pool->try_alloc(3);
  ASSERT_EQ(s, 0u);
  EXPECT_EQ(word(*region, s), SlotWord::make(1, 3, SlotPhase::Writing, 0));
  EXPECT_FALSE(map_shows(s));
}

TEST_F(SlotPoolTest, EverySlotIsGivenOnceAndThenNone) {
  make(65);
  std::set<std::uint32_t> seen;
  for (int i = 0; i < 65; ++i) seen.insert(pool->try_alloc(0));
  EXPECT_EQ(seen.size(), 65u);
  EXPECT_EQ(*seen.rbegin(), 64u);
  EXPECT_EQ(pool->try_alloc(0), kNoSlot);
  EXPECT_EQ(pool->try_alloc_by_scan(0), kNoSlot);
  EXPECT_FALSE(pool->anything_free());
  EXPECT_FALSE(pool->anything_free_by_scan());
}

TEST_F(SlotPoolTest, APoolOfOneSlotGivesItAgainAndAgain) {
  make(1);
  for (int i = 0; i < 3; ++i) {
    ASSERT_EQ(pool->try_alloc(0), 0u);
    EXPECT_EQ(pool->try_alloc(0), kNoSlot);
    pool->abort(0, pool->word(0));
  }
}

TEST_F(SlotPoolTest, TheLowestFreeSlotIsReusedFirst) {
  make(4);
  for (int i = 0; i < 4; ++i) pool->try_alloc(0);
  pool->abort(3, pool->word(3));
  pool->abort(1, pool->word(1));
  EXPECT_EQ(pool->try_alloc(0), 1u);
  EXPECT_EQ(pool->try_alloc(0), 3u);
}

TEST_F(SlotPoolTest, AStreamThatKeepsUpStaysInOneSlot) {
  make(64);
  for (int i = 0; i < 100; ++i) {
    std::uint32_t s = commit_next();
    EXPECT_EQ(s, 0u);
    pool->clear_pending(s, 1);
  }
}

TEST_F(SlotPoolTest, AllocForgetsThePositionAndCommitTheClaimsOfItsGroups) {
  make(1, 3);
  region->slot(0).position.store(17);
  for (std::uint32_t g = 0; g < 3; ++g) region->claim(0, g).store(Claim::make(17, 2, Claim::holder(1)).bits);
  ASSERT_EQ(pool->try_alloc(0), 0u);
  EXPECT_EQ(region->slot(0).position.load(), kNoPosition);
  ASSERT_TRUE(pool->commit(0, pool->word(0), 0b101));
  EXPECT_EQ(claim(*region, 0, 0), Claim::none());
  EXPECT_EQ(claim(*region, 0, 1).who(), Claim::holder(1)) << "nobody looks at it";
  EXPECT_EQ(claim(*region, 0, 2), Claim::none());
}

TEST_F(SlotPoolTest, TheGenerationWrapsWithoutTouchingTheRest) {
  make(1);
  region->slot(0).word.store(SlotWord::make(0xFFFFFF, kNoOwner, SlotPhase::Free, 0).bits);
  ASSERT_EQ(pool->try_alloc(2), 0u);
  EXPECT_EQ(word(*region, 0), SlotWord::make(0, 2, SlotPhase::Writing, 0));
  region->slot(0).word.store(SlotWord::make(0xFFFFFF, 2, SlotPhase::Writing, 0).bits);
  pool->abort(0, pool->word(0));
  EXPECT_EQ(word(*region, 0), SlotWord::make(0, kNoOwner, SlotPhase::Free, 0));
}

TEST_F(SlotPoolTest, CommitSetsTheBitsOfTheGroupsAndEnq) {
  make(1, 3);
  pool->try_alloc(1);
  pool->commit(0, pool->word(0), 0b101);
  EXPECT_EQ(word(*region, 0), SlotWord::make(1, 1, SlotPhase::Committed, kEnqueueing | 0b101));
}

TEST_F(SlotPoolTest, CommittingWhereNobodyListensFreesTheSlot) {
  make(1);
  pool->try_alloc(1);
  pool->commit(0, pool->word(0), 0);
  EXPECT_TRUE(word(*region, 0).is_free());
  EXPECT_TRUE(map_shows(0));
}

TEST_F(SlotPoolTest, ASlotIsFreeOnlyAfterItsLastGroupReleasedIt) {
  make(1, 2);
  pool->try_alloc(0);
  pool->commit(0, pool->word(0), 0b11);
  pool->clear_pending(0, kEnqueueing);
  pool->clear_pending(0, 0b01);
  EXPECT_FALSE(word(*region, 0).is_free());
  EXPECT_FALSE(map_shows(0));
  EXPECT_EQ(pool->try_alloc_by_scan(0), kNoSlot);
  pool->clear_pending(0, 0b10);
  EXPECT_TRUE(map_shows(0));
  EXPECT_EQ(pool->try_alloc(0), 0u);
}

TEST_F(SlotPoolTest, ASlotIsNotFreeBeforeItsPublisherIsDone) {
  make(1);
  pool->try_alloc(0);
  pool->commit(0, pool->word(0), 1);
  pool->clear_pending(0, 1);
  EXPECT_FALSE(word(*region, 0).is_free());
  EXPECT_FALSE(map_shows(0));
  pool->clear_pending(0, kEnqueueing);
  EXPECT_TRUE(map_shows(0));
}

TEST_F(SlotPoolTest, ReleasingABitThatIsNotSetFreesNothing) {
  make(1);
  commit_next();
  pool->clear_pending(0, 1);
  hide(0);
  pool->clear_pending(0, 1);
  EXPECT_FALSE(map_shows(0)) << "the second release announced a free slot again";
}

TEST_F(SlotPoolTest, AbortOfAWordThatHasChangedDoesNothing) {
  make(1);
  pool->try_alloc(0);
  SlotWord seen = pool->word(0);
  pool->abort(0, pool->word(0));
  pool->try_alloc(1);
  EXPECT_FALSE(pool->abort(0, seen));
  EXPECT_EQ(word(*region, 0).owner(), 1u);
  EXPECT_TRUE(word(*region, 0).is(SlotPhase::Writing));
}

TEST_F(SlotPoolTest, AStaleHintCostsALookAndIsDropped) {
  make(3);
  commit_next();
  region->free_map(0).fetch_or(1);  // slot 0 holds a message
  EXPECT_EQ(pool->try_alloc(1), 1u);
  EXPECT_FALSE(map_shows(0));
  EXPECT_TRUE(word(*region, 0).is(SlotPhase::Committed));
}

TEST_F(SlotPoolTest, HintsBeyondTheLastSlotAreIgnored) {
  make(3);
  region->free_map(0).store(std::uint64_t{1} << 3 | std::uint64_t{1} << 63);
  EXPECT_EQ(pool->try_alloc(0), kNoSlot);
  EXPECT_EQ(pool->try_alloc_by_scan(0), 0u);
}

TEST_F(SlotPoolTest, AScanFindsASlotWhoseHintWasLost) {
  make(2);
  pool->try_alloc(0);
  hide(1);
  EXPECT_EQ(pool->try_alloc(0), kNoSlot);
  EXPECT_FALSE(pool->anything_free());
  EXPECT_TRUE(pool->anything_free_by_scan());
  EXPECT_EQ(pool->try_alloc_by_scan(0), 1u);
}

TEST_F(SlotPoolTest, TheMapShowsAFreeSlotOnlyIfItIsOne) {
  make(70);
  EXPECT_TRUE(pool->shows_a_free_slot());
  for (std::uint32_t s = 0; s < 69; ++s) ASSERT_TRUE(pool->try_alloc_at(s, 0));
  EXPECT_TRUE(pool->shows_a_free_slot()) << "the last one";
  ASSERT_TRUE(pool->try_take(69, 0)) << "taken through a hint, so its bit stays";
  EXPECT_TRUE(map_shows(69));
  EXPECT_FALSE(pool->shows_a_free_slot());
  pool->abort(3, pool->word(3));
  hide(69);
  EXPECT_TRUE(pool->shows_a_free_slot());
  hide(3);
  EXPECT_FALSE(pool->shows_a_free_slot()) << "the hint is lost";
}

TEST_F(SlotPoolTest, WhatIsFreeWrittenOrRetainedCirculatesAndWhatIsHeldDoesNot) {
  make(2, 2);
  EXPECT_TRUE(pool->anything_circulates(0));
  commit(pool->try_alloc(0));
  const std::uint32_t s = pool->try_alloc(0);
  EXPECT_TRUE(pool->anything_circulates(0)) << "one is being written";
  commit(s);
  EXPECT_FALSE(pool->anything_circulates(0));
  EXPECT_FALSE(pool->anything_circulates(2));
  pool->clear_pending(s, 1);
  EXPECT_TRUE(pool->anything_circulates(0));
  ASSERT_EQ(pool->try_alloc(0), s);
  pool->commit(s, pool->word(s), 3);
  pool->clear_pending(s, kEnqueueing);
  EXPECT_FALSE(pool->anything_circulates(2)) << "another group needs it, too";
  pool->clear_pending(s, 1);
  EXPECT_TRUE(pool->anything_circulates(2));
  EXPECT_FALSE(pool->anything_circulates(0));
}

TEST_F(SlotPoolTest, AQuarantinedSlotCirculates) {
  make(1);
  commit(pool->try_alloc(0));
  EXPECT_FALSE(pool->anything_circulates(0));
  pool->clear_pending_corrupted(0, 1);
  EXPECT_TRUE(pool->anything_circulates(0));
}

TEST_F(SlotPoolTest, TakingOneSlotByNumberLeavesTheOthers) {
  make(3);
  EXPECT_TRUE(pool->try_alloc_at(1, 0));
  EXPECT_FALSE(map_shows(1));
  EXPECT_FALSE(pool->try_alloc_at(1, 0)) << "it is in use";
  EXPECT_EQ(pool->try_alloc(0), 0u);
  EXPECT_EQ(pool->try_alloc(0), 2u);
}

TEST_F(SlotPoolTest, AQuarantinedSlotIsReusedOnlyWhenNothingElseIsFree) {
  make(3);
  std::uint32_t bad = commit_next();
  pool->clear_pending_corrupted(bad, 1);
  EXPECT_EQ(word(*region, bad), SlotWord::make(1, kNoOwner, SlotPhase::Corrupted, 0));
  EXPECT_FALSE(map_shows(bad));
  EXPECT_EQ(pool->try_alloc(0), 1u);
  hide(2);
  EXPECT_EQ(pool->try_alloc_by_scan(0), 2u) << "a free slot goes before a quarantined one";
  EXPECT_EQ(pool->try_alloc(0), kNoSlot);
  EXPECT_TRUE(pool->anything_free_by_scan());
  EXPECT_EQ(pool->try_alloc_by_scan(0), bad);
  EXPECT_EQ(pool->try_alloc_by_scan(0), kNoSlot);
}

TEST_F(SlotPoolTest, AReusedQuarantinedSlotIsAnOrdinaryOneAgain) {
  make(1);
  commit_next();
  pool->clear_pending_corrupted(0, 1);
  ASSERT_EQ(pool->try_alloc_by_scan(0), 0u);
  commit(0);
  pool->clear_pending(0, 1);
  EXPECT_EQ(pool->try_alloc(0), 0u);
}

TEST_F(SlotPoolTest, ABadFrameThatAnotherGroupStillNeedsIsNotTakenAway) {
  make(1, 2);
  pool->try_alloc(0);
  pool->commit(0, pool->word(0), 0b11);
  pool->clear_pending(0, kEnqueueing);
  pool->clear_pending_corrupted(0, 0b01);
  EXPECT_EQ(word(*region, 0), SlotWord::make(1, 0, SlotPhase::Committed, 0b10));
  pool->clear_pending_corrupted(0, 0b10);
  EXPECT_TRUE(word(*region, 0).is_quarantined());
}

TEST_F(SlotPoolTest, ABadFrameWhosePublisherIsNotDoneYetIsFreedByThePublisher) {
  make(1);
  pool->try_alloc(0);
  pool->commit(0, pool->word(0), 1);
  pool->clear_pending_corrupted(0, 1);
  EXPECT_EQ(word(*region, 0).pending(), kEnqueueing);
  pool->clear_pending(0, kEnqueueing);
  EXPECT_EQ(pool->try_alloc(0), 0u);
}

TEST_F(SlotPoolTest, AnImpossibleWordIsPoisonedCountedAndNeverUsed) {
  make(2);
  region->slot(0).word.store(SlotWord::make(4, 0, static_cast<SlotPhase>(40), 0).bits);
  EXPECT_EQ(pool->try_alloc(0), 1u);
  EXPECT_EQ(region->header().corrupted.load(), 1u);
  EXPECT_EQ(word(*region, 0), SlotWord::make(4, kNoOwner, SlotPhase::Corrupted, kPendingMask));
  EXPECT_EQ(pool->try_alloc_by_scan(0), kNoSlot);
  EXPECT_FALSE(pool->anything_free_by_scan());
  EXPECT_EQ(region->header().corrupted.load(), 1u) << "counted once";
}

TEST_F(SlotPoolTest, AScanPoisonsAnImpossibleWordThatHasNoHint) {
  make(1);
  region->slot(0).word.store(SlotWord::make(4, 0, SlotPhase::Writing, 1).bits);
  hide(0);
  EXPECT_EQ(pool->try_alloc_by_scan(0), kNoSlot);
  EXPECT_EQ(word(*region, 0).pending(), kPendingMask);
  EXPECT_EQ(region->header().corrupted.load(), 1u);
}

TEST_F(SlotPoolTest, CachedHintsGiveEverySlotOnce) {
  for (std::uint32_t slots : {1u, 7u, 8u, 63u, 64u, 65u, 200u}) {
    make(slots);
    HintCache cache;
    std::set<std::uint32_t> seen;
    for (std::uint32_t i = 0; i < slots; ++i) seen.insert(pool->try_alloc_cached(cache, 0));
    EXPECT_EQ(seen.size(), slots);
    EXPECT_LT(*seen.rbegin(), slots);
    EXPECT_EQ(pool->try_alloc_cached(cache, 0), kNoSlot) << slots;
  }
}

TEST_F(SlotPoolTest, CachedHintsForSlotsThatOthersTookAreDropped) {
  make(64);
  HintCache cache;
  std::uint32_t first = pool->try_alloc_cached(cache, 0);
  std::set<std::uint32_t> seen{first};
  for (std::uint32_t s = pool->try_alloc_by_scan(1); s != kNoSlot; s = pool->try_alloc_by_scan(1))
    seen.insert(s);
  EXPECT_EQ(seen.size(), 64u) << "another handle finds what the cache hides";
  EXPECT_EQ(pool->try_alloc_cached(cache, 0), kNoSlot);
}

TEST_F(SlotPoolTest, ASlotThatIsFreedWhileItsHintIsCachedIsFoundThroughTheMap) {
  make(64);
  HintCache cache;
  pool->try_alloc_cached(cache, 0);
  for (std::uint32_t s = pool->try_alloc_by_scan(1); s != kNoSlot; s = pool->try_alloc_by_scan(1)) {
  }
  pool->abort(5, pool->word(5));
  EXPECT_EQ(pool->try_alloc_cached(cache, 0), 5u);
}

TEST_F(SlotPoolTest, ReturnedHintsAreInTheMapAgain) {
  make(64);
  HintCache cache;
  std::uint32_t s = pool->try_alloc_cached(cache, 0);
  pool->return_hints(cache);
  for (std::uint32_t i = 0; i < 64; ++i) EXPECT_EQ(map_shows(i), i != s) << i;
  pool->return_hints(cache);
  EXPECT_EQ(pool->try_alloc_cached(cache, 0), 1u) << "an emptied cache fills itself again";
}

TEST_F(SlotPoolTest, FreeingWakesWhoWaitsForSpace) {
  make(1);
  pool->try_alloc(0);
  pool->space().add(2);
  std::uint32_t before = pool->space().sequence();
  pool->abort(0, pool->word(0));
  EXPECT_EQ(pool->space().sequence(), before + 1);
}

TEST_F(SlotPoolTest, QuarantiningWakesWhoWaitsForSpace) {
  make(1);
  commit_next();
  pool->space().add(2);
  std::uint32_t before = pool->space().sequence();
  pool->clear_pending_corrupted(0, 1);
  EXPECT_EQ(pool->space().sequence(), before + 1);
}

// Shows that no two owners ever have one slot; what it cannot show is that a rare interleaving was reached.
TEST_F(SlotPoolTest, CompetingThreadsNeverHoldTheSameSlot) {
  make(3);
  std::vector<base::Atomic<int>> held(3);
  base::Atomic<int> doubles{0};
  std::vector<std::thread> threads;
  for (std::uint32_t me = 0; me < 4; ++me) {
    threads.emplace_back([&, me] {
      for (int i = 0; i < 20000; ++i) {
        std::uint32_t s = pool->try_alloc(me);
        if (s == kNoSlot) s = pool->try_alloc_by_scan(me);
        if (s == kNoSlot) continue;
        doubles += held[s].fetch_add(1) != 0;
        held[s].fetch_sub(1);
        if (i % 2 == 0) {
          pool->abort(s, pool->word(s));
        } else {
          pool->commit(s, pool->word(s), 1);
          pool->clear_pending(s, kEnqueueing);
          pool->clear_pending(s, 1);
        }
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  EXPECT_EQ(doubles.load(), 0);
  EXPECT_EQ(support::free_slots(*region), 3u);
}

}  // namespace
}  // namespace dsline::slots
