#include "dsline/tally.hpp"

#include <gtest/gtest.h>
#include <signal.h>
#include <sys/wait.h>
#include <unistd.h>

namespace {

using dsline::Outcome;
using dsline::Tally;

// What `act` has done to the tally when its process is killed.
template <class Act>
void die_after(Tally& tally, Act&& act) {
  const pid_t child = fork();
  if (child == 0) {
    act(tally);
    kill(getpid(), SIGKILL);
  }
  int status = 0;
  waitpid(child, &status, 0);
  ASSERT_TRUE(WIFSIGNALED(status));
}

TEST(Tally, WhoDiesWhilePuttingLeavesNothingToWaitFor) {
  const auto tally = Tally::create();
  die_after(*tally, [](Tally& mine) {
    mine.take_part();
    mine.begin_put();
  });
  EXPECT_EQ(tally->unfinished(), 1u);
  EXPECT_TRUE(tally->forget_the_dead());
  EXPECT_EQ(tally->unfinished(), 0u);
  EXPECT_EQ(tally->wait_until_finished(0), Outcome::Ok);
  EXPECT_FALSE(tally->finish_one());
}

TEST(Tally, WhatHasEnteredCountsAfterTheDeathOfItsPutter) {
  const auto tally = Tally::create();
  die_after(*tally, [](Tally& mine) {
    mine.take_part();
    mine.begin_put();
    mine.put_is_over(true);
  });
  tally->forget_the_dead();
  EXPECT_EQ(tally->unfinished(), 1u);
  EXPECT_TRUE(tally->finish_one());
  EXPECT_EQ(tally->unfinished(), 0u);
}

TEST(Tally, AnObjectIsNeverDoneBeforeItCounts) {
  const auto tally = Tally::create();
  tally->take_part();
  tally->begin_put();
  EXPECT_TRUE(tally->finish_one());  // its getter is faster than its putter
  tally->put_is_over(true);
  EXPECT_EQ(tally->unfinished(), 0u);
  EXPECT_FALSE(tally->finish_one());
}

TEST(Tally, WhatDidNotEnterNoLongerCounts) {
  const auto tally = Tally::create();
  tally->take_part();
  tally->begin_put();
  tally->put_is_over(false);
  EXPECT_EQ(tally->unfinished(), 0u);
}

}  // namespace
