#include "delivery/dead_letters.hpp"

#include <gtest/gtest.h>

#include <optional>
#include <vector>

#include "liveness/recovery.hpp"
#include "support/crash_points.hpp"
#include "support/small_region.hpp"

namespace dsline::delivery {
namespace {

using order::Group;
using order::Held;
using slots::Claim;
using slots::SlotPool;
using support::claim;
using support::free_slots;
using support::make_region;
using support::Peer;
using support::word;

constexpr std::uint64_t kLap = std::uint64_t{1} << 44;

class DeadLettersTest : public testing::TestWithParam<std::uint64_t> {
 protected:
  void make(std::uint32_t slots, std::uint32_t max_deliveries = 3, std::uint32_t most = 16,
            std::uint32_t groups = 1) {
    support::Shape shape{.slots = slots, .groups = groups};
    shape.first_position = GetParam();
    shape.rules.max_deliveries = max_deliveries;
    shape.rules.dead_letters = most;
    region = make_region(shape);
    pool.emplace(*region);
    letters.emplace(*region, *pool);
    me = liveness::Participants(*region).try_join();
  }
  std::uint32_t send(std::uint32_t groups = 1) { return support::send(*region, me, groups); }
  bool take(Held& held, std::uint32_t g = 0) {
    Group group(*region, g);
    return letters->try_take(group, me, held);
  }
  void give_back(const Held& held, std::uint32_t g = 0) { Group(*region, g).give_back(held, me, 1234); }
  void release(const Held& held, std::uint32_t g = 0) { pool->clear_pending(held.slot, 1u << g); }
  /// Delivers the next message as often as allowed; it is buried at the next look.
  void wear_out(std::uint32_t g = 0) {
    for (std::uint32_t i = 0; i < region->rules().max_deliveries; ++i) {
      Held held{};
      ASSERT_TRUE(take(held, g));
      ASSERT_EQ(held.attempts, i);
      give_back(held, g);
    }
  }
  /// A message that becomes a dead letter of group `g`.
  std::uint32_t send_letter(std::uint32_t g = 0) {
    const std::uint32_t s = send(1u << g);
    wear_out(g);
    Held held{};
    EXPECT_FALSE(take(held, g));
    return s;
  }
  std::uint64_t buried() const { return region->header().buried.load(); }
  std::uint64_t evicted() const { return region->header().letters_dropped.load(); }
  std::uint32_t free() const { return free_slots(*region); }

