#include "slots/slot_word.hpp"

#include <gtest/gtest.h>

namespace dsline::slots {
namespace {

constexpr SlotPhase kPhases[] = {SlotPhase::Free, SlotPhase::Writing, SlotPhase::Committed, SlotPhase::Pinned,
                                 SlotPhase::Corrupted};

TEST(SlotWord, FieldsComeBackAsTheyWereMade) {
  SlotWord word = SlotWord::make(0xABCDEF, 0x155, SlotPhase::Committed, kEnqueueing | 5);
  EXPECT_EQ(word.generation(), 0xABCDEFu);
  EXPECT_EQ(word.owner(), 0x155u);
  EXPECT_EQ(word.phase(), SlotPhase::Committed);
  EXPECT_EQ(word.pending(), kEnqueueing | 5);
}

TEST(SlotWord, FieldsLieWhereTheDrawingSays) {
  EXPECT_EQ(SlotWord::make(1, 0, SlotPhase::Free, 0).bits, std::uint64_t{1} << 40);
  EXPECT_EQ(SlotWord::make(0, 1, SlotPhase::Free, 0).bits, std::uint64_t{1} << 30);
  EXPECT_EQ(SlotWord::make(0, 0, SlotPhase::Writing, 0).bits, std::uint64_t{1} << 24);
  EXPECT_EQ(SlotWord::make(0, 0, SlotPhase::Free, kEnqueueing).bits, std::uint64_t{1} << 23);
  EXPECT_EQ(SlotWord::make(0, 0, SlotPhase::Free, 1).bits, 1u);
}

TEST(SlotWord, AGenerationPastItsWidthWrapsAndSpillsIntoNoOtherField) {
  SlotWord last = SlotWord::make(0xFFFFFF, kNoOwner, SlotPhase::Free, 0);
  SlotWord next = SlotWord::make(last.generation() + 1, 3, SlotPhase::Writing, 0);
  EXPECT_EQ(next.generation(), 0u);
  EXPECT_EQ(next.owner(), 3u);
  EXPECT_EQ(next.phase(), SlotPhase::Writing);
}

TEST(SlotWord, AnOwnerPastItsWidthSpillsIntoNoOtherField) {
  SlotWord word = SlotWord::make(7, 0x400, SlotPhase::Writing, 0);
  EXPECT_EQ(word.generation(), 7u);
  EXPECT_EQ(word.owner(), 0u);
}

TEST(SlotWord, PendingPastItsWidthDoesNotChangeThePhase) {
  EXPECT_EQ(SlotWord::make(0, 0, SlotPhase::Free, 1u << 24).phase(), SlotPhase::Free);
}

TEST(SlotWord, FreeAndFullyReleasedWordsAreFree) {
  EXPECT_TRUE(SlotWord::make(1, kNoOwner, SlotPhase::Free, 0).is_free());
  EXPECT_TRUE(SlotWord::make(1, 2, SlotPhase::Committed, 0).is_free());
}

TEST(SlotWord, WritingPendingAndCorruptedWordsAreNotFree) {
  EXPECT_FALSE(SlotWord::make(1, 2, SlotPhase::Writing, 0).is_free());
  EXPECT_FALSE(SlotWord::make(1, 2, SlotPhase::Committed, 1).is_free());
  EXPECT_FALSE(SlotWord::make(1, 2, SlotPhase::Committed, kEnqueueing).is_free());
  EXPECT_FALSE(SlotWord::make(1, 2, SlotPhase::Corrupted, 0).is_free());
}

TEST(SlotWord, ACorruptedWordIsQuarantinedUnlessItIsPoisoned) {
  EXPECT_TRUE(SlotWord::make(1, kNoOwner, SlotPhase::Corrupted, 0).is_quarantined());
  EXPECT_FALSE(SlotWord::make(1, kNoOwner, SlotPhase::Corrupted, kPendingMask).is_quarantined());
  EXPECT_FALSE(SlotWord::make(1, kNoOwner, SlotPhase::Free, 0).is_quarantined());
}

TEST(SlotWord, ImpossibleWordsAreThoseThatNoStepWrites) {
  EXPECT_TRUE(SlotWord::make(0, 0, SlotPhase::Free, 0).is_possible());
  EXPECT_TRUE(SlotWord::make(0, 0, SlotPhase::Writing, 0).is_possible());
  EXPECT_TRUE(SlotWord::make(0, 0, SlotPhase::Committed, kEnqueueing | 1).is_possible());
  EXPECT_TRUE(SlotWord::make(0, 0, SlotPhase::Corrupted, kPendingMask).is_possible());
  EXPECT_FALSE(SlotWord::make(0, 0, SlotPhase::Free, 1).is_possible());
  EXPECT_FALSE(SlotWord::make(0, 0, SlotPhase::Writing, kEnqueueing).is_possible());
  EXPECT_FALSE(SlotWord::make(0, 0, SlotPhase::Pinned, 0).is_possible());
  EXPECT_FALSE(SlotWord::make(0, 0, static_cast<SlotPhase>(5), 0).is_possible());
  EXPECT_FALSE(SlotWord::make(0, 0, static_cast<SlotPhase>(63), 0).is_possible());
}

TEST(SlotWord, TheTransitionTableAllowsTheStepsOfTheProtocolAndNoOther) {
  const bool allowed[5][5] = {
      // Free Writing Committed Pinned Corrupted
      {false, true, false, false, true},    // Free: alloc, damage
      {true, false, true, false, true},     // Writing: abort, publish, damage
      {true, true, true, false, true},      // Committed: last release, alloc, release, bad frame
      {false, false, false, false, false},  // Pinned is never stored
      {false, true, false, false, false},   // Corrupted: alloc of a quarantined slot
  };
  for (int from = 0; from < 5; ++from) {
    for (int to = 0; to < 5; ++to) {
      EXPECT_EQ(may_change(kPhases[from], kPhases[to]), allowed[from][to]) << from << " to " << to;
    }
  }
}

TEST(SlotWord, NothingMayChangeFromAPhaseThatDoesNotExist) {
  EXPECT_FALSE(may_change(static_cast<SlotPhase>(9), SlotPhase::Free));
}

}  // namespace
}  // namespace dsline::slots
