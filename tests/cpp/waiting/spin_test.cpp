#include "waiting/spin.hpp"

#include <gtest/gtest.h>

#include "base/clock.hpp"

namespace dsline::waiting {
namespace {

TEST(AdaptiveSpin, AConditionThatHoldsPaysAtTheFirstLook) {
  AdaptiveSpin spin;
  int looks = 0;
  EXPECT_TRUE(spin([&] { return ++looks > 0; }, base::kForever, 0));
  EXPECT_EQ(looks, 1);
}

TEST(AdaptiveSpin, AConditionThatNeverHoldsIsGivenUp) {
  AdaptiveSpin spin;
  int looks = 0;
  EXPECT_FALSE(spin([&] { return ++looks < 0; }, base::kForever, 0));
  EXPECT_GT(looks, 1);
}

TEST(AdaptiveSpin, SpinsThatDidNotPayStillLookSeveralTimes) {
  AdaptiveSpin spin;
  for (int i = 0; i < 50; ++i) {
    int looks = 0;
    EXPECT_FALSE(spin([&] { return ++looks < 0; }, base::kForever, 0));
    EXPECT_GT(looks, 1) << i;
  }
}

TEST(AdaptiveSpin, AConditionThatComesTrueAtALaterLookIsSeen) {
  AdaptiveSpin spin;
  int looks = 0;
  EXPECT_TRUE(spin([&] { return ++looks == 3; }, base::kForever, 0));
  EXPECT_EQ(looks, 3);
}

TEST(AdaptiveSpin, APastDeadlineStillLooksButDoesNotSpinOn) {
  AdaptiveSpin spin;
  int looks = 0;
  EXPECT_FALSE(spin([&] { return ++looks < 0; }, base::monotonic_ns() - 1, 0));
  EXPECT_GE(looks, 1);
  EXPECT_TRUE(spin([] { return true; }, base::monotonic_ns() - 1, 0));
}

TEST(AdaptiveSpin, AStreamOfMessagesDoesNotKeepTheConditionFromBeingSeen) {
  AdaptiveSpin spin;
  std::uint64_t done = 0;
  for (int i = 0; i < 1000; ++i) {
    done += 100000;  // far more messages than the time since the last wait allows
    ASSERT_TRUE(spin([] { return true; }, base::kForever, done)) << i;
  }
}

TEST(AdaptiveSpin, ACountThatGoesBackwardsIsHarmless) {
  AdaptiveSpin spin;
  EXPECT_TRUE(spin([] { return true; }, base::kForever, 1000));
  EXPECT_TRUE(spin([] { return true; }, base::kForever, 10));  // another thread's lost update
  EXPECT_FALSE(spin([] { return false; }, base::kForever, 11));
}

TEST(AdaptiveSpin, SleepsThatWereShortMakeTheNextSpinLonger) {
  AdaptiveSpin spin;
  const auto never = [] { return false; };
  for (int i = 0; i < 20; ++i) spin(never, base::kForever, 0);
  ASSERT_EQ(spin.budget_ns(), AdaptiveSpin::kShortestNs);
  spin.woken_after(AdaptiveSpin::kLongestNs + AdaptiveSpin::kWakeNs);
  EXPECT_EQ(spin.budget_ns(), AdaptiveSpin::kShortestNs) << "spinning would not have paid";
  for (int i = 0; i < 20; ++i) spin.woken_after(AdaptiveSpin::kLongestNs - 1);
  EXPECT_EQ(spin.budget_ns(), AdaptiveSpin::kLongestNs);
}

}  // namespace
}  // namespace dsline::waiting
