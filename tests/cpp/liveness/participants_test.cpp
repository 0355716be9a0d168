#include "liveness/participants.hpp"

#include <gtest/gtest.h>
#include <signal.h>
#include <sys/wait.h>
#include <unistd.h>

#include "base/process.hpp"
#include "support/small_region.hpp"

namespace dsline::liveness {
namespace {

using support::make_region;
using support::open_again;

TEST(EntryWord, FieldsComeBackAsTheyWereMade) {
  EntryWord word = EntryWord::make(0x123456, EntryState::Used);
  EXPECT_EQ(word.incarnation(), 0x123456u);
  EXPECT_EQ(word.state(), EntryState::Used);
}

TEST(Participants, JoiningFillsTheEntryAndHoldsItsLock) {
  auto region = make_region({});
  auto other = open_again(*region);
  std::uint32_t me = Participants(*region).try_join();
  ASSERT_EQ(me, 0u);
  memory::ParticipantState& entry = other->participant(me);
  EXPECT_EQ(Participants(*other).entry(me).state(), EntryState::Used);
  EXPECT_EQ(entry.pid.load(), static_cast<std::uint32_t>(getpid()));
  EXPECT_EQ(entry.start_time.load(), base::process_start_time(static_cast<std::uint32_t>(getpid())));
  EXPECT_GT(entry.joined_ns.load(), 0u);
  EXPECT_TRUE(other->storage().is_locked(memory::participant_lock(me)));
}

TEST(Participants, EachGetsANumberOfItsOwnUntilTheLimit) {
  auto region = make_region({.participants = 3});
  auto second = open_again(*region);
  auto third = open_again(*region);
  auto fourth = open_again(*region);
  EXPECT_EQ(Participants(*region).try_join(), 0u);
  EXPECT_EQ(Participants(*second).try_join(), 1u);
  EXPECT_EQ(Participants(*third).try_join(), 2u);
  EXPECT_EQ(Participants(*fourth).try_join(), Participants::kNobody);
  EXPECT_EQ(support::used_entries(*region), 3u);
}

TEST(Participants, ANumberThatWasLeftIsGivenAgainAsANewIncarnation) {
  auto region = make_region({.participants = 1});
  Participants mine(*region);
  ASSERT_EQ(mine.try_join(), 0u);
  std::uint64_t first = mine.entry(0).incarnation();
  mine.leave(0);
  EXPECT_EQ(mine.entry(0).state(), EntryState::Free);
  EXPECT_EQ(support::used_entries(*region), 0u);
  auto other = open_again(*region);
  EXPECT_FALSE(other->storage().is_locked(memory::participant_lock(0)));
  EXPECT_EQ(Participants(*other).try_join(), 0u);
  EXPECT_NE(mine.entry(0).incarnation(), first);
}

TEST(Participants, AFreeEntryWhoseLockIsStillHeldIsNotGiven) {
  auto region = make_region({.participants = 2});
  auto other = open_again(*region);
  ASSERT_TRUE(other->storage().try_lock(memory::participant_lock(0)));
  EXPECT_EQ(Participants(*region).try_join(), 1u);
}

TEST(Participants, AliveAreThoseWhoHoldTheirLock) {
  auto region = make_region({});
  auto second = open_again(*region);
  std::uint32_t me = Participants(*region).try_join();
  EXPECT_FALSE(Participants(*region).anyone_else_alive(me));
  EXPECT_EQ(Participants(*region).alive_guess(me), 1u);
  Participants(*second).try_join();
  EXPECT_TRUE(Participants(*region).anyone_else_alive(me));
  EXPECT_EQ(Participants(*region).alive_guess(me), 2u);
  second.reset();  // dies: leaves its entry behind
  EXPECT_FALSE(Participants(*region).anyone_else_alive(me));
  EXPECT_EQ(support::used_entries(*region), 2u);
}

TEST(Participants, TheLivingAreNotLockedForRecovery) {
  auto region = make_region({});
  auto other = open_again(*region);
  Participants(*region).try_join();
  EXPECT_FALSE(Participants(*other).try_lock_dead(0));
  EXPECT_FALSE(Participants(*other).try_lock_dead(1)) << "a free entry";
}

TEST(Participants, ADeadOneIsLockedByOneRecovererAlone) {
  auto region = make_region({});
  auto dead = open_again(*region);
  ASSERT_EQ(Participants(*dead).try_join(), 0u);
  dead.reset();
  auto second = open_again(*region);
  EXPECT_TRUE(Participants(*region).try_lock_dead(0));
  EXPECT_FALSE(Participants(*second).try_lock_dead(0));
  EXPECT_EQ(Participants(*second).try_join(), 1u) << "a dead number is not given before it is recovered";
  Participants(*region).bury(0);
  EXPECT_FALSE(Participants(*second).try_lock_dead(0));
  EXPECT_EQ(Participants(*region).entry(0).state(), EntryState::Free);
}

TEST(Participants, AKilledProcessIsDead) {
  auto region = make_region({});
  int ready[2];
  ASSERT_EQ(pipe(ready), 0);
  pid_t child = fork();
  if (child == 0) {
    auto mine = open_again(*region);
    char number = static_cast<char>(Participants(*mine).try_join());
    if (write(ready[1], &number, 1) != 1) _exit(1);
    for (;;) pause();
  }
  char number = 9;
  ASSERT_EQ(read(ready[0], &number, 1), 1);
  EXPECT_EQ(number, 0);
  EXPECT_FALSE(Participants(*region).try_lock_dead(0));
  kill(child, SIGKILL);
  ASSERT_EQ(waitpid(child, nullptr, 0), child);
  EXPECT_TRUE(Participants(*region).try_lock_dead(0));
  close(ready[0]);
  close(ready[1]);
}

}  // namespace
}  // namespace dsline::liveness
