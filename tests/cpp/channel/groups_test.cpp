#include <gtest/gtest.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cstring>
#include <fstream>
#include <map>
#include <string>
#include <thread>
#include <vector>

#include "base/process.hpp"
#include "dsline/channel.hpp"
#include "memory/layout.hpp"
#include "support/channels.hpp"
#include "support/processes.hpp"

namespace dsline {
namespace {

using support::code_of;
using support::die_holding;
using support::in_child;
using support::Name;
using support::next;
using support::patience;
using support::send;
using support::small;
using support::text_of;

using ChannelPtr = std::shared_ptr<Channel>;
using Texts = std::vector<std::string>;

SubscribeOptions to(const std::string& group, Start start = Start::Next) {
  SubscribeOptions options;
  options.group = group;
  options.start = start;
  return options;
}

Texts drain(Channel& channel) {
  Texts all;
  for (std::string text = next(channel); text != "(empty)" && text != "(closed)"; text = next(channel))
    all.push_back(text);
  return all;
}

Received take(Channel& channel) {
  Received message;
  EXPECT_EQ(channel.try_recv(message), Outcome::Ok);
  return message;
}

const Report::Group* group_of(const Report& report, const std::string& name) {
  for (const Report::Group& group : report.groups) {
    if (group.name == name && !group.retention) return &group;
  }
  return nullptr;
}

struct Kind {
  const char* name;
  ChannelPtr (*make)(const ChannelOptions&);
};

class Groups : public testing::TestWithParam<Kind> {
 protected:
  void make(const ChannelOptions& options = small()) { channel = GetParam().make(options); }
  void make_with_history(std::uint32_t capacity, int history) {
    ChannelOptions options = small(capacity);
    options.history = history;
    make(options);
  }
  std::uint32_t free() const { return channel->stats().free_slots; }
  ChannelPtr channel;
};

INSTANTIATE_TEST_SUITE_P(Every, Groups,
                         testing::Values(Kind{"heap", &Channel::create_heap},
                                         Kind{"memfd", &Channel::create_anonymous}),
                         [](const testing::TestParamInfo<Kind>& info) {
                           return std::string(info.param.name);
                         });

// --- subscribing -----------------------------------------------------------------------------------------------------

TEST_P(Groups, EveryGroupSeesEveryMessageInOrder) {
  make();
  auto a = channel->subscribe(to("a")), b = channel->subscribe(to("b"));
  for (const char* text : {"1", "2", "3"}) send(*channel, text);
  EXPECT_EQ(drain(*a), (Texts{"1", "2", "3"}));
  EXPECT_EQ(free(), 1u) << "two groups have not seen them";
  EXPECT_EQ(drain(*channel), (Texts{"1", "2", "3"}));
  EXPECT_EQ(drain(*b), (Texts{"1", "2", "3"}));
  EXPECT_EQ(free(), 4u);
}

TEST_P(Groups, WhoTakesTheLastMessageIsToldWhenNothingElseCirculates) {
  make(small(2));
  auto a = channel->subscribe(to("a"));
  send(*channel, "1");
  send(*channel, "2");
  const Received first = take(*a);
  EXPECT_FALSE(a->is_last_to_circulate()) << "the next one stands behind it";
  const Received second = take(*a);
  EXPECT_TRUE(a->is_last_to_circulate());
  const Received other = take(*channel);
  EXPECT_FALSE(channel->is_last_to_circulate());
  a->put_back(second);
  EXPECT_EQ(take(*a).sequence, second.sequence);
  EXPECT_TRUE(a->is_last_to_circulate()) << "what was put back is no message behind itself";
  a->release(second);
  const Received last = take(*channel);
  EXPECT_TRUE(channel->is_last_to_circulate()) << "the other group keeps the first";
  channel->release(last);
  EXPECT_FALSE(channel->is_last_to_circulate());
  channel->release(other);
  a->release(first);
}

TEST_P(Groups, MembersOfOneGroupCompete) {
  make();
  auto first = channel->subscribe(to("a")), second = channel->subscribe(to("a"));
  for (const char* text : {"1", "2", "3"}) send(*channel, text);
  EXPECT_EQ(next(*first), "1");
  EXPECT_EQ(next(*second), "2");
  EXPECT_EQ(next(*first), "3");
  EXPECT_EQ(next(*second), "(empty)");
}

TEST_P(Groups, ASubscriberKnowsItsGroup) {
  make();
  auto sub = channel->subscribe(to("viewers"));
  EXPECT_EQ(sub->group(), "viewers");
  EXPECT_EQ(channel->group(), "");
  EXPECT_TRUE(sub->can_receive());
  EXPECT_EQ(sub->uuid(), channel->uuid());
  EXPECT_EQ(channel->stats().participants, 2u);
}

TEST_P(Groups, ASubscriberMaySendAsWell) {
  make();
  auto sub = channel->subscribe(to("a"));
  EXPECT_EQ(send(*sub, "1"), Outcome::Ok);
  EXPECT_EQ(next(*channel), "1");
  EXPECT_EQ(next(*sub), "1");
}

TEST_P(Groups, ANewGroupStartsWhereItWasAskedTo) {
  make();
  for (const char* text : {"1", "2"}) send(*channel, text);
  auto next_one = channel->subscribe(to("next"));
  auto oldest = channel->subscribe(to("oldest", Start::Oldest));
  auto latest = channel->subscribe(to("latest", Start::Latest));
  send(*channel, "3");
  EXPECT_EQ(drain(*next_one), (Texts{"3"}));
  EXPECT_EQ(drain(*oldest), (Texts{"1", "2", "3"}));
  EXPECT_EQ(drain(*latest), (Texts{"2", "3"}));
  EXPECT_EQ(drain(*channel), (Texts{"1", "2", "3"}));
  EXPECT_EQ(free(), 4u);
}

TEST_P(Groups, AGroupThatExistsGoesOnWhereItStands) {
  make();
  auto first = channel->subscribe(to("a"));
  send(*channel, "1");
  EXPECT_EQ(next(*first), "1");
  send(*channel, "2");
  auto second = channel->subscribe(to("a", Start::Oldest));
  EXPECT_EQ(drain(*second), (Texts{"2"})) << "where a group begins is said once";
}

TEST_P(Groups, AGroupWithOtherRulesIsRefusedAndTheGroupGoesOn) {
  make();
  auto sub = channel->subscribe(to("a"));
  SubscribeOptions durable = to("a"), drops = to("a");
  durable.durable = true;
  drops.on_death = OnDeath::Drop;
  std::string why;
  EXPECT_EQ(code_of([&] { channel->subscribe(durable); }, &why), ErrorCode::ChannelMismatch);
  EXPECT_NE(why.find("durable=False"), std::string::npos) << why;
  EXPECT_NE(why.find("on_death='redeliver'"), std::string::npos) << why;
  EXPECT_EQ(code_of([&] { channel->subscribe(drops); }), ErrorCode::ChannelMismatch);
  EXPECT_EQ(channel->stats().participants, 2u) << "a handle that was refused is none";
  send(*channel, "1");
  EXPECT_EQ(next(*sub), "1");
}

TEST_P(Groups, ANameHas1To100Bytes) {
  make();
  for (const std::string& name : {std::string(), std::string(101, 'x'), std::string("a\0b", 3)}) {
    EXPECT_EQ(code_of([&] { channel->subscribe(to(name)); }), ErrorCode::InvalidArgument) << name.size();
  }
  const std::string longest(100, 'x');
  EXPECT_EQ(channel->subscribe(to(longest))->group(), longest);
}

TEST_P(Groups, MoreGroupsThanTheLimitAreRefusedAndRoomComesBackByClosing) {
  ChannelOptions options = small();
  options.max_groups = 2;
  make(options);
  auto a = channel->subscribe(to("a")), b = channel->subscribe(to("b"));
  std::string why;
  EXPECT_EQ(code_of([&] { channel->subscribe(to("c")); }, &why), ErrorCode::TooManyGroups);
  EXPECT_NE(why.find("at most 2"), std::string::npos) << why;
  EXPECT_NE(why.find("max_groups"), std::string::npos) << why;
  EXPECT_EQ(channel->stats().participants, 3u);
  auto more = channel->subscribe(to("a"));
  a->close();
  EXPECT_EQ(code_of([&] { channel->subscribe(to("c")); }), ErrorCode::TooManyGroups)
      << "it has another member";
  more->close();
  EXPECT_NO_THROW(channel->subscribe(to("c")));
}

TEST_P(Groups, AClosedHandleMakesNoSubscriber) {
  make();
  auto other = channel->again();
  channel->close();
  EXPECT_EQ(code_of([&] { channel->subscribe(to("a")); }), ErrorCode::ChannelClosed);
  EXPECT_NO_THROW(other->subscribe(to("a")));
}

TEST_P(Groups, AgainIsAnotherHandleOfTheDefaultGroup) {
  make();
  auto other = channel->again();
  send(*other, "1");
  send(*other, "2");
  EXPECT_EQ(next(*channel), "1");
  EXPECT_EQ(next(*other), "2");
  EXPECT_EQ(channel->stats().participants, 2u);
  channel->close();
  EXPECT_EQ(send(*other, "3"), Outcome::Ok);
  EXPECT_EQ(next(*other), "3");
}

// --- leaving ---------------------------------------------------------------------------------------------------------

TEST_P(Groups, TheLastMembersCloseFreesWhatWaitedForItsGroup) {
  make(small(2));
  auto first = channel->subscribe(to("a")), second = channel->subscribe(to("a"));
  send(*channel, "1");
  send(*channel, "2");
  EXPECT_EQ(drain(*channel), (Texts{"1", "2"}));
  first->close();
  EXPECT_EQ(send(*channel, "3"), Outcome::Full) << "the other member may still take them";
  second->close();
  EXPECT_EQ(free(), 2u);
  EXPECT_EQ(send(*channel, "3"), Outcome::Ok);
  EXPECT_EQ(group_of(channel->report(), "a"), nullptr);
}

TEST_P(Groups, DestroyingTheLastHandleEndsTheGroup) {
  make(small(1));
  {
    auto sub = channel->subscribe(to("a"));
    send(*channel, "1");
    EXPECT_EQ(next(*channel), "1");
  }
  EXPECT_EQ(free(), 1u);
}

TEST_P(Groups, ASenderThatWaitsForASlowGroupGoesOnWhenItLeaves) {
  make(small(1));
  auto slow = channel->subscribe(to("slow"));
  send(*channel, "1");
  EXPECT_EQ(next(*channel), "1");
  Outcome outcome = Outcome::Full;
  std::thread sender([&] { outcome = channel->send("2", 1, Backpressure::Block, patience()); });
  while (channel->stats().send_waits == 0) std::this_thread::yield();
  slow->close();
  sender.join();
  EXPECT_EQ(outcome, Outcome::Ok);
  EXPECT_EQ(next(*channel), "2");
}

TEST_P(Groups, AMessageThatAMemberHoldsWhenItLeavesStaysReadableUntilItIsReleased) {
  ChannelOptions options = small(1);
  options.max_groups = 1;
  make(options);
  auto sub = channel->subscribe(to("a"));
  send(*channel, "held");
  Received message = take(*sub);
  EXPECT_EQ(next(*channel), "held");
  sub->close();
  EXPECT_EQ(text_of(message), "held");
  EXPECT_EQ(send(*channel, "x"), Outcome::Full);
  EXPECT_EQ(code_of([&] { channel->subscribe(to("b")); }), ErrorCode::TooManyGroups)
      << "its number is still in use";
  EXPECT_EQ(channel->stats().participants, 2u);
  sub->release(message);
  EXPECT_EQ(channel->stats().participants, 1u);
  EXPECT_EQ(free(), 1u);
  EXPECT_NO_THROW(channel->subscribe(to("b")));
}

TEST_P(Groups, WhatALeaverGivesBackGoesToAnotherMemberOrToNobody) {
  make();
  auto first = channel->subscribe(to("a")), second = channel->subscribe(to("a"));
  send(*channel, "1");
  send(*channel, "2");
  EXPECT_EQ(drain(*channel).size(), 2u);
  Received one = take(*first), two = take(*second);
  first->close();
  first->give_back(one);
  Received again = take(*second);
  EXPECT_EQ(text_of(again), "1");
  EXPECT_EQ(again.attempts, 1u);
  second->close();
  second->give_back(two);
  second->give_back(again);
  EXPECT_EQ(free(), 4u);
  EXPECT_EQ(channel->stats().participants, 1u);
}

TEST_P(Groups, AHandleThatGoesWithWhatItHoldsLosesNothingOfItsGroup) {
  make();
  auto first = channel->subscribe(to("a")), second = channel->subscribe(to("a"));
  send(*channel, "1");
  take(*first);
  first.reset();
  Received message = take(*second);
  EXPECT_EQ(text_of(message), "1");
  EXPECT_EQ(message.attempts, 1u);
  second->release(message);
}

TEST_P(Groups, ADurableGroupCollectsWhileNobodyIsThere) {
  make();
  SubscribeOptions options = to("a");
  options.durable = true;
  channel->subscribe(options)->close();
  send(*channel, "1");
  EXPECT_EQ(next(*channel), "1");
  EXPECT_EQ(free(), 3u);
  EXPECT_EQ(drain(*channel->subscribe(options)), (Texts{"1"}));
  EXPECT_EQ(free(), 4u);
}

TEST_P(Groups, RemovingAGroupEndsItForMembersThatWait) {
  make();
  auto sub = channel->subscribe(to("a"));
  Outcome outcome = Outcome::Ok;
  std::thread receiver([&] {
    Received message;
    outcome = sub->recv(message, patience());
  });
  while (sub->stats().recv_waits == 0) std::this_thread::yield();
  channel->remove_group("a");
  receiver.join();
  EXPECT_EQ(outcome, Outcome::Closed);
  EXPECT_EQ(next(*sub), "(closed)");
  EXPECT_FALSE(sub->is_closed()) << "it may still send";
  EXPECT_EQ(send(*sub, "1"), Outcome::Ok);
}

TEST_P(Groups, RemovingAGroupReleasesWhatWaitsForItAndNotWhatIsHeld) {
  make();
  SubscribeOptions options = to("a");
  options.durable = true;
  auto sub = channel->subscribe(options);
  for (const char* text : {"1", "2", "3"}) send(*channel, text);
  Received message = take(*sub);
  drain(*channel);
  channel->remove_group("a");
  EXPECT_EQ(free(), 3u);
  EXPECT_EQ(text_of(message), "1");
  sub->release(message);
  EXPECT_EQ(free(), 4u);
  EXPECT_EQ(code_of([&] { channel->remove_group("a"); }), ErrorCode::ChannelNotFound);
}

TEST_P(Groups, AMemberOfARemovedGroupDoesNotReceiveForTheNextOwnerOfItsNumber) {
  ChannelOptions options = small();
  options.max_groups = 1;
  make(options);
  auto old = channel->subscribe(to("old"));
  channel->remove_group("old");
  auto fresh = channel->subscribe(to("fresh"));
  send(*channel, "1");
  EXPECT_EQ(next(*old), "(closed)");
  Received message;
  EXPECT_EQ(old->recv(message, patience()), Outcome::Closed) << "and does not wait";
  EXPECT_EQ(next(*fresh), "1");
  old->close();
  send(*channel, "2");
  EXPECT_EQ(next(*fresh), "2") << "its leaving does not end the new group";
}

// --- what a reader loses ---------------------------------------------------------------------------------------------

TEST_P(Groups, EachReaderCountsExactlyWhatItLost) {
  make(small(4));
  auto slow = channel->subscribe(to("slow"));
  for (int i = 0; i < 10; ++i) {
    EXPECT_EQ(send(*channel, std::to_string(i), Backpressure::DropOldest), Outcome::Ok)
        << "a slow viewer blocks nobody";
    EXPECT_EQ(next(*channel), std::to_string(i));
  }
  EXPECT_EQ(slow->stats().lost, 6u);
  EXPECT_EQ(slow->stats().dropped_oldest, 6u);
  EXPECT_EQ(slow->stats().depth, 4u);
  EXPECT_EQ(channel->stats().lost, 0u);
  EXPECT_EQ(channel->stats().depth, 0u);
  Received message = take(*slow);
  EXPECT_EQ(message.sequence, 6u) << "the gap says the same";
  slow->release(message);
  EXPECT_EQ(drain(*slow), (Texts{"7", "8", "9"}));
}

TEST_P(Groups, WhatWasLostBeforeAHandleJoinedIsNotItsLoss) {
  make(small(2));
  auto early = channel->subscribe(to("a"));
  for (int i = 0; i < 5; ++i) send(*channel, "m", Backpressure::DropOldest);
  auto late = channel->subscribe(to("a"));
  EXPECT_EQ(early->stats().lost, 3u);
  EXPECT_EQ(late->stats().lost, 0u);
  EXPECT_EQ(late->stats().dropped_oldest, 3u);
  send(*channel, "m", Backpressure::DropOldest);
  EXPECT_EQ(early->stats().lost, 4u);
  EXPECT_EQ(late->stats().lost, 1u);
}

TEST_P(Groups, RedeliveriesAreCountedForTheGroupTheyHappenedIn) {
  make();
  auto sub = channel->subscribe(to("a"));
  send(*channel, "1");
  sub->give_back(take(*sub));
  EXPECT_EQ(sub->stats().depth, 1u);
  Received again = take(*sub);
  EXPECT_EQ(again.attempts, 1u);
  sub->release(again);
  EXPECT_EQ(sub->stats().redelivered, 1u);
  EXPECT_EQ(channel->stats().redelivered, 0u);
  Received message = take(*channel);
  EXPECT_EQ(message.attempts, 0u);
  channel->release(message);
}

// --- a channel without the default group -----------------------------------------------------------------------------

TEST_P(Groups, ABroadcastThatNobodyListensToPassesAndCounts) {
  ChannelOptions options = small(2);
  options.default_group = 0;
  make(options);
  EXPECT_FALSE(channel->has_default_group());
  for (int i = 0; i < 5; ++i) EXPECT_EQ(send(*channel, "m"), Outcome::Ok);
  EXPECT_EQ(channel->stats().unheard, 5u);
  EXPECT_EQ(free(), 2u);
  EXPECT_EQ(channel->stats().next_sequence, 0u);
}

TEST_P(Groups, ABroadcastIsReceivedBySubscribersOnly) {
  ChannelOptions options = small(2);
  options.default_group = 0;
  make(options);
  EXPECT_FALSE(channel->can_receive());
  EXPECT_EQ(channel->depth(), 0u);
  Received message;
  EXPECT_EQ(code_of([&] { channel->try_recv(message); }), ErrorCode::InvalidArgument);
  EXPECT_EQ(code_of([&] { channel->again()->try_recv(message); }), ErrorCode::InvalidArgument);
  auto sub = channel->subscribe(to("a"));
  EXPECT_FALSE(channel->again()->can_receive());
  send(*channel, "1");
  EXPECT_EQ(channel->stats().depth, 0u);
  EXPECT_EQ(drain(*sub), (Texts{"1"}));
  EXPECT_EQ(free(), 2u) << "nobody else was to get it";
  sub->close();
  EXPECT_EQ(send(*channel, "2"), Outcome::Ok);
  EXPECT_EQ(channel->stats().unheard, 1u);
}

// --- the end ---------------------------------------------------------------------------------------------------------

TEST_P(Groups, EveryGroupDrainsAfterAShutdown) {
  make();
  auto a = channel->subscribe(to("a")), b = channel->subscribe(to("b"));
  send(*channel, "1");
  send(*channel, "2");
  channel->shutdown(false);
  EXPECT_EQ(drain(*a), (Texts{"1", "2"}));
  EXPECT_EQ(next(*a), "(closed)");
  EXPECT_EQ(next(*b), "1");
  EXPECT_EQ(next(*channel), "1");
  EXPECT_EQ(drain(*b), (Texts{"2"}));
  EXPECT_EQ(drain(*channel), (Texts{"2"}));
  EXPECT_EQ(free(), 4u);
}

TEST_P(Groups, AShutdownAtOnceReleasesWhatWaitsForAnyGroup) {
  make();
  auto a = channel->subscribe(to("a"));
  send(*channel, "1");
  send(*channel, "2");
  Received held = take(*a);
  channel->shutdown(true);
  EXPECT_EQ(next(*a), "(closed)");
  EXPECT_EQ(free(), 3u);
  a->give_back(held);
  EXPECT_EQ(free(), 4u);
}

TEST_P(Groups, CallsThatAreRefusedAnswerClosedAndTheHandleLeavesWhenItHoldsNothing) {
  for (bool closes_first : {true, false}) {
    make();
    auto sub = channel->subscribe(to("a"));
    send(*channel, "1");
    Received message = take(*sub);
    sub->refuse_calls();
    EXPECT_TRUE(sub->is_closed());
    EXPECT_EQ(next(*sub), "(closed)");
    EXPECT_EQ(send(*sub, "2"), Outcome::Closed);
    Received other;
    EXPECT_EQ(sub->recv(other, patience()), Outcome::Closed);
    EXPECT_EQ(sub->send("2", 1, Backpressure::Block, patience()), Outcome::Closed);
    EXPECT_NE(group_of(channel->report(), "a"), nullptr) << "it is still a member";
    if (closes_first) sub->close();
    sub->release(message);
    sub->close();
    EXPECT_EQ(group_of(channel->report(), "a"), nullptr);
    EXPECT_EQ(channel->stats().participants, 1u);
  }
}

TEST_P(Groups, AbandoningASubscriberReleasesWhatItHoldsAndEndsItsGroup) {
  make();
  auto sub = channel->subscribe(to("a"));
  send(*channel, "1");
  send(*channel, "2");
  take(*sub);
  drain(*channel);
  sub->abandon();
  EXPECT_EQ(free(), 4u);
  EXPECT_EQ(channel->stats().participants, 1u);
  EXPECT_EQ(group_of(channel->report(), "a"), nullptr);
}

// --- dead letters ----------------------------------------------------------------------------------------------------

TEST_P(Groups, AMessageThatFailedTooOftenIsADeadLetterOfItsGroup) {
  ChannelOptions options = small();
  options.max_deliveries = 2;
  make(options);
  EXPECT_EQ(channel->max_deliveries(), 2u);
  auto sub = channel->subscribe(to("a"));
  send(*channel, "bad");
  send(*channel, "good");
  for (int i = 0; i < 2; ++i) sub->give_back(take(*sub));
  EXPECT_EQ(next(*sub), "good");
  EXPECT_EQ(drain(*channel), (Texts{"bad", "good"})) << "the other group has no trouble with it";
  EXPECT_EQ(channel->stats().dead_letters, 1u);
  EXPECT_EQ(channel->stats().buried, 1u);
  Received letter;
  DeadLetter why;
  ASSERT_EQ(channel->try_take_dead_letter(letter, why), Outcome::Ok) << "any handle may read it";
  EXPECT_EQ(text_of(letter), "bad");
  EXPECT_EQ(letter.attempts, 2u);
  EXPECT_EQ(why.group, "a");
  EXPECT_EQ(why.last_pid, static_cast<std::uint32_t>(getpid()));
  EXPECT_FALSE(why.last_holder_died);
  Received none;
  EXPECT_EQ(channel->try_take_dead_letter(none, why), Outcome::Empty);
  channel->release(letter);
  EXPECT_EQ(free(), 4u);
  EXPECT_EQ(channel->stats().dead_letters, 0u);
}

TEST_P(Groups, ADeadLetterThatIsGivenBackIsOneAgainAndARevivedOneIsDelivered) {
  ChannelOptions options = small();
  options.max_deliveries = 1;
  make(options);
  send(*channel, "bad");
  channel->give_back(take(*channel));
  EXPECT_EQ(next(*channel), "(empty)");
  for (int i = 0; i < 3; ++i) {
    Received letter;
    DeadLetter why;
    ASSERT_EQ(channel->try_take_dead_letter(letter, why), Outcome::Ok) << i;
    EXPECT_EQ(next(*channel), "(empty)");
    if (i == 0) channel->give_back(letter);
    if (i == 1) channel->put_back(letter);
    if (i == 2) channel->revive(letter);
  }
  EXPECT_EQ(next(*channel), "bad");
  EXPECT_EQ(free(), 4u);
  EXPECT_EQ(channel->stats().buried, 1u);
}

TEST_P(Groups, TheDeadLettersOfAGroupGoWithIt) {
  ChannelOptions options = small();
  options.max_deliveries = 1;
  make(options);
  auto sub = channel->subscribe(to("a"));
  send(*channel, "bad");
  drain(*channel);
  sub->give_back(take(*sub));
  EXPECT_EQ(next(*sub), "(empty)");
  EXPECT_EQ(free(), 3u);
  sub->close();
  EXPECT_EQ(free(), 4u);
}

TEST_P(Groups, ALetterOfAGroupThatEndedWhileItWasReadIsReleasedHoweverItEnds) {
  for (int how = 0; how < 4; ++how) {
    ChannelOptions options = small();
    options.max_deliveries = 1;
    make(options);
    auto sub = channel->subscribe(to("a"));
    send(*channel, "bad");
    drain(*channel);
    sub->give_back(take(*sub));
    next(*sub);
    Received letter;
    DeadLetter why;
    ASSERT_EQ(channel->try_take_dead_letter(letter, why), Outcome::Ok);
    sub->close();
    EXPECT_EQ(free(), 3u);
    if (how == 0) channel->release(letter);
    if (how == 1) channel->give_back(letter);
    if (how == 2) channel->put_back(letter);
    if (how == 3) channel->revive(letter);
    EXPECT_EQ(free(), 4u) << how;
  }
}

TEST_P(Groups, PuttingBackWhatNobodyHasSeenCountsAsNoDelivery) {
  make();
  auto sub = channel->subscribe(to("a"));
  send(*channel, "1");
  for (int i = 0; i < 20; ++i) {
    Received message = take(*sub);
    EXPECT_EQ(message.attempts, 0u);
    sub->put_back(message);
  }
  EXPECT_EQ(sub->stats().redelivered, 0u);
  EXPECT_EQ(next(*sub), "1");
}

// --- history and the latest value ------------------------------------------------------------------------------------

TEST_P(Groups, ALateJoinerGetsTheHistory) {
  make_with_history(8, 3);
  EXPECT_EQ(channel->history(), 3u);
  for (int i = 0; i < 10; ++i) {
    send(*channel, std::to_string(i));
    next(*channel);
  }
  for (int round = 0; round < 3; ++round) {
    auto late = channel->subscribe(to("late", Start::Oldest));
    EXPECT_EQ(drain(*late), (Texts{"7", "8", "9"})) << round;
  }
  EXPECT_EQ(drain(*channel->subscribe(to("last", Start::Latest))), (Texts{"9"}));
  EXPECT_EQ(free(), 5u);
}

TEST_P(Groups, AHistoryGivesWayToMessages) {
  make_with_history(4, 3);
  for (int i = 0; i < 3; ++i) {
    send(*channel, "old");
    next(*channel);
  }
  for (int i = 0; i < 4; ++i) EXPECT_EQ(send(*channel, std::to_string(i)), Outcome::Ok) << i;
  EXPECT_EQ(send(*channel, "5"), Outcome::Full) << "all slots have messages that somebody waits for";
  EXPECT_EQ(drain(*channel), (Texts{"0", "1", "2", "3"}));
}

TEST_P(Groups, AHistoryThatLeavesNoSlotIsRefused) {
  ChannelOptions options = small(4);
  options.history = 4;
  EXPECT_EQ(code_of([&] { make(options); }), ErrorCode::InvalidArgument);
}

TEST_P(Groups, TheLatestValueIsLookedAtAndStays) {
  make_with_history(4, 1);
  Received value;
  EXPECT_EQ(channel->try_read_latest(true, 0, value), Outcome::Empty);
  send(*channel, "1");
  send(*channel, "2");
  for (int i = 0; i < 3; ++i) {
    ASSERT_EQ(channel->try_read_latest(true, 0, value), Outcome::Ok);
    EXPECT_EQ(text_of(value), "2");
    EXPECT_EQ(value.sequence, 1u);
    EXPECT_TRUE(channel->is_unchanged(value));
  }
  EXPECT_EQ(drain(*channel), (Texts{"1", "2"}));
  EXPECT_EQ(channel->try_read_latest(true, 0, value), Outcome::Ok) << "though everybody has received it";
  EXPECT_EQ(channel->try_read_latest(false, 0, value), Outcome::Ok);
  EXPECT_EQ(channel->try_read_latest(false, 1, value), Outcome::Empty) << "it is not newer than itself";
  EXPECT_EQ(channel->stats().pinned_slots, 0u);
}

TEST_P(Groups, AValueThatWasOverwrittenIsKnownToBe) {
  make_with_history(2, 1);
  send(*channel, "1");
  next(*channel);
  Received value;
  ASSERT_EQ(channel->try_read_latest(true, 0, value), Outcome::Ok);
  for (int i = 0; i < 4; ++i) {
    send(*channel, "x");
    next(*channel);
  }
  EXPECT_FALSE(channel->is_unchanged(value));
}

TEST_P(Groups, AnOpenLoanIsNoNewValue) {
  make_with_history(3, 1);
  send(*channel, "1");
  next(*channel);
  Loan loan;
  ASSERT_EQ(channel->try_alloc(1, 0, Backpressure::Raise, loan), Outcome::Ok);
  Received value;
  EXPECT_EQ(channel->try_read_latest(false, 0, value), Outcome::Empty);
  loan.payload[0] = std::byte{'2'};
  channel->publish(loan, kBytesMessage, 0);
  ASSERT_EQ(channel->try_read_latest(false, 0, value), Outcome::Ok);
  EXPECT_EQ(text_of(value), "2");
}

TEST_P(Groups, WhoeverWaitsForANewerValueIsWokenByIt) {
  make_with_history(4, 1);
  send(*channel, "1");
  next(*channel);
  EXPECT_EQ(channel->wait_for_newer(false, 0, base::monotonic_ns() + 2'000'000, false), Outcome::TimedOut);
  EXPECT_EQ(channel->wait_for_newer(true, 0, patience(), false), Outcome::Ok) << "there is one";
  auto watcher = channel->again();
  std::string seen;
  std::thread thread([&] {
    Received value;
    while (watcher->try_read_latest(false, 0, value) == Outcome::Empty)
      watcher->wait_for_newer(false, 0, patience(), false);
    seen = text_of(value);
  });
  while (watcher->stats().recv_waits == 0) std::this_thread::yield();
  send(*channel, "2");
  thread.join();
  EXPECT_EQ(seen, "2");
}

TEST_P(Groups, AShutdownEndsTheWaitForANewerValue) {
  make_with_history(4, 1);
  Outcome outcome = Outcome::Ok;
  auto watcher = channel->again();
  std::thread thread([&] {
    Received value;
    while ((outcome = watcher->try_read_latest(true, 0, value)) == Outcome::Empty)
      watcher->wait_for_newer(true, 0, patience(), false);
  });
  while (watcher->stats().recv_waits == 0) std::this_thread::yield();
  channel->shutdown(false);
  thread.join();
  EXPECT_EQ(outcome, Outcome::Closed);
}

TEST_P(Groups, WithoutAHistoryThereIsNoLatestValue) {
  make();
  Received value;
  EXPECT_EQ(code_of([&] { channel->try_read_latest(true, 0, value); }), ErrorCode::InvalidArgument);
}

// --- reports ---------------------------------------------------------------------------------------------------------

TEST_P(Groups, AReportSaysWhoHoldsWhat) {
  ChannelOptions options = small(6);
  options.history = 1;
  options.max_deliveries = 1;
  make(options);
  auto sub = channel->subscribe(to("a"));
  for (const char* text : {"1", "2", "3"}) send(*channel, text);
  sub->give_back(take(*sub));
  Received held = take(*sub);
  Loan loan;
  ASSERT_EQ(channel->try_alloc(1, 0, Backpressure::Raise, loan), Outcome::Ok);

  const Report report = channel->report();
  EXPECT_EQ(report.uuid, channel->uuid());
  EXPECT_EQ(report.storage, channel->storage());
  EXPECT_EQ(report.creator_pid, static_cast<std::uint32_t>(getpid()));
  EXPECT_EQ(report.next_sequence, 3u);
  EXPECT_EQ(report.max_handles, 16u);
  EXPECT_EQ(report.history, 1u);
  EXPECT_EQ(report.max_deliveries, 1u);
  EXPECT_TRUE(report.default_group);
  EXPECT_FALSE(report.shut_down);
  EXPECT_FALSE(report.other_boot);

  ASSERT_EQ(report.participants.size(), 2u);
  EXPECT_EQ(report.participants[0].writing, 1u);
  EXPECT_EQ(report.participants[0].held, 0u);
  EXPECT_EQ(report.participants[0].group, 0u);
  EXPECT_EQ(report.participants[1].held, 1u);
  EXPECT_EQ(report.participants[1].group, 1u);
  for (const Report::Participant& one : report.participants) {
    EXPECT_TRUE(one.alive);
    EXPECT_EQ(one.pid, static_cast<std::uint32_t>(getpid()));
    EXPECT_EQ(one.start_time, base::process_start_time(one.pid));
    EXPECT_GT(one.joined_ns, 0u);
    EXPECT_EQ(one.waiting_on, 0u);
  }

  ASSERT_EQ(report.groups.size(), 3u);
  const Report::Group* a = group_of(report, "a");
  ASSERT_NE(a, nullptr);
  EXPECT_EQ(a->number, 1u);
  EXPECT_EQ(a->members, 1u);
  EXPECT_EQ(a->lag, 1u);
  EXPECT_EQ(a->held, 1u);
  EXPECT_EQ(a->dead_letters, 1u);
  EXPECT_FALSE(a->durable);
  EXPECT_EQ(a->on_death, OnDeath::Redeliver);
  EXPECT_EQ(report.groups[0].lag, 3u);
  EXPECT_TRUE(report.groups[0].durable);
  EXPECT_EQ(report.groups[0].members, 1u);
  EXPECT_TRUE(report.groups.back().retention);
  EXPECT_EQ(report.groups.back().lag, 1u);

  ASSERT_EQ(report.slots.size(), 4u) << "less those that are free";
  std::map<std::string, int> states;
  for (const Report::Slot& slot : report.slots) {
    ++states[slot.state];
    if (slot.state != "PINNED") continue;
    EXPECT_EQ(slot.number, held.slot);
    EXPECT_EQ(slot.sequence, 1u);
    EXPECT_EQ(slot.pending, 0b011u);
    ASSERT_EQ(slot.holders.size(), 1u);
    EXPECT_EQ(slot.holders[0].group, 1u);
    EXPECT_EQ(slot.holders[0].participant, report.participants[1].number);
    EXPECT_GE(slot.holders[0].for_ns, 0);
    EXPECT_LT(slot.holders[0].for_ns, 60'000'000'000);
  }
  EXPECT_EQ(states["WRITING"], 1);
  EXPECT_EQ(states["PINNED"], 1);
  EXPECT_EQ(states["COMMITTED"], 2);
  channel->abort(loan);
  sub->release(held);
}

TEST_P(Groups, AReportSaysWhoWaits) {
  make(small(1));
  auto sub = channel->subscribe(to("a"));
  std::thread receiver([&] {
    Received message;
    if (sub->recv(message, patience()) == Outcome::Ok) sub->release(message);
  });
  bool waits = false;
  for (std::int64_t end = patience(); !waits && base::monotonic_ns() < end; std::this_thread::yield()) {
    for (const Report::Participant& one : channel->report().participants)
      waits = waits || (one.group == 1 && one.waiting_on == 2);
  }
  EXPECT_TRUE(waits);
  send(*channel, "1");
  receiver.join();
}

// --- threads ---------------------------------------------------------------------------------------------------------

TEST_P(Groups, ThreadsWithHandlesOfTheirOwnSeeEachMessageOncePerGroup) {
  make(small(8));
  constexpr int kMessages = 2000, kGroups = 2, kMembers = 2;
  std::vector<base::Atomic<int>> seen(kGroups * kMessages);
  std::vector<ChannelPtr> handles;
  for (int i = 0; i < kGroups * kMembers; ++i)
    handles.push_back(channel->subscribe(to(std::string(1, static_cast<char>('a' + i / kMembers)))));
  std::vector<std::thread> threads;
  for (int i = 0; i < kGroups * kMembers; ++i) {
    threads.emplace_back([&, i] {
      Received message;
      while (handles[static_cast<std::size_t>(i)]->recv(message, patience()) == Outcome::Ok) {
        const int number = std::stoi(text_of(message));
        seen[static_cast<std::size_t>(i / kMembers * kMessages + number)].fetch_add(1);
        handles[static_cast<std::size_t>(i)]->release(message);
      }
    });
  }
  threads.emplace_back([&] {
    Received message;
    while (channel->recv(message, patience()) == Outcome::Ok) channel->release(message);
  });
  auto sender = channel->again();
  for (int i = 0; i < kMessages; ++i) {
    const std::string text = std::to_string(i);
    ASSERT_EQ(sender->send(text.data(), text.size(), Backpressure::Block, patience()), Outcome::Ok);
  }
  sender->shutdown(false);
  for (std::thread& each : threads) each.join();
  EXPECT_EQ(std::count_if(seen.begin(), seen.end(), [](const auto& n) { return n.load() != 1; }), 0);
  EXPECT_EQ(free(), 8u);
}

// --- fork ------------------------------------------------------------------------------------------------------------

TEST(GroupsFork, ASubscriberInAForkedChildIsAMemberOfItsOwnAndTouchesNothingOfItsParent) {
  auto channel = Channel::create_anonymous(small());
  auto sub = channel->subscribe(to("a"));
  send(*channel, "1");
  send(*channel, "2");
  drain(*channel);
  Received mine = take(*sub);
  EXPECT_EQ(in_child([&] {
              const bool knows = sub->group() == "a";
              Received message;
              if (!knows || sub->try_recv(message) != Outcome::Ok || text_of(message) != "2") return false;
              if (sub->stats().participants != 3 || sub->stats().pinned_by_me != 1) return false;
              sub->release(mine);  // its parent's
              sub->give_back(mine);
              if (text_of(mine) != "1") return false;
              sub->release(message);
              const Report report = sub->report();
              const Report::Group* group = group_of(report, "a");
              if (group == nullptr || group->members != 2) return false;
              sub->close();
              return true;
            }),
            0);
  EXPECT_EQ(text_of(mine), "1");
  EXPECT_EQ(sub->stats().pinned_by_me, 1u);
  EXPECT_EQ(channel->stats().free_slots, 3u);
  sub->release(mine);
  EXPECT_EQ(channel->stats().free_slots, 4u);
  send(*channel, "3");
  EXPECT_EQ(next(*sub), "3") << "the child's closing did not end the group";
}

TEST(GroupsFork, AChildWhoseGroupHasEndedIsToldSo) {
  auto channel = Channel::create_anonymous(small());
  auto sub = channel->subscribe(to("a"));
  EXPECT_EQ(in_child([&] {
              channel->remove_group("a");
              auto fresh = channel->subscribe(to("b"));  // has the number
              send(*channel, "1");
              return next(*sub) == "(closed)" && next(*fresh) == "1";
            }),
            0);
  EXPECT_EQ(next(*sub), "(closed)");
}

TEST(GroupsFork, AChildThatUsesNothingLeavesTheGroupToItsParent) {
  auto channel = Channel::create_anonymous(small());
  auto sub = channel->subscribe(to("a"));
  EXPECT_EQ(in_child([&] {
              sub.reset();
              return true;
            }),
            0);
  send(*channel, "1");
  EXPECT_EQ(next(*sub), "1");
}

// --- death -----------------------------------------------------------------------------------------------------------

TEST(GroupsDeath, TheGroupOfAKilledViewerBlocksNobody) {
  auto channel = Channel::create_anonymous(small(2));
  die_holding([&] {
    auto* viewer = new ChannelPtr(channel->subscribe(to("viewers")));
    send(*channel, "1");
    take(**viewer);
    send(*channel, "2");
  });
  EXPECT_EQ(drain(*channel), (Texts{"1", "2"}));
  EXPECT_EQ(channel->send("3", 1, Backpressure::Block, patience()), Outcome::Ok);
  EXPECT_EQ(group_of(channel->report(), "viewers"), nullptr);
  EXPECT_EQ(channel->stats().participants, 1u);
}

TEST(GroupsDeath, WhatAKilledMemberHeldGoesToAnotherOrIsDroppedAsTheGroupSays) {
  for (OnDeath rule : {OnDeath::Redeliver, OnDeath::Drop}) {
    auto channel = Channel::create_anonymous(small());
    SubscribeOptions options = to("a");
    options.on_death = rule;
    auto sub = channel->subscribe(options);
    send(*channel, "1");
    send(*channel, "2");
    drain(*channel);
    die_holding([&] { take(*sub); });
    EXPECT_TRUE(channel->check_peers());
    if (rule == OnDeath::Redeliver) {
      Received message = take(*sub);
      EXPECT_EQ(text_of(message), "1");
      EXPECT_EQ(message.attempts, 1u);
      sub->release(message);
    }
    EXPECT_EQ(drain(*sub), (Texts{"2"}));
    EXPECT_EQ(channel->stats().free_slots, 4u);
  }
}

TEST(GroupsDeath, ADeadLetterNamesWhoDiedWithIt) {
  ChannelOptions options = small();
  options.max_deliveries = 1;
  auto channel = Channel::create_anonymous(options);
  auto sub = channel->subscribe(to("a"));
  send(*channel, "poison");
  const pid_t victim = die_holding([&] { take(*sub); });
  EXPECT_TRUE(channel->check_peers());
  EXPECT_EQ(next(*sub), "(empty)");
  Received letter;
  DeadLetter why;
  ASSERT_EQ(sub->try_take_dead_letter(letter, why), Outcome::Ok);
  EXPECT_EQ(text_of(letter), "poison");
  EXPECT_EQ(why.group, "a");
  EXPECT_EQ(why.last_pid, static_cast<std::uint32_t>(victim));
  EXPECT_TRUE(why.last_holder_died);
  sub->release(letter);
}

TEST(GroupsDeath, PeersAreLookedAfterOnlyWhenThereIsADeadOne) {
  auto channel = Channel::create_anonymous(small());
  auto sub = channel->subscribe(to("a"));
  EXPECT_FALSE(channel->check_peers());
  die_holding([&] { send(*channel, "1"); });
  EXPECT_TRUE(sub->check_peers());
  EXPECT_FALSE(channel->check_peers()) << "it has been done";
  die_holding([&] { send(*channel, "2"); });
  sub->close();
  EXPECT_FALSE(sub->check_peers());
  EXPECT_TRUE(channel->check_peers());
  EXPECT_EQ(channel->deaths(), 2u);
}

TEST(GroupsDeath, DeathsAreListedWithWhatTheyLeft) {
  auto channel = Channel::create_anonymous(small());
  EXPECT_TRUE(channel->deaths_since(0).empty());
  auto sub = channel->subscribe(to("a"));
  send(*channel, "1");
  const pid_t first = die_holding([&] {
    take(*sub);
    Loan loan;
    sub->try_alloc(1, 0, Backpressure::Raise, loan);
  });
  channel->check_peers();
  const pid_t second = die_holding([&] { take(*channel); });
  channel->check_peers();
  const std::vector<Death> deaths = channel->deaths_since(0);
  ASSERT_EQ(deaths.size(), 2u);
  EXPECT_EQ(deaths[0].number, 0u);
  EXPECT_EQ(deaths[0].pid, static_cast<std::uint32_t>(first));
  EXPECT_EQ(deaths[0].group, "a");
  EXPECT_EQ(deaths[0].held, 1u);
  EXPECT_EQ(deaths[0].writing, 1u);
  EXPECT_GE(deaths[0].noticed_ns, deaths[0].joined_ns);
  EXPECT_GT(deaths[0].start_time, 0u);
  EXPECT_EQ(deaths[1].number, 1u);
  EXPECT_EQ(deaths[1].pid, static_cast<std::uint32_t>(second));
  EXPECT_EQ(deaths[1].group, "");
  EXPECT_EQ(deaths[1].writing, 0u);
  EXPECT_EQ(channel->deaths_since(1).size(), 1u);
  EXPECT_TRUE(channel->deaths_since(2).empty());
  EXPECT_TRUE(channel->deaths_since(99).empty());
}

TEST(GroupsDeath, ADeathIsNotListedUnderTheNextOwnerOfTheGroupsNumber) {
  ChannelOptions options = small();
  options.max_groups = 1;
  auto channel = Channel::create_anonymous(options);
  die_holding([&] { new ChannelPtr(channel->subscribe(to("old"))); });
  ASSERT_TRUE(channel->check_peers());
  auto fresh = channel->subscribe(to("fresh"));
  ASSERT_EQ(channel->deaths_since(0).size(), 1u + 1u) << "two handles of the child";
  for (const Death& death : channel->deaths_since(0)) EXPECT_NE(death.group, "fresh");
}

TEST(GroupsDeath, OnlyTheLastDeathsAreOnRecord) {
  auto channel = Channel::create_anonymous(small());
  for (int i = 0; i < 35; ++i) {
    EXPECT_EQ(in_child([&] { return send(*channel, "1") == Outcome::Ok; }), 0);
    channel->check_peers();
    next(*channel);
  }
  EXPECT_EQ(channel->deaths(), 35u);
  const std::vector<Death> deaths = channel->deaths_since(0);
  ASSERT_EQ(deaths.size(), memory::kDeathsKept);
  EXPECT_EQ(deaths.front().number, 3u);
  EXPECT_EQ(deaths.back().number, 34u);
}

TEST(GroupsDeath, AReportTellsTheDeadFromTheLiving) {
  auto channel = Channel::create_anonymous(small());
  send(*channel, "1");
  const pid_t victim = die_holding([&] { take(*channel); });
  const Report report = channel->report();
  ASSERT_EQ(report.participants.size(), 2u);
  EXPECT_TRUE(report.participants[0].alive);
  EXPECT_FALSE(report.participants[1].alive);
  EXPECT_EQ(report.participants[1].pid, static_cast<std::uint32_t>(victim));
  EXPECT_EQ(report.participants[1].held, 1u);
}

// --- from outside ----------------------------------------------------------------------------------------------------

ChannelPtr named(const std::string& name) {
  return Channel::open_named(name, small(), OpenMode::OpenOrCreate);
}

TEST(FromOutside, AReportOfAPathTakesNoPart) {
  Name name;
  auto channel = named(name);
  auto sub = channel->subscribe(to("a"));
  send(*channel, "1");
  const Report report = Channel::report_of(name.path());
  EXPECT_EQ(report.uuid, channel->uuid());
  EXPECT_EQ(report.path, name.path());
  EXPECT_EQ(report.storage, "shm");
  ASSERT_EQ(report.participants.size(), 2u);
  EXPECT_TRUE(report.participants[0].alive);
  EXPECT_TRUE(report.participants[1].alive);
  EXPECT_NE(group_of(report, "a"), nullptr);
  EXPECT_EQ(report.stats.depth, 1u);
  EXPECT_EQ(channel->stats().participants, 2u);
  EXPECT_EQ(code_of([&] { Channel::report_of(name.path() + "-not"); }), ErrorCode::ChannelNotFound);
}

TEST(FromOutside, WhatIsNoChannelIsNotReportedOrRemoved) {
  support::Folder folder;
  const std::string path = folder / "notes.txt";
  std::ofstream(path) << "some notes that are long enough to be taken for a header";
  EXPECT_EQ(code_of([&] { Channel::report_of(path); }), ErrorCode::ChannelLayout);
  EXPECT_EQ(code_of([&] { Channel::remove_channel(path, 0, true, false); }), ErrorCode::ChannelLayout);
  EXPECT_EQ(access(path.c_str(), F_OK), 0);
}

TEST(FromOutside, OnlyWhatIsProvablyDeadIsRemoved) {
  Name name;
  EXPECT_EQ(Channel::remove_channel(name.path(), 0, true, false), Removal::Missing);
  auto channel = named(name);
  EXPECT_EQ(Channel::remove_channel(name.path(), 0, true, false), Removal::InUse);
  channel.reset();
  EXPECT_EQ(Channel::remove_channel(name.path(), 0, true, false), Removal::Missing)
      << "the last one took it along";

  ASSERT_EQ(in_child([&] {
              auto* left = new ChannelPtr(named(name));
              return send(**left, "1") == Outcome::Ok;
            }),
            0);
  constexpr std::int64_t kHour = 3'600'000'000'000;
  EXPECT_EQ(Channel::remove_channel(name.path(), kHour, true, false), Removal::TooYoung);
  EXPECT_EQ(Channel::remove_channel(name.path(), 0, false, false), Removal::HasMessages);
  EXPECT_EQ(Channel::remove_channel(name.path(), 0, true, true), Removal::Removed);
  EXPECT_TRUE(name.exists()) << "it was only to say what it would do";
  EXPECT_EQ(Channel::remove_channel(name.path(), 0, true, false), Removal::Removed);
  EXPECT_FALSE(name.exists());
}

TEST(FromOutside, AChannelThatIsEmptyIsRemovedWithoutAsking) {
  Name name;
  ASSERT_EQ(in_child([&] {
              auto* left = new ChannelPtr(named(name));
              return send(**left, "1") == Outcome::Ok && next(**left) == "1";
            }),
            0);
  EXPECT_EQ(Channel::remove_channel(name.path(), 0, false, false), Removal::Removed);
  EXPECT_FALSE(name.exists());
}

TEST(FromOutside, ADamagedChannelOfNobodyIsRemoved) {
  Name name;
  ASSERT_EQ(in_child([&] {
              new ChannelPtr(named(name));
              return true;
            }),
            0);
  ASSERT_EQ(truncate(name.path().c_str(), 100), 0);
  EXPECT_EQ(code_of([&] { Channel::report_of(name.path()); }), ErrorCode::ChannelLayout);
  EXPECT_EQ(Channel::remove_channel(name.path(), 0, false, false), Removal::Removed);
  EXPECT_FALSE(name.exists());
}

TEST(FromOutside, AViewerOfANamedChannelKeepsItsNameUntilItCloses) {
  Name name;
  auto channel = named(name);
  auto sub = channel->subscribe(to("a"));
  channel->close();
  EXPECT_TRUE(name.exists());
  EXPECT_EQ(next(*sub), "(empty)");
  sub->close();
  EXPECT_FALSE(name.exists());
}

}  // namespace
}  // namespace dsline
