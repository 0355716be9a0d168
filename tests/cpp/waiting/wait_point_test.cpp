#include "waiting/wait_point.hpp"

#include <gtest/gtest.h>

#include <memory>
#include <thread>
#include <vector>

#include "base/clock.hpp"

namespace dsline::waiting {
namespace {

class WaitPointTest : public testing::Test {
 protected:
  std::unique_ptr<WaitState> state = std::make_unique<WaitState>();
};

TEST_F(WaitPointTest, NobodyWaitsAtFirst) { EXPECT_FALSE(WaitPoint(*state, 256).anyone()); }

TEST_F(WaitPointTest, EveryParticipantHasABitOfItsOwn) {
  WaitPoint point(*state, 256);
  for (std::uint32_t p : {0u, 1u, 63u, 64u, 127u, 128u, 191u, 192u, 255u}) {
    point.add(p);
    EXPECT_TRUE(point.anyone()) << p;
    EXPECT_EQ(state->waiters[p / 64].load(), std::uint64_t{1} << (p % 64)) << p;
    point.remove(p);
    EXPECT_FALSE(point.anyone()) << p;
  }
}

TEST_F(WaitPointTest, OneThatLeavesDoesNotTakeAnothersBit) {
  WaitPoint point(*state, 64);
  point.add(3);
  point.add(4);
  point.remove(3);
  EXPECT_TRUE(point.anyone());
}

TEST_F(WaitPointTest, LooksAtAsManyWordsAsThereCanBeParticipants) {
  for (std::uint32_t participants : {1u, 64u, 65u, 128u, 129u, 256u}) {
    WaitPoint point(*state, participants);
    point.add(participants - 1);
    EXPECT_TRUE(point.anyone()) << participants;
    point.remove(participants - 1);
  }
}

TEST_F(WaitPointTest, WakingChangesTheSequence) {
  WaitPoint point(*state, 4);
  std::uint32_t before = point.sequence();
  point.wake(1);
  EXPECT_EQ(point.sequence(), before + 1);
  point.wake_all();
  EXPECT_EQ(point.sequence(), before + 2);
}

TEST_F(WaitPointTest, WithoutASleeperNothingIsWritten) {
  WaitPoint point(*state, 4);
  std::uint32_t before = point.sequence();
  point.wake_one_if_anyone();
  EXPECT_EQ(point.sequence(), before);
  point.add(0);
  point.wake_one_if_anyone();
  EXPECT_EQ(point.sequence(), before + 1);
}

TEST_F(WaitPointTest, ASequenceThatWasReadBeforeAWakeDoesNotSleep) {
  WaitPoint point(*state, 4);
  point.add(0);
  std::uint32_t sequence = point.sequence();
  point.wake(1);
  EXPECT_EQ(point.sleep(sequence, base::kForever), Wake::Woken);
}

TEST_F(WaitPointTest, TheSequenceWrapsWithoutLosingAWake) {
  WaitPoint point(*state, 4);
  state->sequence.store(0xFFFFFFFF);
  std::uint32_t sequence = point.sequence();
  point.wake(1);
  EXPECT_EQ(point.sequence(), 0u);
  EXPECT_EQ(point.sleep(sequence, base::kForever), Wake::Woken);
}

TEST_F(WaitPointTest, WakeAllReachesEverySleeper) {
  WaitPoint point(*state, 4);
  base::Atomic<bool> ready{false};
  std::vector<std::thread> sleepers;
  for (std::uint32_t p = 0; p < 4; ++p) {
    sleepers.emplace_back([&, p] {
      WaitPoint mine(*state, 4);
      mine.add(p);
      for (;;) {
        std::uint32_t sequence = mine.sequence();
        if (ready) break;
        mine.sleep(sequence, base::kForever);
      }
      mine.remove(p);
    });
  }
  ready = true;
  point.wake_all();
  for (std::thread& sleeper : sleepers) sleeper.join();
  EXPECT_FALSE(point.anyone());
}

// A lost wake-up would leave one of the two asleep for ever: the sleeps have no deadline.
TEST_F(WaitPointTest, NoWakeUpIsLostInAnExchangeOfManyTurns) {
  constexpr std::uint32_t kTurns = 5000;
  auto other = std::make_unique<WaitState>();
  base::Atomic<std::uint32_t> turn{0};
  auto play = [&turn](WaitState& mine, WaitState& theirs, std::uint32_t parity) {
    WaitPoint own(mine, 2);
    WaitPoint peer(theirs, 2);
    for (std::uint32_t t = parity; t < kTurns; t += 2) {
      while (turn.load() != t) {
        own.add(parity);
        std::uint32_t sequence = own.sequence();
        if (turn.load() != t) own.sleep(sequence, base::kForever);
        own.remove(parity);
      }
      turn.fetch_add(1);
      base::fence_seq_cst_after_rmw();
      peer.wake_one_if_anyone();
    }
  };
  std::thread second([&] { play(*other, *state, 1); });
  play(*state, *other, 0);
  second.join();
  EXPECT_EQ(turn.load(), kTurns);
}

}  // namespace
}  // namespace dsline::waiting
