#include "slots/claim.hpp"

#include <gtest/gtest.h>

namespace dsline::slots {
namespace {

TEST(Claim, FieldsComeBackAsTheyWereMade) {
  Claim claim = Claim::make(0x123456789AB, 9, Claim::holder(200));
  EXPECT_EQ(claim.position_low(), 0x123456789ABu);
  EXPECT_EQ(claim.attempts(), 9u);
  EXPECT_EQ(claim.who(), 201u);
}

TEST(Claim, KeepsTheLow44BitsOfAPosition) {
  Claim claim = Claim::make((std::uint64_t{5} << 44) | 77, 1, Claim::kNobody);
  EXPECT_EQ(claim.position_low(), 77u);
  EXPECT_EQ(claim.attempts(), 1u);
}

TEST(Claim, TheFirstParticipantIsNotNobody) { EXPECT_NE(Claim::holder(0), Claim::kNobody); }

TEST(Claim, TheLastParticipantIsNotTheRedeliverMark) { EXPECT_NE(Claim::holder(255), Claim::kRedeliver); }

TEST(Claim, NoneHasThePositionThatTheOrderSkips) {
  EXPECT_EQ(Claim::none().position_low(), kNoPositionLow);
  EXPECT_EQ(Claim::none().who(), Claim::kNobody);
  EXPECT_EQ(Claim::none().attempts(), 0u);
}

TEST(Claim, GivingBackCountsOneAttemptAndKeepsThePosition) {
  Claim back = Claim::make(42, 3, Claim::holder(7)).given_back();
  EXPECT_EQ(back, Claim::make(42, 4, Claim::kRedeliver));
}

TEST(Claim, AttemptsStopAtTheirLargestValue) {
  Claim back = Claim::make(42, Claim::kMaxAttempts, Claim::holder(7)).given_back();
  EXPECT_EQ(back, Claim::make(42, Claim::kMaxAttempts, Claim::kRedeliver));
}

TEST(Claim, ChangingTheHolderKeepsThePosition) {
  EXPECT_EQ(Claim::make(kPositionMask - 1, 0, 0).with(2, 3), Claim::make(kPositionMask - 1, 2, 3));
}

}  // namespace
}  // namespace dsline::slots
