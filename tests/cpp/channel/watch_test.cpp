#include "dsline/watch.hpp"

#include <gtest/gtest.h>
#include <poll.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <memory>
#include <set>
#include <thread>
#include <vector>

#include "support/channels.hpp"
#include "support/processes.hpp"

namespace dsline {
namespace {

using support::adopt;
using support::next;
using support::patience;
using support::send;
using support::small;

constexpr int kPatienceMs = 60'000;

bool is_readable(int fd, int timeout_ms = 0) {
  pollfd one{fd, POLLIN, 0};
  return poll(&one, 1, timeout_ms) == 1 && (one.revents & POLLIN) != 0;
}

bool comes(Watch& watch) { return is_readable(watch.descriptor(), kPatienceMs); }

/// Arms until there is nothing any more.
void settle(Watch& watch) {
  while (watch.arm()) {
  }
}

/// Every test with futex_waitv, and as on a kernel without it.
class Watching : public testing::TestWithParam<bool> {
 protected:
  void SetUp() override { pretend_old_kernel(GetParam()); }
  void TearDown() override { pretend_old_kernel(false); }

  std::shared_ptr<Channel> channel = Channel::create_anonymous(small());
};

INSTANTIATE_TEST_SUITE_P(Kernels, Watching, testing::Bool(), [](const testing::TestParamInfo<bool>& info) {
  return info.param ? "without_futex_waitv" : "with_futex_waitv";
});

TEST_P(Watching, IsReadableWhenAMessageComes) {
  auto sender = adopt(*channel);
  Watch watch(channel, Side::Message);
  for (int i = 0; i < 100; ++i) {
    ASSERT_FALSE(watch.arm());
    ASSERT_FALSE(is_readable(watch.descriptor()));
    ASSERT_EQ(send(*sender, "m"), Outcome::Ok);
    ASSERT_TRUE(comes(watch));
    ASSERT_EQ(next(*channel), "m");
  }
}

TEST_P(Watching, SaysAtOnceWhatIsThere) {
  Watch watch(channel, Side::Message);
  send(*channel, "m");
  EXPECT_TRUE(watch.arm());
  EXPECT_TRUE(is_readable(watch.descriptor()));
  EXPECT_TRUE(watch.arm());  // nobody has taken it
  EXPECT_EQ(next(*channel), "m");
  EXPECT_TRUE(is_readable(watch.descriptor()));  // until somebody clears it
  watch.clear();
  EXPECT_FALSE(is_readable(watch.descriptor()));
  EXPECT_FALSE(watch.arm());
}

TEST_P(Watching, IsReadableWhenThereIsRoom) {
  auto receiver = adopt(*channel);
  Watch watch(channel, Side::Room);
  EXPECT_TRUE(watch.arm());
  while (send(*channel, "m") == Outcome::Ok) {
  }
  for (int i = 0; i < 100; ++i) {
    settle(watch);
    ASSERT_EQ(next(*receiver), "m");
    ASSERT_TRUE(comes(watch));
    ASSERT_EQ(send(*channel, "m"), Outcome::Ok);
  }
}

TEST_P(Watching, EndsAreReadable) {
  Watch message(channel, Side::Message);
  auto other = adopt(*channel);
  Watch room(other, Side::Room);
  while (send(*other, "m") == Outcome::Ok) {
  }
  settle(room);
  other->shutdown(false);
  EXPECT_TRUE(comes(room));
  EXPECT_TRUE(message.arm());
  while (next(*channel) == "m") {
  }
  EXPECT_TRUE(message.arm());
}

TEST_P(Watching, AClosedHandleIsReadableAndLeavesNoSleeperBehind) {
  Watch watch(channel, Side::Message);
  auto keeper = adopt(*channel);
  ASSERT_FALSE(watch.arm());
  EXPECT_EQ(keeper->report().participants.size(), 2u);
  channel->close();
  EXPECT_TRUE(is_readable(watch.descriptor()));
  EXPECT_EQ(keeper->report().participants.size(), 1u);
  EXPECT_TRUE(watch.arm());
  // Whoever gets the number of the closed handle is not told that he waits, or that he does not.
  auto heir = adopt(*keeper);
  EXPECT_TRUE(watch.arm());
  for (const auto& each : keeper->report().participants) EXPECT_EQ(each.waiting_on, 0u);
}

TEST_P(Watching, AHandleThatIsDroppedWhileWatchedGoes) {
  auto keeper = adopt(*channel);
  auto watch = std::make_unique<Watch>(std::move(channel), Side::Message);
  ASSERT_FALSE(watch->arm());
  watch.reset();
  EXPECT_EQ(keeper->report().participants.size(), 1u);
}

TEST_P(Watching, MoreThanTheKernelWaitsForAtOnce) {
  constexpr int kMany = 300;
  std::vector<std::shared_ptr<Channel>> channels;
  std::vector<std::unique_ptr<Watch>> watches;
  const int count = GetParam() ? 20 : kMany;  // a thread for each
  for (int i = 0; i < count; ++i) {
    channels.push_back(Channel::create_heap(small()));
    watches.push_back(std::make_unique<Watch>(channels.back(), Side::Message));
    ASSERT_FALSE(watches.back()->arm());
  }
  for (int i = count; i-- > 0;) {
    send(*channels[i], "m");
    ASSERT_TRUE(comes(*watches[i]));
  }
}

// Who takes nothing must not keep a wake-up from those who do. A sleeper that has to help itself finds the message only when
// its slice is over; that happens by chance as well, if the message comes just then.
int times_slept_through(Channel& receiver, Channel& sender, const std::function<void()>& before, int rounds) {
  std::atomic<int> slept_through{0};
  std::atomic<int> taken{0};
  std::thread thread([&] {
    Outcome waited = Outcome::Ok;
    while (taken < rounds) {
      if (next(receiver) == "m") {
        if (waited == Outcome::Empty) ++slept_through;
        ++taken;
        waited = Outcome::Ok;
      } else {
        waited = receiver.wait_for_message(patience(), false);
      }
    }
  });
  for (int i = 0; i < rounds; ++i) {
    before();
    const auto is_asleep = [&] {
      const auto found = receiver.report().participants;
      return std::count_if(found.begin(), found.end(), [](auto& each) { return each.waiting_on == 2; }) >= 1;
    };
    while (!is_asleep()) std::this_thread::yield();
    usleep(2000);  // so that he mostly sleeps by now; that he does is not needed
    send(sender, "m");
    while (taken <= i) std::this_thread::yield();
  }
  thread.join();
  return slept_through;
}

TEST_P(Watching, WhoIsSignalledAndDoesNotTakeLetsOthersHaveIt) {
  auto receiver = adopt(*channel);
  auto sender = adopt(*channel);
  Watch watch(channel, Side::Message);
  const int rounds = 20;
  const int slept = times_slept_through(
      *receiver, *sender, [&] { watch.arm(); }, rounds);
  EXPECT_LT(slept, rounds / 4);
}

TEST_P(Watching, WhoWasWatchedAMomentAgoLetsOthersHaveIt) {
  auto receiver = adopt(*channel);
  auto sender = adopt(*channel);
  auto stranger = Channel::create_heap(small());
  Watch watch(channel, Side::Message);
  const int rounds = 20;
  const auto watched_before = [&] {
    watch.arm();
    send(*sender,
         "x");  // signals, unless the other receiver takes it first, and leaves the thread asleep on the word
    is_readable(watch.descriptor(), 20);
    while (channel->depth() != 0) next(*channel);
    // The other receiver, who may have slept all the time, sleeps anew: behind the thread, which is woken first then.
    send(*sender, "y");
    while (channel->depth() != 0) std::this_thread::yield();
    usleep(1000);
  };
  const int slept = times_slept_through(*receiver, *sender, watched_before, rounds);
  EXPECT_LT(slept, rounds / 4);
}

TEST_P(Watching, AWatchThatEndsPassesOnWhatItWasWokenFor) {
  auto receiver = adopt(*channel);
  auto sender = adopt(*channel);
  const int rounds = 20;
  std::unique_ptr<Watch> watch;
  std::thread ender;
  const auto arm_and_end_later = [&] {
    if (ender.joinable()) ender.join();
    watch = std::make_unique<Watch>(channel, Side::Message);
    watch->arm();
    ender = std::thread([&] {
      usleep(2000);
      watch.reset();
    });
  };
  const int slept = times_slept_through(*receiver, *sender, arm_and_end_later, rounds);
  ender.join();
  EXPECT_LT(slept, rounds / 4);
}

TEST_P(Watching, WhatADeadReceiverHeldIsSignalled) {
  send(*channel, "m");
  Watch watch(channel, Side::Message);
  support::die_holding([&] {
    Received message;
    auto mine = adopt(*channel);
    if (mine->try_recv(message) != Outcome::Ok) _exit(1);
    static_cast<void>(new std::shared_ptr<Channel>(mine));
  });
  // It is there before the death is noticed, or some slices later.
  for (;;) {
    watch.arm();
    ASSERT_TRUE(comes(watch));
    Received message;
    if (channel->try_recv(message) != Outcome::Ok) continue;
    EXPECT_EQ(support::text_of(message), "m");
    EXPECT_EQ(message.attempts, 1u);
    channel->release(message);
    break;
  }
}

#if !defined(__SANITIZE_THREAD__)  // which ends a child that starts threads
TEST_P(Watching, AForkedChildHasItsOwn) {
  Watch watch(channel, Side::Message);
  ASSERT_FALSE(watch.arm());
  auto sender = adopt(*channel);
  const int of_parent = watch.descriptor();
  EXPECT_EQ(support::in_child([&] {
              if (is_readable(of_parent)) return false;  // closed
              if (watch.arm()) return false;
              std::thread thread([&] { send(*sender, "for the child"); });
              const bool came = comes(watch);
              thread.join();
              return came && next(*channel) == "for the child";
            }),
            0);
  // Both watched, so the parent was told as well.
  EXPECT_TRUE(comes(watch));
  watch.arm();
  send(*sender, "for the parent");
  EXPECT_TRUE(comes(watch));
  EXPECT_EQ(next(*channel), "for the parent");
}

TEST_P(Watching, AForkedChildMayDropWhatTheParentWatches) {
  auto watch = std::make_unique<Watch>(channel, Side::Message);
  ASSERT_FALSE(watch->arm());
  EXPECT_EQ(support::in_child([&] {
              watch.reset();
              return true;
            }),
            0);
  send(*channel, "m");
  EXPECT_TRUE(comes(*watch));
}

// Recovery raises the flag for given back messages whether or not there are any.
TEST_P(Watching, ADeadReceiverThatHeldNothingIsNoMessage) {
  Watch watch(channel, Side::Message);
  support::die_holding([&] { static_cast<void>(new std::shared_ptr<Channel>(adopt(*channel))); });
  EXPECT_TRUE(channel->check_peers());
  settle(watch);
  EXPECT_FALSE(is_readable(watch.descriptor()));
  Waited one{channel.get(), Side::Message};
  EXPECT_EQ(wait_for_any(&one, 1, 0, false), Outcome::TimedOut);
  EXPECT_FALSE(one.is_ready);
}

// The thread may hold its lock at the very moment of the fork.
TEST_P(Watching, ForkInTheMiddle) {
  auto sender = adopt(*channel);
  Watch watch(channel, Side::Message);
  std::atomic<bool> stop{false};
  std::thread busy([&] {
    while (!stop) {
      watch.arm();
      send(*sender, "m");
      next(*channel);
    }
  });
  for (int i = 0; i < 20; ++i) {
    EXPECT_EQ(support::in_child([&] {
                auto mine = Channel::create_heap(small());
                Watch own(mine, Side::Message);
                own.arm();
                send(*mine, "m");
                return comes(own);
              }),
              0);
  }
  stop = true;
  busy.join();
}

TEST_P(Watching, AProcessEndsInOrderWhileItWatches) {
  send(*channel, "held");
  pid_t child = fork();
  if (child == 0) {
    auto mine = adopt(*channel);
    Received message;
    static Watch* watch = new Watch(mine, Side::Message);  // nobody ends them before the process does
    static auto* kept = new std::shared_ptr<Channel>(mine);
    if (*kept == nullptr || mine->try_recv(message) != Outcome::Ok) _exit(1);
    watch->arm();
    std::exit(0);
  }
  int status = -1;
  waitpid(child, &status, 0);
  EXPECT_EQ(status, 0);
  EXPECT_EQ(channel->deaths(), 0u);
  EXPECT_FALSE(channel->check_peers());
  EXPECT_EQ(next(*channel), "(empty)");
}
#endif

TEST_P(Watching, ClosingFromAnotherThreadAtAnyTime) {
  for (int i = 0; i < 100; ++i) {
    auto mine = adopt(*channel);
    Watch watch(mine, Side::Message);
    Watch room(mine, Side::Room);
    std::atomic<bool> closed{false};
    std::thread arming([&] {
      while (!closed) {
        watch.arm();
        room.arm();
        send(*channel, "m");
        next(*channel);
      }
      watch.arm();
    });
    if (i % 2 == 0) std::this_thread::yield();
    mine->close();
    closed = true;
    arming.join();
    ASSERT_TRUE(is_readable(watch.descriptor()));
    EXPECT_EQ(channel->report().participants.size(), 1u);
  }
}

TEST_P(Watching, StreamsThroughSeveralWatchesLoseNothing) {
  constexpr int kMessages = 3000;
  constexpr int kReceivers = 3;
  auto sender = adopt(*channel);
  std::atomic<int> taken{0};
  std::vector<std::thread> threads;
  for (int r = 0; r < kReceivers; ++r) {
    threads.emplace_back([&, r] {
      auto mine = r == 0 ? channel : adopt(*channel);
      Watch watch(mine, Side::Message);
      for (;;) {
        const std::string text = next(*mine);
        if (text == "m") {
          ++taken;
        } else if (text == "(closed)") {
          return;
        } else if (!watch.arm() && !comes(watch)) {
          return;
        }
      }
    });
  }
  Watch room(sender, Side::Room);
  for (int i = 0; i < kMessages; ++i) {
    while (send(*sender, "m") != Outcome::Ok) {
      const bool at_once = room.arm();
      ASSERT_TRUE(at_once || comes(room));
    }
  }
  sender->shutdown(false);
  for (auto& thread : threads) thread.join();
  EXPECT_EQ(taken, kMessages);
}

class WaitingForAny : public testing::Test {
 protected:
  Outcome wait(std::int64_t deadline_ns) {
    for (bool spin = true;;) {
      const Outcome outcome = wait_for_any(list.data(), list.size(), deadline_ns, spin);
      if (outcome == Outcome::Ok || outcome == Outcome::TimedOut) return outcome;
      spin = false;
    }
  }
  std::set<std::size_t> ready() const {
    std::set<std::size_t> found;
    for (std::size_t i = 0; i < list.size(); ++i) {
      if (list[i].is_ready) found.insert(i);
    }
    return found;
  }

