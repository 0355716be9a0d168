#include <gtest/gtest.h>

#include <algorithm>
#include <atomic>
#include <mutex>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "base/clock.hpp"
#include "dsline/channel.hpp"
#include "support/channels.hpp"
#include "support/crash_points.hpp"
#include "support/processes.hpp"

namespace dsline {
namespace {

using support::adopt;
using support::die_holding;
using support::next;
using support::send;
using support::small;

using ChannelPtr = std::shared_ptr<Channel>;

constexpr std::uint64_t kNoLimit = std::uint64_t{1} << 40;

Place place(Channel& channel, std::uint64_t value, Outcome wanted = Outcome::Ok) {
  Place where;
  EXPECT_EQ(channel.try_place(&value, sizeof value, kNoLimit, where), wanted);
  return where;
}

/// What is there, taken and released; 0 where there is nothing.
std::uint64_t take(Channel& channel, Place where) {
  std::uint64_t value = 0;
  const Outcome outcome = channel.try_take_into(where, &value, sizeof value);
  EXPECT_TRUE(outcome == Outcome::Ok || outcome == Outcome::Empty) << static_cast<int>(outcome);
  return outcome == Outcome::Ok ? value : 0;
}

/// A handle of a region that has one group only, a durable one whose members' messages go with them.
ChannelPtr store(ChannelOptions options = small()) {
  options.default_group = 0;
  options.max_groups = 1;
  ChannelPtr channel = Channel::create_anonymous(options);
  SubscribeOptions to;
  to.group = "store";
  to.durable = true;
  to.on_death = OnDeath::Drop;
  ChannelPtr member = channel->subscribe(to);
  channel->close();
  return member;
}

TEST(Placing, EveryMessageIsTakenByItsPlaceInAnyOrder) {
  ChannelPtr channel = store();
  std::vector<Place> places;
  for (std::uint64_t i = 1; i <= 4; ++i) places.push_back(place(*channel, i));
  place(*channel, 5, Outcome::Full);
  for (std::uint64_t i : {3, 1, 4, 2}) EXPECT_EQ(take(*channel, places[i - 1]), i);
  for (Place each : places) EXPECT_EQ(take(*channel, each), 0u) << "each can be taken once";
  EXPECT_EQ(channel->stats().free_slots, 4u);
}

TEST(Placing, APlaceIsOfOneMessageOnly) {
  ChannelPtr channel = store(small(1));
  const Place first = place(*channel, 1);
  EXPECT_EQ(take(*channel, {first.slot, first.sequence + 1}), 0u);
  EXPECT_EQ(take(*channel, {first.slot, first.sequence + (std::uint64_t{1} << 44)}), 0u);
  EXPECT_EQ(take(*channel, {first.slot + 1, first.sequence}), 0u);
  EXPECT_EQ(take(*channel, first), 1u);
  const Place second = place(*channel, 2);
  EXPECT_EQ(second.slot, first.slot);
  EXPECT_EQ(take(*channel, first), 0u);
  EXPECT_EQ(take(*channel, second), 2u);
}

TEST(Placing, AHeldMessageIsTakenOnceAndAgainAfterItWasPutBack) {
  ChannelPtr channel = store();
  const Place where = place(*channel, 7);
  Received message, other;
  ASSERT_EQ(channel->try_take(where, message), Outcome::Ok);
  EXPECT_EQ(channel->try_take(where, other), Outcome::Empty);
  channel->put_back(message);
  EXPECT_EQ(take(*channel, where), 7u);
  EXPECT_EQ(channel->stats().free_slots, 4u);
}

TEST(Placing, AnotherLengthIsRefusedAndTheSlotComesBack) {
  ChannelPtr channel = store();
  const Place where = place(*channel, 7);
  char byte = 0;
  EXPECT_EQ(channel->try_take_into(where, &byte, 1), Outcome::Corrupted);
  EXPECT_EQ(channel->stats().free_slots, 4u);
}

TEST(Placing, PublishingForNobodyHasNoPlace) {
  ChannelOptions options = small();
  options.default_group = 0;
  ChannelPtr channel = Channel::create_anonymous(options);
  Loan loan;
  Place where;
  ASSERT_EQ(channel->try_alloc(1, 0, Backpressure::Raise, loan), Outcome::Ok);
  EXPECT_EQ(channel->publish(loan, kBytesMessage, 0, where), Outcome::Dropped);
  EXPECT_FALSE(channel->is_there(where));
  EXPECT_FALSE(channel->try_withdraw(where));
}

TEST(Placing, WithoutAGroupNothingIsKept) {
  ChannelOptions options = small();
  options.default_group = 0;
  ChannelPtr channel = Channel::create_anonymous(options);
  place(*channel, 1, Outcome::Dropped);
  EXPECT_EQ(channel->stats().free_slots, 4u);
}

TEST(Placing, TheLimitCountsWhatIsInUse) {
  ChannelOptions options = small(8, 4096);
  options.max_message_size = 1 << 20;
  ChannelPtr channel = store(options);
  std::vector<char> large(300000, 'x');
  Place first, second;
  const std::uint64_t limit = 700000;
  ASSERT_EQ(channel->try_place(large.data(), large.size(), limit, first), Outcome::Ok);
  ASSERT_EQ(channel->try_place(large.data(), large.size(), limit, second), Outcome::Ok);
  Place third;
  EXPECT_EQ(channel->try_place(large.data(), large.size(), limit, third), Outcome::Full);
  EXPECT_EQ(channel->memory_use().used_slots, 2u);
  std::vector<char> out(large.size());
  EXPECT_EQ(channel->try_take_into(first, out.data(), out.size()), Outcome::Ok);
  EXPECT_EQ(out, large);
  EXPECT_GT(channel->memory_use().idle_bytes, large.size()) << "the slot keeps its memory for the next one";
  ASSERT_EQ(channel->try_place(large.data(), large.size(), limit, third), Outcome::Ok);
  channel->try_take_into(second, out.data(), out.size());
  channel->try_take_into(third, out.data(), out.size());
  channel->trim();
  EXPECT_LT(channel->memory_use().idle_bytes, large.size());
}

TEST(Placing, MemoryThatOtherSlotsDoNotNeedMakesRoom) {
  ChannelOptions options = small(8, 4096);
  options.max_message_size = 1 << 20;
  ChannelPtr channel = store(options);
  const std::uint64_t limit = 1200000;
  std::vector<char> large(300000, 'x');
  std::vector<Place> places(3);
  for (Place& each : places)
    ASSERT_EQ(channel->try_place(large.data(), large.size(), limit, each), Outcome::Ok);
  for (Place& each : places) channel->try_take_into(each, large.data(), large.size());
  large.resize(1000000);
  ASSERT_EQ(channel->try_place(large.data(), large.size(), limit, places[0]), Outcome::Ok);
  const MemoryUse use = channel->memory_use();
  EXPECT_LE(use.used_bytes + use.idle_bytes, limit);
}

// The order has 16 cells here, which go round a hundred thousand times while the cursor stays where the lost message is.
void run_round_a_lost_message(std::uint64_t first_position) {
  ChannelOptions options = small();
  options.first_position = first_position;
  ChannelPtr channel = Channel::create_anonymous(options);
  const Place lost = place(*channel, 99);
  std::mt19937_64 random(7);
  std::vector<std::pair<Place, std::uint64_t>> there;
  std::uint64_t value = 100;
  for (int i = 0; i < 2'000'000; ++i) {
    if (there.size() < 3 && (there.empty() || random() % 2 == 0)) {
      there.emplace_back(place(*channel, ++value), value);
    } else {
      const std::size_t which = random() % there.size();
      ASSERT_EQ(take(*channel, there[which].first), there[which].second);
      there.erase(there.begin() + static_cast<std::ptrdiff_t>(which));
    }
  }
  for (auto& [where, wanted] : there) ASSERT_EQ(take(*channel, where), wanted);
  EXPECT_EQ(channel->stats().free_slots, 3u);
  // Whoever receives in order finds it all the same, once, and the order goes on.
  send(*channel, "after");
  Received message;
  ASSERT_EQ(channel->try_recv(message), Outcome::Ok);
  EXPECT_EQ(message.sequence, lost.sequence);
  channel->release(message);
  EXPECT_EQ(next(*channel), "after");
  EXPECT_EQ(take(*channel, lost), 0u);
  EXPECT_EQ(next(*channel), "(empty)");
  EXPECT_EQ(channel->stats().free_slots, 4u);
}

TEST(Placing, MillionsGoRoundALostMessage) { run_round_a_lost_message(0); }
TEST(Placing, AlsoOverTheWrapOfPositions) { run_round_a_lost_message((std::uint64_t{1} << 44) - 500'000); }

TEST(Placing, ThreadsThatPlaceAndTakeLoseNothing) {
  ChannelPtr channel = store(small(8));
  constexpr std::uint64_t kEach = 100'000;
  std::mutex mutex;
  std::vector<std::pair<Place, std::uint64_t>> handed;
  std::atomic<std::uint64_t> sum{0}, taken{0};
  std::vector<std::thread> threads;
  for (std::uint64_t t = 0; t < 2; ++t) {
    threads.emplace_back([&, t] {
      for (std::uint64_t i = 1; i <= kEach;) {
        Place where;
        const std::uint64_t value = t * kEach + i;
        if (channel->try_place(&value, sizeof value, kNoLimit, where) != Outcome::Ok) {
          std::this_thread::yield();
          continue;
        }
        std::lock_guard lock(mutex);
        handed.emplace_back(where, value);
        ++i;
      }
    });
    threads.emplace_back([&] {
      while (taken < 2 * kEach) {
        std::pair<Place, std::uint64_t> one{};
        {
          std::lock_guard lock(mutex);
          if (!handed.empty()) {
            one = handed.back();
            handed.pop_back();
          }
        }
        if (one.second == 0) {
          std::this_thread::yield();
          continue;
        }
        EXPECT_EQ(take(*channel, one.first), one.second);
        sum += one.second;
        ++taken;
      }
    });
  }
  for (std::thread& each : threads) each.join();
  EXPECT_EQ(sum, 2 * kEach * (2 * kEach + 1) / 2);
  EXPECT_EQ(channel->stats().free_slots, 8u);
}

TEST(Placing, TwoWhoWantTheSameGetItOnce) {
  ChannelPtr channel = store();
  ChannelPtr other = adopt(*channel);
  SubscribeOptions to;
  to.group = "store";
  to.durable = true;
  to.on_death = OnDeath::Drop;
  other = other->subscribe(to);
  for (std::uint64_t i = 1; i <= 20'000; ++i) {
    const Place where = place(*channel, i);
    std::uint64_t a = 0, b = 0;
    std::thread rival([&] { b = take(*other, where); });
    a = take(*channel, where);
    rival.join();
    ASSERT_EQ(a + b, i);
    if (i == 200 && getenv("DSLINE_LONG") == nullptr) break;
  }
}

TEST(Placing, WhatADeadTakerHeldIsDropped) {
  ChannelPtr channel = store();
  const Place held = place(*channel, 1), kept = place(*channel, 2);
  die_holding([&] {
    Received message;
    if (channel->try_take(held, message) != Outcome::Ok) throw 1;
  });
  channel->check_peers();
  EXPECT_EQ(take(*channel, held), 0u);
  EXPECT_EQ(channel->stats().free_slots, 3u);
  EXPECT_EQ(take(*channel, kept), 2u);
}

TEST(Placing, InAGroupThatRedeliversItCanBeTakenAgain) {
  ChannelPtr channel = Channel::create_anonymous(small());
  const Place held = place(*channel, 1);
  die_holding([&] {
    Received message;
    if (channel->try_take(held, message) != Outcome::Ok) throw 1;
  });
  channel->check_peers();
  Received message;
  ASSERT_EQ(channel->try_take(held, message), Outcome::Ok);
  EXPECT_EQ(message.attempts, 1u);
  channel->release(message);
}

TEST(Placing, OldMessagesAreDroppedOnRequest) {
  ChannelPtr channel = store();
  const Place old = place(*channel, 1);
  Received message;
  const Place taken = place(*channel, 2);
  ASSERT_EQ(channel->try_take(taken, message), Outcome::Ok);
  const std::int64_t now = base::realtime_ns() + 1;
  while (base::realtime_ns() <= now) {
  }
  const Place young = place(*channel, 3);
  EXPECT_EQ(channel->discard_older(now), 1u);
  EXPECT_EQ(take(*channel, old), 0u);
  EXPECT_EQ(take(*channel, young), 3u);
  channel->release(message);
  EXPECT_EQ(channel->stats().free_slots, 4u);
}

Place publish(Channel& channel, const std::string& text) {
  Loan loan;
  Place where;
  EXPECT_EQ(channel.try_alloc(text.size(), 0, Backpressure::Raise, loan), Outcome::Ok);
  std::copy(text.begin(), text.end(), reinterpret_cast<char*>(loan.payload));
  EXPECT_EQ(channel.publish(loan, kBytesMessage, 0, where), Outcome::Ok);
  return where;
}

TEST(Placing, AMessageIsWithdrawnUntilSomebodyTakesIt) {
  ChannelPtr channel = Channel::create_anonymous(small());
  ChannelPtr sender = adopt(*channel);
  const Place first = publish(*sender, "first"), second = publish(*sender, "second"),
              third = publish(*sender, "third");
  EXPECT_TRUE(sender->is_there(second));
  EXPECT_TRUE(sender->try_withdraw(second));
  EXPECT_FALSE(sender->is_there(second));
  EXPECT_FALSE(sender->try_withdraw(second));
  Received message;
  ASSERT_EQ(channel->try_recv(message), Outcome::Ok);
  EXPECT_EQ(message.sequence, first.sequence);
  EXPECT_FALSE(sender->try_withdraw(first)) << "it has been taken";
  EXPECT_TRUE(sender->is_there(first));
  channel->release(message);
  EXPECT_FALSE(sender->is_there(first));
  EXPECT_EQ(next(*channel), "third");
  EXPECT_FALSE(sender->try_withdraw(third));
  EXPECT_EQ(channel->stats().free_slots, 4u);
}

TEST(Placing, AMessageThatWasGivenBackIsWithdrawnAsWell) {
  ChannelPtr channel = Channel::create_anonymous(small());
  const Place where = publish(*channel, "once");
  Received message;
  ASSERT_EQ(channel->try_recv(message), Outcome::Ok);
  channel->give_back(message);
  EXPECT_TRUE(channel->try_withdraw(where));
  EXPECT_EQ(next(*channel), "(empty)");
  EXPECT_EQ(channel->stats().free_slots, 4u);
}

TEST(Placing, WhatOneOfTwoGroupsHasTakenIsNotWithdrawn) {
  ChannelPtr channel = Channel::create_anonymous(small());
  SubscribeOptions to;
  to.group = "other";
  ChannelPtr other = channel->subscribe(to);
  const Place where = publish(*channel, "both");
  EXPECT_EQ(next(*other), "both");
  EXPECT_TRUE(channel->try_withdraw(where)) << "the group that is done with it has no part in it any more";
  const Place held = publish(*channel, "held");
  Received message;
  ASSERT_EQ(other->try_recv(message), Outcome::Ok);
  EXPECT_FALSE(channel->try_withdraw(held));
  EXPECT_EQ(next(*channel), "(empty)");
  other->release(message);
  EXPECT_EQ(channel->stats().free_slots, 4u);
}

TEST(Placing, WithdrawingAndReceivingAtOnceIsOneOfBoth) {
  ChannelPtr channel = Channel::create_anonymous(small(8));
  ChannelPtr sender = adopt(*channel);
  constexpr std::uint64_t kCount = 100'000;
  std::atomic<bool> done{false};
  std::uint64_t received = 0, withdrawn = 0;
  std::thread receiver([&] {
    for (;;) {
      const bool last = done;
      const std::string text = next(*channel);
      received += text == "x";
      if (last && text == "(empty)") return;
    }
  });
  for (std::uint64_t i = 0; i < kCount; ++i) {
    Loan loan;
    Place where;
    while (sender->try_alloc(1, 0, Backpressure::Raise, loan) != Outcome::Ok) std::this_thread::yield();
    *reinterpret_cast<char*>(loan.payload) = 'x';
    ASSERT_EQ(sender->publish(loan, kBytesMessage, 0, where), Outcome::Ok);
    withdrawn += sender->try_withdraw(where);
  }
  done = true;
  receiver.join();
  EXPECT_EQ(received + withdrawn, kCount);
  EXPECT_EQ(channel->stats().free_slots, 8u);
}

#ifdef DSLINE_CRASH_POINTS
using support::CrashPoint;
using support::Ending;

// Whatever a dead sender left is found after the order has gone round twice, and nobody gets anything else for it.
TEST(Placing, ASenderMayDieAtEveryStore) {
  for (int at = 1;; ++at) {
    ChannelPtr channel = store();
    const Place before = place(*channel, 1);
    const Ending ending = CrashPoint::die_before(at, [&](CrashPoint& point) {
      static_cast<void>(channel->stats());
      const Place own = place(*channel, 2);  // registers the child, maps pages
      if (take(*channel, own) != 2) _exit(6);
      point.arm(channel->descriptor());
      std::uint64_t value = 3;
      Place where;
      channel->try_place(&value, sizeof value, kNoLimit, where);
    });
    ASSERT_NE(ending, Ending::Failed) << "store " << at;
    for (std::uint64_t i = 10; i < 50; ++i) ASSERT_EQ(take(*channel, place(*channel, i)), i);
    channel->check_peers();
    for (std::uint64_t i = 50; i < 90; ++i) ASSERT_EQ(take(*channel, place(*channel, i)), i);
    EXPECT_EQ(take(*channel, before), 1u);
    EXPECT_GE(channel->stats().free_slots, 3u) << "store " << at;
    // A message whose place nobody was told.
    const bool orphan = channel->stats().free_slots == 3;
    EXPECT_EQ(channel->discard_older(INT64_MAX), orphan ? 1u : 0u) << "store " << at;
    EXPECT_EQ(channel->stats().free_slots, 4u) << "store " << at;
    if (ending == Ending::Finished) {
      EXPECT_GT(at, 5);
      break;
    }
  }
}

TEST(Placing, ATakerMayDieAtEveryStore) {
  for (int at = 1;; ++at) {
    ChannelPtr channel = store();
    const Place before = place(*channel, 1);
    const Ending ending = CrashPoint::die_before(at, [&](CrashPoint& point) {
      const Place own = place(*channel, 2);
      if (take(*channel, own) != 2) _exit(6);
      point.arm(channel->descriptor());
      if (take(*channel, before) != 1) _exit(7);
    });
    ASSERT_NE(ending, Ending::Failed) << "store " << at;
    channel->check_peers();
    const std::uint64_t again = take(*channel, before);
    EXPECT_TRUE(again == 0 || again == 1);
    for (std::uint64_t i = 10; i < 50; ++i) ASSERT_EQ(take(*channel, place(*channel, i)), i);
    EXPECT_EQ(channel->stats().free_slots, 4u) << "store " << at;
    if (ending == Ending::Finished) {
      EXPECT_EQ(again, 0u);
      EXPECT_GT(at, 2);
      break;
    }
  }
}

TEST(Placing, WhoeverDiscardsMayDieAtEveryStore) {
  for (int at = 1;; ++at) {
    ChannelPtr channel = store();
    const Place before = place(*channel, 1);
    const Ending ending = CrashPoint::die_before(at, [&](CrashPoint& point) {
      const Place own = place(*channel, 2);
      if (take(*channel, own) != 2) _exit(6);
      point.arm(channel->descriptor());
      channel->discard_older(INT64_MAX);
    });
    ASSERT_NE(ending, Ending::Failed) << "store " << at;
    channel->check_peers();
    const std::uint64_t again = take(*channel, before);
    EXPECT_TRUE(again == 0 || again == 1);
    EXPECT_EQ(channel->stats().free_slots, 4u) << "store " << at;
    if (ending == Ending::Finished) {
      EXPECT_EQ(again, 0u);
      break;
    }
  }
}
#endif

}  // namespace
}  // namespace dsline
