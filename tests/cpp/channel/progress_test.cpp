#include <gtest/gtest.h>

#include <string>

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

Received take(Channel& channel) {
  Received message;
  EXPECT_EQ(channel.try_recv(message), Outcome::Ok);
  return message;
}

Outcome send_control(Channel& channel, int kind) {
  return channel.try_send("", 0, kind, nullptr, 0, 0, Backpressure::Raise);
}

TEST(Progress, TheEndOfTheOrderIsTheNextSequence) {
  ChannelOptions options = small();
  options.first_position = 1000;
  auto channel = Channel::create_anonymous(options);
  EXPECT_EQ(channel->end_of_order(), 1000u);
  for (std::uint64_t i = 0; i < 200; ++i) {  // several laps of the order
    ASSERT_EQ(send(*channel, "x"), Outcome::Ok);
    ASSERT_EQ(channel->end_of_order(), 1001 + i);
    const Received message = take(*channel);
    ASSERT_EQ(message.sequence, 1000 + i);
    channel->release(message);
  }
}

TEST(Progress, AMessageIsOutstandingUntilItsGroupIsDoneWithIt) {
  auto channel = Channel::create_anonymous(small());
  EXPECT_TRUE(channel->is_outstanding(0)) << "not sent yet";
  ASSERT_EQ(send(*channel, "a"), Outcome::Ok);
  EXPECT_TRUE(channel->is_outstanding(0)) << "waits";
  Received message = take(*channel);
  EXPECT_TRUE(channel->is_outstanding(0)) << "held";
  channel->give_back(message);
  EXPECT_TRUE(channel->is_outstanding(0)) << "given back";
  message = take(*channel);
  EXPECT_EQ(message.attempts, 1u);
  EXPECT_TRUE(channel->is_outstanding(0)) << "held again";
  channel->release(message);
  EXPECT_FALSE(channel->is_outstanding(0)) << "released";
  EXPECT_TRUE(channel->is_outstanding(1));
}

TEST(Progress, WhatIsDroppedOrBuriedIsNotOutstanding) {
  ChannelOptions options = small(2);
  options.max_deliveries = 1;
  auto channel = Channel::create_anonymous(options);
  for (int i = 0; i < 3; ++i) ASSERT_EQ(send(*channel, "x", Backpressure::DropOldest), Outcome::Ok);
  EXPECT_FALSE(channel->is_outstanding(0)) << "dropped";
  EXPECT_TRUE(channel->is_outstanding(1));
  channel->give_back(take(*channel));
  EXPECT_EQ(next(*channel), "x");
  EXPECT_FALSE(channel->is_outstanding(1)) << "a dead letter";
  EXPECT_FALSE(channel->is_outstanding(2));
}

TEST(Progress, AMessageIsOutstandingForItsOwnGroup) {
  ChannelOptions options = small();
  options.default_group = 1;
  auto channel = Channel::create_anonymous(options);
  SubscribeOptions other;
  other.group = "other";
  auto subscriber = channel->subscribe(other);
  ASSERT_EQ(send(*channel, "a"), Outcome::Ok);
  channel->release(take(*channel));
  EXPECT_FALSE(channel->is_outstanding(0));
  EXPECT_TRUE(subscriber->is_outstanding(0));
}

TEST(Progress, AMessageOfTheDeadIsOutstandingBeforeAndAfterItsRecovery) {
  auto channel = Channel::create_anonymous(small());
  ASSERT_EQ(send(*channel, "a"), Outcome::Ok);
  die_holding([&] { take(**new ChannelPtr(adopt(*channel))); });
  EXPECT_TRUE(channel->is_outstanding(0));
  EXPECT_TRUE(channel->check_peers());
  EXPECT_TRUE(channel->is_outstanding(0));
  EXPECT_EQ(next(*channel), "a");
  EXPECT_FALSE(channel->is_outstanding(0));
}

TEST(Progress, WhatIsOutstandingBeforeAMessage) {
  auto channel = Channel::create_anonymous(small(8));
  ASSERT_EQ(send(*channel, "a"), Outcome::Ok);
  ASSERT_EQ(send_control(*channel, kMarkerMessage), Outcome::Ok);
  ASSERT_EQ(send(*channel, "b"), Outcome::Ok);
  const Received first = take(*channel), marker = take(*channel), last = take(*channel);
  EXPECT_EQ(marker.kind, kMarkerMessage);
  EXPECT_FALSE(channel->anything_outstanding_before(first.sequence));
  EXPECT_FALSE(channel->any_control_before(first.sequence));
  EXPECT_TRUE(channel->anything_outstanding_before(marker.sequence));
  EXPECT_FALSE(channel->any_control_before(marker.sequence));
  EXPECT_TRUE(channel->any_control_before(last.sequence));
  channel->release(first);
  EXPECT_FALSE(channel->anything_outstanding_before(marker.sequence));
  EXPECT_TRUE(channel->any_control_before(last.sequence));
  channel->release(marker);
  EXPECT_FALSE(channel->any_control_before(last.sequence));
  channel->release(last);
}

#if defined(DSLINE_CRASH_POINTS)
using support::CrashPoint;
using support::Ending;

// Whatever store a publisher dies at: once nobody is entering the end is final, and says whether the message is there.
TEST(Progress, TheEndIsFinalOnceNobodyIsEntering) {
  bool was_entering = false, was_lost = false, was_rolled_forward = false;
  for (int at = 1;; ++at) {
    auto channel = Channel::create_anonymous(small());
    auto watcher = adopt(*channel);  // the death is noticed by a handle that knew the dead one
    const Ending ending = CrashPoint::die_before(at, [&](CrashPoint& point) {
      auto mine = adopt(*channel);
      point.arm(mine->descriptor());
      if (send(*mine, "last") != Outcome::Ok) _exit(6);
    });
    ASSERT_NE(ending, Ending::Failed) << "store " << at;
    const bool entering = watcher->anyone_entering();
    const std::uint64_t before = watcher->end_of_order();
    watcher->check_peers();
    ASSERT_FALSE(watcher->anyone_entering()) << "store " << at;
    const std::uint64_t end = watcher->end_of_order();
    if (entering) {
      EXPECT_EQ(end, 1u) << "store " << at;
      was_rolled_forward = was_rolled_forward || before == 0;
    } else {
      EXPECT_EQ(end, before) << "store " << at;
    }
    was_entering = was_entering || entering;
    was_lost = was_lost || end == 0;
    EXPECT_EQ(next(*watcher), end == 1 ? "last" : "(empty)");
    EXPECT_EQ(watcher->stats().free_slots, 4u) << "store " << at;
    if (ending == Ending::Finished) {
      EXPECT_EQ(end, 1u);
      break;
    }
  }
  EXPECT_TRUE(was_entering && was_lost && was_rolled_forward) << "the deaths did not reach every step";
}
#endif

}  // namespace
}  // namespace dsline