  std::unique_ptr<memory::Region> region;
  std::optional<SlotPool> pool;
  std::optional<DeadLetters> letters;
  std::uint32_t me = 0;
};

INSTANTIATE_TEST_SUITE_P(From, DeadLettersTest, testing::Values(0, kLap - 2, kLap - 3));

TEST_P(DeadLettersTest, AMessageIsDeliveredAsOftenAsAllowedAndThenBuried) {
  for (std::uint32_t most : {1u, 2u, 3u, 15u}) {
    make(4, most);
    const std::uint32_t s = send();
    Held held{};
    for (std::uint32_t i = 0; i < most; ++i) {
      ASSERT_TRUE(take(held)) << i << " of " << most;
      EXPECT_EQ(held.attempts, i);
      EXPECT_EQ(letters->count(), 0u);
      give_back(held);
    }
    EXPECT_FALSE(take(held));
    EXPECT_EQ(letters->count(), 1u);
    EXPECT_EQ(buried(), 1u);
    EXPECT_EQ(claim(*region, s).who(), Claim::kDead);
    EXPECT_EQ(claim(*region, s).attempts(), most);
    EXPECT_EQ(free(), 3u) << "it stays in its slot";
  }
}

TEST_P(DeadLettersTest, AMessageThatIsReleasedInTimeIsNone) {
  make(2);
  send();
  Held held{};
  for (int i = 0; i < 2; ++i) {
    ASSERT_TRUE(take(held));
    give_back(held);
  }
  ASSERT_TRUE(take(held));
  release(held);
  EXPECT_FALSE(take(held));
  EXPECT_EQ(buried(), 0u);
  EXPECT_EQ(free(), 2u);
}

TEST_P(DeadLettersTest, TheStreamGoesOnBehindIt) {
  make(4);
  send();
  const std::uint32_t next = send();
  wear_out();
  Held held{};
  ASSERT_TRUE(take(held)) << "one call buries the one and takes the other";
  EXPECT_EQ(held.slot, next);
  EXPECT_EQ(held.attempts, 0u);
  EXPECT_EQ(letters->count(), 1u);
}

TEST_P(DeadLettersTest, ItStaysForTheOtherGroupsWhatItWas) {
  make(4, 2, 16, 2);
  const std::uint32_t s = send(0b11);
  wear_out(0);
  Held held{};
  EXPECT_FALSE(take(held, 0));
  ASSERT_TRUE(take(held, 1));
  EXPECT_EQ(held.attempts, 0u);
  release(held, 1);
  EXPECT_EQ(word(*region, s).pending(), 0b01u);
  EXPECT_EQ(letters->count(), 1u);
}

TEST_P(DeadLettersTest, OnlyItsHolderBuriesIt) {
  make(4);
  send();
  Held held{};
  ASSERT_TRUE(take(held));
  Group group(*region, 0);
  letters->bury(group, held, me + 1);
  EXPECT_EQ(claim(*region, held.slot).who(), Claim::holder(me));
  EXPECT_EQ(buried(), 0u);
}

TEST_P(DeadLettersTest, BeyondTheLimitTheOldestGoesAndIsCounted) {
  make(8, 1, 2);
  const std::uint32_t first = send_letter(), second = send_letter();
  EXPECT_EQ(evicted(), 0u);
  const std::uint32_t third = send_letter();
  EXPECT_EQ(letters->count(), 2u);
  EXPECT_EQ(evicted(), 1u);
  EXPECT_EQ(buried(), 3u);
  EXPECT_TRUE(word(*region, first).is_free());
  EXPECT_EQ(claim(*region, second).who(), Claim::kDead);
  EXPECT_EQ(claim(*region, third).who(), Claim::kDead);
}

TEST_P(DeadLettersTest, TheyTakeAtMostHalfOfTheSlots) {
  for (std::uint32_t slots : {2u, 3u, 4u, 5u}) {
    make(slots, 1, 16);
    for (std::uint32_t i = 0; i < slots + 2; ++i) send_letter();
    EXPECT_EQ(letters->count(), slots / 2) << slots;
    EXPECT_EQ(free(), slots - slots / 2) << slots;
    EXPECT_EQ(evicted(), slots + 2 - slots / 2) << slots;
  }
}

TEST_P(DeadLettersTest, WhereNoneAreKeptTheyGoAtOnce) {
  make(1, 1, 16);  // half of one slot is none
  send_letter();
  EXPECT_EQ(letters->count(), 0u);
  EXPECT_EQ(buried(), 1u);
  EXPECT_EQ(evicted(), 1u);
  EXPECT_EQ(free(), 1u);
  make(4, 2, 0);
  send_letter();
  EXPECT_EQ(letters->count(), 0u);
  EXPECT_EQ(buried(), 1u);
  EXPECT_EQ(evicted(), 1u);
  EXPECT_EQ(free(), 4u);
}

TEST_P(DeadLettersTest, TheLimitHoldsForAllGroupsTogetherAndTheOldestOfAnyGoes) {
  make(8, 1, 2, 3);
  const std::uint32_t first = send_letter(2), second = send_letter(0), third = send_letter(1);
  EXPECT_EQ(letters->count(), 2u);
  EXPECT_TRUE(word(*region, first).is_free());
  EXPECT_EQ(claim(*region, second, 0).who(), Claim::kDead);
  EXPECT_EQ(claim(*region, third, 1).who(), Claim::kDead);
}

TEST_P(DeadLettersTest, ALetterThatIsBeingReadIsNotTheOneThatGoes) {
  make(8, 1, 1);
  const std::uint32_t first = send_letter();
  Held held{};
  std::uint32_t group = 9;
  ASSERT_TRUE(letters->try_take_letter(me, held, group));
  send_letter();
  send_letter();
  EXPECT_EQ(held.slot, first);
  EXPECT_EQ(claim(*region, first).who(), Claim::holder(me));
  EXPECT_EQ(letters->count(), 1u);
  EXPECT_EQ(evicted(), 1u);
}

// --- reading them ----------------------------------------------------------------------------------------------------

TEST_P(DeadLettersTest, LettersAreTakenOldestFirstWhoeversTheyAre) {
  make(8, 2, 16, 3);
  const std::uint32_t wanted[] = {send_letter(1), send_letter(0), send_letter(2)};
  const std::uint32_t of[] = {1, 0, 2};
  std::uint64_t last = 0;
  for (int i = 0; i < 3; ++i) {
    Held held{};
    std::uint32_t group = 9;
    ASSERT_TRUE(letters->try_take_letter(me, held, group));
    EXPECT_EQ(held.slot, wanted[i]);
    EXPECT_EQ(group, of[i]);
    EXPECT_EQ(held.attempts, 2u);
    EXPECT_TRUE(i == 0 || held.position > last);
    last = held.position;
    EXPECT_EQ(claim(*region, held.slot, group).who(), Claim::holder(me));
    EXPECT_EQ(letters->count(), 2u - static_cast<std::uint32_t>(i));
  }
  Held none{};
  std::uint32_t group = 9;
  EXPECT_FALSE(letters->try_take_letter(me, none, group));
}

TEST_P(DeadLettersTest, WhereThereAreNoneThereIsNothingToTake) {
  make(4);
  send();
  Held held{};
  std::uint32_t group = 9;
  EXPECT_FALSE(letters->try_take_letter(me, held, group)) << "a message that waits is none";
  ASSERT_TRUE(take(held));
  EXPECT_FALSE(letters->try_take_letter(me, held, group)) << "nor one that is held";
}

TEST_P(DeadLettersTest, AMessageThatWasGivenBackButMayBeDeliveredIsNone) {
  make(4);
  send();
  Held held{};
  ASSERT_TRUE(take(held));
  give_back(held);
  std::uint32_t group = 9;
  EXPECT_FALSE(letters->try_take_letter(me, held, group));
}

TEST_P(DeadLettersTest, AWornOutMessageThatNobodyHasBuriedYetIsTakenAsALetter) {
  make(4, 2);
  const std::uint32_t s = send();
  wear_out();
  Held held{};
  std::uint32_t group = 9;
  ASSERT_TRUE(letters->try_take_letter(me, held, group));
  EXPECT_EQ(held.slot, s);
}

TEST_P(DeadLettersTest, ALetterThatIsReleasedIsGone) {
  make(4);
  send_letter();
  Held held{};
  std::uint32_t group = 9;
  ASSERT_TRUE(letters->try_take_letter(me, held, group));
  release(held, group);
  EXPECT_EQ(free(), 4u);
  EXPECT_EQ(letters->count(), 0u);
}

TEST_P(DeadLettersTest, ALetterThatIsPutBackIsOneAgainWithTheSameAttempts) {
  make(4);
  const std::uint32_t s = send_letter();
  Group owner(*region, 0);
  Held held{};
  std::uint32_t group = 9;
  ASSERT_TRUE(letters->try_take_letter(me, held, group));
  letters->put_back(owner, held, me + 1);
  EXPECT_EQ(claim(*region, s).who(), Claim::holder(me)) << "it is not theirs to put back";
  letters->put_back(owner, held, me);
  EXPECT_EQ(letters->count(), 1u);
  EXPECT_EQ(buried(), 1u) << "not counted a second time";
  EXPECT_FALSE(take(held));
  ASSERT_TRUE(letters->try_take_letter(me, held, group));
  EXPECT_EQ(held.attempts, 3u);
}

TEST_P(DeadLettersTest, ALetterWhoseReaderDiedIsOneAgainAndNotDelivered) {
  make(4);
  const std::uint32_t s = send_letter();
  Peer reader(*region);
  SlotPool its_pool(*reader.region);
  Held held{};
  std::uint32_t group = 9;
  ASSERT_TRUE(DeadLetters(*reader.region, its_pool).try_take_letter(reader.number, held, group));
  reader.die();
  ASSERT_EQ(liveness::recover_the_dead(*region, me, true), 1u);
  EXPECT_FALSE(take(held)) << "it was delivered often enough";
  EXPECT_EQ(letters->count(), 1u);
  ASSERT_TRUE(letters->try_take_letter(me, held, group));
  EXPECT_EQ(held.slot, s);
}

TEST_P(DeadLettersTest, ARevivedLetterIsDeliveredAgainAndMayFailAgain) {
  for (std::uint32_t most : {1u, 2u, 3u}) {
    make(4, most);
    const std::uint32_t s = send_letter();
    Group owner(*region, 0);
    Held held{};
    std::uint32_t group = 9;
    ASSERT_TRUE(letters->try_take_letter(me, held, group));
    letters->revive(owner, held, me + 1);
    EXPECT_EQ(claim(*region, s).who(), Claim::holder(me)) << "it is not theirs to revive";
    letters->revive(owner, held, me);
    EXPECT_EQ(letters->count(), 0u);
    ASSERT_TRUE(take(held)) << most;
    EXPECT_EQ(held.slot, s);
    EXPECT_EQ(held.attempts, most == 1 ? 0u : 1u)
        << "flagged as delivered before where that leaves it a delivery";
    EXPECT_LT(held.attempts, most);
    while (true) {
      give_back(held);
      if (!take(held)) break;
    }
    EXPECT_EQ(letters->count(), 1u);
    EXPECT_EQ(buried(), 2u);
  }
}

TEST_P(DeadLettersTest, RevivingWakesAMember) {
  make(4);
  send_letter();
  Group owner(*region, 0);
  Held held{};
  std::uint32_t group = 9;
  ASSERT_TRUE(letters->try_take_letter(me, held, group));
  owner.messages().add(me);
  const std::uint32_t before = owner.messages().sequence();
  letters->revive(owner, held, me);
  EXPECT_NE(owner.messages().sequence(), before);
}

// --- death -----------------------------------------------------------------------------------------------------------

TEST_P(DeadLettersTest, EveryDeathOfAHolderCountsAsADelivery) {
  make(4, 2);
  send();
  Held held{};
  for (std::uint32_t i = 0; i < 2; ++i) {
    Peer member(*region);
    SlotPool its_pool(*member.region);
    Group group(*member.region, 0);
    ASSERT_TRUE(DeadLetters(*member.region, its_pool).try_take(group, member.number, held));
    EXPECT_EQ(held.attempts, i);
    member.die();
    ASSERT_EQ(liveness::recover_the_dead(*region, me, true), 1u);
  }
  EXPECT_FALSE(take(held));
  EXPECT_EQ(letters->count(), 1u);
}

#if defined(DSLINE_CRASH_POINTS)

using support::CrashPoint;
using support::Ending;

TEST_P(DeadLettersTest, ABurialThatWasCutAnywhereIsMadeGoodByTheNextTaker) {
  int most = 0;
  Ending ending = Ending::Died;
  for (int store = 1; ending == Ending::Died; ++store) {
    make(4, 1, 1);
    send_letter();
    const std::uint32_t s = send();
    wear_out();
    ending = CrashPoint::die_before(store, [this](CrashPoint& point) {
      Peer taker(*region);
      SlotPool its_pool(*taker.region);
      Group group(*taker.region, 0);
      DeadLetters its(*taker.region, its_pool);
      point.arm(region->storage().descriptor());
      Held held{};
      its.try_take(group, taker.number, held);
    });
    ASSERT_NE(ending, Ending::Failed) << store;
    most = store;
    ASSERT_EQ(liveness::recover_the_dead(*region, me, true), 1u);
    Held held{};
    EXPECT_FALSE(take(held)) << "cut before store " << store;
    EXPECT_EQ(claim(*region, s).who(), Claim::kDead) << "cut before store " << store;
    // One too many stays until the next burial.
    send_letter();
    EXPECT_EQ(letters->count(), 1u) << store;
    EXPECT_EQ(free(), 3u) << "cut before store " << store;
  }
  EXPECT_GT(most, 6) << "it was not watched";
}

#endif

}  // namespace
}  // namespace dsline::delivery