  std::shared_ptr<Channel> a = Channel::create_anonymous(small());
  std::shared_ptr<Channel> b = Channel::create_heap(small());
  std::vector<Waited> list = {{a.get(), Side::Message}, {b.get(), Side::Message}};
};

TEST_F(WaitingForAny, SaysWhichHasSomething) {
  if (most_waited() == 0) GTEST_SKIP() << "this kernel has no futex_waitv";
  EXPECT_EQ(wait(0), Outcome::TimedOut);
  EXPECT_EQ(ready(), std::set<std::size_t>{});
  send(*b, "m");
  EXPECT_EQ(wait(patience()), Outcome::Ok);
  EXPECT_EQ(ready(), std::set<std::size_t>{1});
  send(*a, "m");
  EXPECT_EQ(wait(0), Outcome::Ok);
  EXPECT_EQ(ready(), (std::set<std::size_t>{0, 1}));
  EXPECT_EQ(next(*b), "m");
  EXPECT_EQ(wait(patience()), Outcome::Ok);
  EXPECT_EQ(ready(), std::set<std::size_t>{0});
}

TEST_F(WaitingForAny, IsWokenByAnyOfThem) {
  if (most_waited() == 0) GTEST_SKIP() << "this kernel has no futex_waitv";
  for (int i = 0; i < 100; ++i) {
    Channel& one = i % 2 == 0 ? *a : *b;
    std::thread thread([&] { send(one, "m"); });
    EXPECT_EQ(wait(patience()), Outcome::Ok);
    thread.join();
    EXPECT_EQ(ready(), std::set<std::size_t>{static_cast<std::size_t>(i % 2)});
    EXPECT_EQ(next(one), "m");
  }
}

TEST_F(WaitingForAny, IsWokenByACloseAndLeavesNoSleeperBehind) {
  if (most_waited() == 0) GTEST_SKIP() << "this kernel has no futex_waitv";
  auto keeper = adopt(*a);
  for (int i = 0; i < 30; ++i) {
    auto mine = adopt(*a);
    list[0].channel = mine.get();
    std::thread thread([&] { mine->close(); });
    EXPECT_EQ(wait(patience()), Outcome::Ok);
    thread.join();
    EXPECT_EQ(ready(), std::set<std::size_t>{0});
    EXPECT_EQ(keeper->report().participants.size(), 2u);
  }
}

TEST_F(WaitingForAny, LetsOthersHaveWhatItWasWokenFor) {
  if (most_waited() == 0) GTEST_SKIP() << "this kernel has no futex_waitv";
  auto receiver = adopt(*a);
  auto sender = adopt(*a);
  std::thread waiter;
  std::atomic<bool> waits{false};
  const auto wait_first = [&] {
    if (waits) return;  // what came before was taken before he looked
    if (waiter.joinable()) waiter.join();
    waits = true;
    waiter = std::thread([&] {
      wait(patience());
      waits = false;
    });
    usleep(1000);
  };
  const int rounds = 20;
  const int slept = times_slept_through(*receiver, *sender, wait_first, rounds);
  send(*sender, "m");
  waiter.join();
  EXPECT_LT(slept, rounds / 4);
}

}  // namespace
}  // namespace dsline
