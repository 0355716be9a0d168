#include "dsline/channel.hpp"

#include <fcntl.h>
#include <gtest/gtest.h>
#include <signal.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cstring>
#include <functional>
#include <string>
#include <thread>
#include <vector>

#include "support/channels.hpp"
#include "support/crash_points.hpp"
#include "support/processes.hpp"

namespace dsline {
namespace {

using support::adopt;
using support::code_of;
using support::die_holding;
using support::in_child;
using support::next;
using support::patience;
using support::send;
using support::small;
using support::text_of;

struct Kind {
  const char* name;
  std::shared_ptr<Channel> (*make)(const ChannelOptions&);
};

class ChannelTest : public testing::TestWithParam<Kind> {
 protected:
  void make(const ChannelOptions& options = small()) { channel = GetParam().make(options); }
  std::shared_ptr<Channel> channel;
};

INSTANTIATE_TEST_SUITE_P(Every, ChannelTest,
                         testing::Values(Kind{"heap", &Channel::create_heap},
                                         Kind{"memfd", &Channel::create_anonymous}),
                         [](const testing::TestParamInfo<Kind>& info) {
                           return std::string(info.param.name);
                         });

TEST_P(ChannelTest, AMessageArrivesAsItWasSent) {
  make();
  std::string meta = "12345678";
  ASSERT_EQ(channel->try_send("hello", 5, kArrayMessage, meta.data(), 8, 99, Backpressure::Raise),
            Outcome::Ok);
  Received message;
  ASSERT_EQ(channel->try_recv(message), Outcome::Ok);
  EXPECT_EQ(text_of(message), "hello");
  EXPECT_EQ(std::memcmp(message.meta(), meta.data(), 8), 0);
  EXPECT_EQ(message.meta_bytes, 8u);
  EXPECT_EQ(message.kind, kArrayMessage);
  EXPECT_EQ(message.schema_hash, 99u);
  EXPECT_EQ(message.sequence, 0u);
  EXPECT_EQ(message.attempts, 0u);
  EXPECT_GT(message.timestamp_ns, 0);
  channel->release(message);
}

TEST_P(ChannelTest, AnEmptyMessageIsAMessage) {
  make();
  ASSERT_EQ(send(*channel, ""), Outcome::Ok);
  EXPECT_EQ(channel->depth(), 1u);
  EXPECT_EQ(next(*channel), "");
  EXPECT_EQ(next(*channel), "(empty)");
}

TEST_P(ChannelTest, MetadataLongerThanTheInlineRoomArrivesWhole) {
  make(small(2, 16384));
  std::string meta(10000, 'm');
  meta[9999] = 'z';
  ASSERT_EQ(channel->try_send("x", 1, kBytesMessage, meta.data(), 10000, 0, Backpressure::Raise),
            Outcome::Ok);
  Received message;
  ASSERT_EQ(channel->try_recv(message), Outcome::Ok);
  ASSERT_EQ(message.meta_bytes, 10000u);
  EXPECT_EQ(std::memcmp(message.meta(), meta.data(), 10000), 0);
  EXPECT_EQ(text_of(message), "x");
  channel->release(message);
}

TEST_P(ChannelTest, MessagesOfEverySizeAroundTheLimitsArriveWhole) {
  ChannelOptions options = small(2, 5000);
  options.max_message_size = 300000;
  make(options);
  for (std::size_t bytes :
       {0u, 1u, 63u, 64u, 65u, 4095u, 4096u, 4999u, 5000u, 5001u, 70000u, 299999u, 300000u, 10u}) {
    std::string text(bytes, '\0');
    for (std::size_t i = 0; i < bytes; ++i) text[i] = static_cast<char>(i * 7 + bytes);
    ASSERT_EQ(send(*channel, text), Outcome::Ok) << bytes;
    EXPECT_TRUE(next(*channel) == text) << bytes;
  }
}

TEST_P(ChannelTest, AMessageThatIsTooLargeIsRefusedWithTheLimitAndTakesNoSlot) {
  ChannelOptions options = small(1, 5000);
  options.max_message_size = 9000;
  make(options);
  std::string why;
  EXPECT_EQ(code_of([&] { send(*channel, std::string(9001, 'x')); }, &why), ErrorCode::MessageTooLarge);
  EXPECT_NE(why.find("9001"), std::string::npos) << why;
  EXPECT_NE(why.find("9000"), std::string::npos) << why;
  EXPECT_EQ(code_of([&] {
              Loan loan;
              channel->try_alloc(~std::uint64_t{0}, 65536, Backpressure::Raise, loan);
            }),
            ErrorCode::MessageTooLarge);
  EXPECT_EQ(send(*channel, std::string(9000, 'x')), Outcome::Ok);
}

TEST_P(ChannelTest, ASlotThatGrewIsGivenBackAfterManySmallMessages) {
  ChannelOptions options = small(1, 4096);
  options.max_message_size = 1 << 20;
  make(options);
  std::uint64_t before = channel->stats().reserved_bytes;
  send(*channel, std::string(1 << 20, 'x'));
  next(*channel);
  EXPECT_GE(channel->stats().reserved_bytes, before + (1 << 20) - 4096);
  for (int i = 0; i < 300; ++i) {
    send(*channel, "small");
    next(*channel);
  }
  EXPECT_EQ(channel->stats().reserved_bytes, before);
}

TEST_P(ChannelTest, AFullChannelIsFullUntilAMessageIsReleased) {
  make();
  for (int i = 0; i < 4; ++i) {
    EXPECT_FALSE(channel->is_full());
    ASSERT_EQ(send(*channel, "m"), Outcome::Ok);
  }
  EXPECT_TRUE(channel->is_full());
  EXPECT_EQ(send(*channel, "m"), Outcome::Full);
  Received message;
  ASSERT_EQ(channel->try_recv(message), Outcome::Ok);
  EXPECT_EQ(send(*channel, "m"), Outcome::Full) << "a message that is held keeps its slot";
  channel->release(message);
  EXPECT_EQ(send(*channel, "m"), Outcome::Ok);
}

TEST_P(ChannelTest, IsFullExactlyWhenNoSlotIsFree) {
  make(small(64));
  for (int i = 0; i < 64; ++i) {
    EXPECT_FALSE(channel->is_full()) << i << " of 64 slots are in use";
    ASSERT_EQ(send(*channel, "m"), Outcome::Ok);
  }
  EXPECT_TRUE(channel->is_full());
}

TEST_P(ChannelTest, WaitingForRoomEndsAtTheDeadline) {
  make(small(1));
  send(*channel, "m");
  EXPECT_EQ(channel->send("x", 1, Backpressure::Block, base::monotonic_ns() + 2'000'000), Outcome::TimedOut);
  EXPECT_EQ(channel->send("x", 1, Backpressure::Block, 0), Outcome::TimedOut);
  EXPECT_EQ(channel->send("x", 1, Backpressure::Raise, patience()), Outcome::Full) << "Raise does not wait";
}

TEST_P(ChannelTest, WaitingForAMessageEndsAtTheDeadline) {
  make();
  Received message;
  EXPECT_EQ(channel->recv(message, base::monotonic_ns() + 2'000'000), Outcome::TimedOut);
  EXPECT_EQ(channel->recv(message, 0), Outcome::TimedOut);
  send(*channel, "m");
  EXPECT_EQ(channel->recv(message, 0), Outcome::Ok) << "a deadline in the past still tries once";
  channel->release(message);
}

TEST_P(ChannelTest, ASenderThatWaitsGoesOnWhenThereIsRoom) {
  make(small(1));
  send(*channel, "first");
  Outcome outcome = Outcome::Full;
  std::thread sender([&] { outcome = channel->send("second", 6, Backpressure::Block, patience()); });
  while (channel->stats().send_waits == 0) std::this_thread::yield();
  EXPECT_EQ(next(*channel), "first");
  sender.join();
  EXPECT_EQ(outcome, Outcome::Ok);
  EXPECT_EQ(next(*channel), "second");
}

TEST_P(ChannelTest, AReceiverThatWaitsGetsTheMessage) {
  make();
  Received message;
  Outcome outcome = Outcome::Empty;
  std::thread receiver([&] { outcome = channel->recv(message, patience()); });
  while (channel->stats().recv_waits == 0) std::this_thread::yield();
  send(*channel, "m");
  receiver.join();
  EXPECT_EQ(outcome, Outcome::Ok);
  channel->release(message);
}

TEST_P(ChannelTest, DropNewestDiscardsWhatDoesNotFitAndCountsIt) {
  make(small(2));
  EXPECT_EQ(send(*channel, "a", Backpressure::DropNewest), Outcome::Ok);
  EXPECT_EQ(send(*channel, "b", Backpressure::DropNewest), Outcome::Ok);
  EXPECT_EQ(send(*channel, "c", Backpressure::DropNewest), Outcome::Dropped);
  EXPECT_EQ(channel->stats().dropped_newest, 1u);
  EXPECT_EQ(next(*channel), "a");
  EXPECT_EQ(send(*channel, "d", Backpressure::DropNewest), Outcome::Ok);
  EXPECT_EQ(next(*channel), "b");
  EXPECT_EQ(next(*channel), "d");
}

TEST_P(ChannelTest, DropOldestMakesRoomAndShowsAsAGap) {
  make(small(2));
  for (const char* text : {"a", "b", "c", "d"})
    EXPECT_EQ(send(*channel, text, Backpressure::DropOldest), Outcome::Ok);
  EXPECT_EQ(channel->stats().dropped_oldest, 2u);
  EXPECT_EQ(channel->stats().dropped_newest, 0u);
  Received message;
  ASSERT_EQ(channel->try_recv(message), Outcome::Ok);
  EXPECT_EQ(message.sequence, 2u);
  EXPECT_EQ(text_of(message), "c");
  channel->release(message);
  EXPECT_EQ(next(*channel), "d");
}

TEST_P(ChannelTest, DropOldestNeverTakesWhatIsHeldAndDropsTheNewestInstead) {
  make(small(2));
  send(*channel, "a");
  send(*channel, "b");
  Received a, b;
  ASSERT_EQ(channel->try_recv(a), Outcome::Ok);
  EXPECT_EQ(send(*channel, "c", Backpressure::DropOldest), Outcome::Ok) << "b is dropped";
  ASSERT_EQ(channel->try_recv(b), Outcome::Ok);
  EXPECT_EQ(text_of(b), "c");
  EXPECT_EQ(send(*channel, "d", Backpressure::DropOldest), Outcome::Dropped);
  EXPECT_EQ(channel->stats().dropped_oldest, 1u);
  EXPECT_EQ(channel->stats().dropped_newest, 1u);
  EXPECT_EQ(text_of(a), "a");
  channel->release(a);
  channel->release(b);
}

TEST_P(ChannelTest, ALoanIsNotSeenBeforeItIsPublishedAndFreeAfterAnAbort) {
  make(small(1));
  Loan loan;
  ASSERT_EQ(channel->try_alloc(3, 0, Backpressure::Raise, loan), Outcome::Ok);
  EXPECT_EQ(next(*channel), "(empty)");
  EXPECT_EQ(channel->stats().writing_slots, 1u);
  EXPECT_EQ(send(*channel, "x"), Outcome::Full);
  channel->abort(loan);
  EXPECT_EQ(channel->stats().free_slots, 1u);
  ASSERT_EQ(channel->try_alloc(3, 0, Backpressure::Raise, loan), Outcome::Ok);
  std::memcpy(loan.payload, "abc", 3);
  EXPECT_EQ(channel->publish(loan, kBytesMessage, 0), Outcome::Ok);
  EXPECT_EQ(next(*channel), "abc");
}

TEST_P(ChannelTest, AMessageThatIsGivenBackComesAgainFirst) {
  make();
  send(*channel, "a");
  send(*channel, "b");
  Received message;
  ASSERT_EQ(channel->try_recv(message), Outcome::Ok);
  channel->give_back(message);
  ASSERT_EQ(channel->try_recv(message), Outcome::Ok);
  EXPECT_EQ(text_of(message), "a");
  EXPECT_EQ(message.attempts, 1u);
  EXPECT_EQ(message.sequence, 0u);
  channel->release(message);
  EXPECT_EQ(next(*channel), "b");
  EXPECT_EQ(channel->stats().redelivered, 1u);
}

TEST_P(ChannelTest, StatsCountSlotsByState) {
  make(small(5));
  send(*channel, "a");
  send(*channel, "b");
  Received message;
  channel->try_recv(message);
  Loan loan;
  channel->try_alloc(1, 0, Backpressure::Raise, loan);
  ChannelStats stats = channel->stats();
  EXPECT_EQ(stats.depth, 1u);
  EXPECT_EQ(stats.committed_slots, 2u);
  EXPECT_EQ(stats.pinned_slots, 1u);
  EXPECT_EQ(stats.pinned_by_me, 1u);
  EXPECT_EQ(stats.writing_slots, 1u);
  EXPECT_EQ(stats.free_slots, 2u);
  EXPECT_EQ(stats.participants, 1u);
  EXPECT_EQ(stats.next_sequence, 2u);
  EXPECT_EQ(stats.head_sequence, 1u);
  channel->release(message);
  channel->abort(loan);
}

TEST_P(ChannelTest, ShutdownDrainsAndThenEnds) {
  make();
  send(*channel, "a");
  send(*channel, "b");
  channel->shutdown(false);
  EXPECT_TRUE(channel->is_shut_down());
  EXPECT_EQ(send(*channel, "c"), Outcome::Closed);
  EXPECT_EQ(next(*channel), "a");
  EXPECT_EQ(next(*channel), "b");
  EXPECT_EQ(next(*channel), "(closed)");
  EXPECT_EQ(next(*channel), "(closed)") << "every later look says so";
}

TEST_P(ChannelTest, ShutdownAtOnceEndsWithoutDraining) {
  make();
  send(*channel, "a");
  channel->shutdown(true);
  EXPECT_EQ(next(*channel), "(closed)");
  EXPECT_EQ(channel->stats().free_slots, 4u);
}

TEST_P(ChannelTest, ALoanThatIsPublishedAfterTheShutdownIsAborted) {
  make();
  Loan loan;
  channel->try_alloc(1, 0, Backpressure::Raise, loan);
  channel->shutdown(false);
  EXPECT_EQ(next(*channel), "(empty)") << "a slot in writing may still become a message";
  EXPECT_EQ(channel->publish(loan, kBytesMessage, 0), Outcome::Closed);
  EXPECT_EQ(next(*channel), "(closed)");
  EXPECT_EQ(channel->stats().free_slots, 4u);
}

TEST_P(ChannelTest, AMessageThatIsGivenBackAfterTheShutdownIsStillDelivered) {
  make();
  send(*channel, "a");
  Received message;
  channel->try_recv(message);
  channel->shutdown(false);
  EXPECT_EQ(next(*channel), "(closed)") << "what another member holds counts as delivered";
  channel->give_back(message);
  EXPECT_EQ(next(*channel), "a");
  EXPECT_EQ(next(*channel), "(closed)");
}

TEST_P(ChannelTest, ShutdownWakesThoseWhoWait) {
  make(small(1));
  Received message;
  Outcome received = Outcome::Ok;
  std::thread receiver([&] { received = channel->recv(message, patience()); });
  while (channel->stats().recv_waits == 0) std::this_thread::yield();
  channel->shutdown(false);
  receiver.join();
  EXPECT_EQ(received, Outcome::Closed);
}

TEST_P(ChannelTest, AClosedHandleSendsAndReceivesNothing) {
  make();
  send(*channel, "a");
  channel->close();
  channel->close();
  EXPECT_TRUE(channel->is_closed());
  EXPECT_EQ(send(*channel, "b"), Outcome::Closed);
  EXPECT_EQ(next(*channel), "(closed)");
}

TEST_P(ChannelTest, ClosingWakesTheOtherThreadsOfTheHandle) {
  make(small(1));
  send(*channel, "a");
  Outcome sent = Outcome::Ok;
  std::thread sender([&] { sent = channel->send("b", 1, Backpressure::Block, patience()); });
  while (channel->stats().send_waits == 0) std::this_thread::yield();
  channel->close();
  sender.join();
  EXPECT_EQ(sent, Outcome::Closed);
}

TEST_P(ChannelTest, AMessageWithADamagedHeaderIsReportedCountedAndTheNextOneArrives) {
  make(small(2));
  Loan loan;
  channel->try_alloc(1, 0, Backpressure::Raise, loan);
  ASSERT_EQ(channel->publish(loan, kBytesMessage, 0), Outcome::Ok);
  loan.payload[-64] ^= std::byte{1};  // the first byte of its header
  send(*channel, "good");
  Received message;
  ASSERT_EQ(channel->try_recv(message), Outcome::Corrupted);
  ASSERT_NE(message.fault, nullptr);
  EXPECT_NE(std::string(message.fault).find("magic"), std::string::npos);
  EXPECT_EQ(next(*channel), "good");
  EXPECT_EQ(channel->stats().corrupted, 1u);
  EXPECT_EQ(channel->stats().corrupted_slots, 1u);
  // The quarantined slot is used when no other is left, and is an ordinary one then.
  EXPECT_EQ(send(*channel, "x"), Outcome::Ok);
  EXPECT_EQ(send(*channel, "y"), Outcome::Ok);
  EXPECT_EQ(send(*channel, "z"), Outcome::Full);
  EXPECT_EQ(next(*channel), "x");
  EXPECT_EQ(next(*channel), "y");
  EXPECT_EQ(channel->stats().free_slots, 2u);
}

TEST_P(ChannelTest, EveryBitOfAHeaderIsProtected) {
  make(small(1));
  for (int bit = 0; bit < 512; ++bit) {
    Loan loan;
    ASSERT_EQ(channel->try_alloc(1, 0, Backpressure::Raise, loan), Outcome::Ok);
    channel->publish(loan, kBytesMessage, 0);
    loan.payload[-64 + bit / 8] ^= static_cast<std::byte>(1 << bit % 8);
    Received message;
    EXPECT_EQ(channel->try_recv(message), Outcome::Corrupted) << bit;
  }
}

TEST_P(ChannelTest, ADamagedPayloadIsFoundWhereThePayloadIsProtected) {
  ChannelOptions options = small(1);
  options.checksum = 2;
  make(options);
  Loan loan;
  channel->try_alloc(3, 0, Backpressure::Raise, loan);
  std::memcpy(loan.payload, "abc", 3);
  channel->publish(loan, kBytesMessage, 0);
  loan.payload[1] ^= std::byte{1};
  EXPECT_EQ(next(*channel), "(corrupted)");
}

TEST_P(ChannelTest, SequencesGoOnBeyondTheWidthOfACell) {
  ChannelOptions options = small(3);
  const std::uint64_t lap = std::uint64_t{1} << 44;
  options.first_position = lap - 4;
  make(options);
  std::vector<std::uint64_t> sequences;
  for (int i = 0; i < 6; ++i) {
    send(*channel, "m");
    Received message;
    ASSERT_EQ(channel->try_recv(message), Outcome::Ok);
    sequences.push_back(message.sequence);
    channel->release(message);
  }
  EXPECT_EQ(sequences, (std::vector<std::uint64_t>{lap - 4, lap - 3, lap - 2, lap, lap + 1, lap + 2}));
}

// --- several handles ---

TEST(Handles, EachHasItsOwnNumberAndTheyShareTheMessages) {
  auto first = Channel::create_anonymous(small());
  auto second = adopt(*first);
  EXPECT_EQ(first->stats().participants, 2u);
  EXPECT_EQ(first->uuid(), second->uuid());
  send(*first, "a");
  EXPECT_EQ(next(*second), "a");
  second->close();
  EXPECT_EQ(first->stats().participants, 1u);
}

TEST(Handles, MoreThanTheLimitAreRefusedByNumberAndRoomComesBackByClosing) {
  ChannelOptions options = small();
  options.max_handles = 2;
  auto first = Channel::create_anonymous(options);
  auto second = adopt(*first);
  std::string why;
  EXPECT_EQ(code_of([&] { adopt(*first); }, &why), ErrorCode::TooManyHandles);
  EXPECT_NE(why.find("max_handles=2"), std::string::npos) << why;
  second->close();
  EXPECT_NO_THROW(adopt(*first));
}

TEST(Handles, ShutdownEndsItForEveryHandle) {
  auto first = Channel::create_anonymous(small());
  auto second = adopt(*first);
  auto third = adopt(*first);
  send(*first, "a");
  first->shutdown(false);
  EXPECT_EQ(next(*second), "a");
  EXPECT_EQ(next(*second), "(closed)");
  EXPECT_EQ(next(*third), "(closed)");
  EXPECT_EQ(send(*third, "x"), Outcome::Closed);
}

TEST(Handles, ClosingOneLeavesTheOthers) {
  auto first = Channel::create_anonymous(small());
  auto second = adopt(*first);
  first->close();
  EXPECT_EQ(send(*second, "a"), Outcome::Ok);
  EXPECT_EQ(next(*second), "a");
}

TEST(Handles, AMessageThatAClosedHandleHoldsStaysHeldUntilItIsReleased) {
  auto first = Channel::create_anonymous(small());
  auto second = adopt(*first);
  send(*first, "a");
  Received message;
  ASSERT_EQ(second->try_recv(message), Outcome::Ok);
  second->close();
  EXPECT_EQ(first->stats().participants, 2u);
  EXPECT_EQ(next(*first), "(empty)");
  EXPECT_EQ(text_of(message), "a");
  second->release(message);
  EXPECT_EQ(first->stats().participants, 1u);
  EXPECT_EQ(first->stats().free_slots, 4u);
}

TEST(Handles, AClosedHandleWithAnOpenLoanLeavesWhenTheLoanIsAborted) {
  auto first = Channel::create_anonymous(small());
  auto second = adopt(*first);
  Loan loan;
  second->try_alloc(1, 0, Backpressure::Raise, loan);
  second->close();
  EXPECT_EQ(first->stats().participants, 2u);
  second->abort(loan);
  EXPECT_EQ(first->stats().participants, 1u);
  EXPECT_EQ(first->stats().free_slots, 4u);
}

TEST(Handles, AbandonReleasesEveryMessageThatIsHeld) {
  auto first = Channel::create_anonymous(small());
  auto second = adopt(*first);
  send(*first, "a");
  send(*first, "b");
  Received message;
  ASSERT_EQ(second->try_recv(message), Outcome::Ok);
  second->abandon();
  EXPECT_EQ(first->stats().participants, 1u);
  EXPECT_EQ(first->stats().free_slots, 3u);
  EXPECT_EQ(next(*first), "b");
  second->release(message);
  second->abandon();
  EXPECT_EQ(first->stats().free_slots, 4u);
}

TEST(Handles, AbandonLeavesALoanToTheThreadThatWritesIt) {
  auto first = Channel::create_anonymous(small(1));
  auto second = adopt(*first);
  Loan loan, theirs;
  ASSERT_EQ(second->try_alloc(1, 0, Backpressure::Raise, loan), Outcome::Ok);
  second->abandon();
  EXPECT_EQ(first->stats().participants, 2u);
  EXPECT_EQ(first->try_alloc(1, 0, Backpressure::Raise, theirs), Outcome::Full)
      << "the slot is still being written";
  second->abort(loan);
  EXPECT_EQ(first->stats().participants, 1u);
  EXPECT_EQ(first->try_alloc(1, 0, Backpressure::Raise, theirs), Outcome::Ok);
  second->abort(loan);
  EXPECT_EQ(second->publish(loan, kBytesMessage, 0), Outcome::Closed);
  EXPECT_EQ(first->stats().writing_slots, 1u) << "a loan that is over took the slot of its new owner";
}

TEST(Handles, AHandleThatGoesWhileItHoldsAMessageLosesNothing) {
  auto first = Channel::create_anonymous(small());
  {
    auto second = adopt(*first);
    send(*first, "a");
    Received message;
    ASSERT_EQ(second->try_recv(message), Outcome::Ok);
    Loan loan;
    second->try_alloc(1, 0, Backpressure::Raise, loan);
  }
  adopt(*first);  // whoever joins recovers the dead
  EXPECT_EQ(next(*first), "a");
  EXPECT_EQ(first->stats().free_slots, 4u);
}

TEST(Handles, AFreshHandleDoesNotInheritWhatTheLastOwnerOfItsNumberHeld) {
  auto first = Channel::create_anonymous(small());
  {
    auto second = adopt(*first);
    send(*first, "a");
    Received message;
    ASSERT_EQ(second->try_recv(message), Outcome::Ok);
  }
  auto third = adopt(*first);
  EXPECT_EQ(third->stats().pinned_by_me, 0u);
}

TEST(Handles, ADescriptorThatIsNoChannelIsRefused) {
  int fd = memfd_create("other", MFD_CLOEXEC);
  EXPECT_EQ(code_of([&] { Channel::adopt_anonymous(fd); }), ErrorCode::ChannelLayout);
  fd = memfd_create("other", MFD_CLOEXEC | MFD_ALLOW_SEALING);
  ASSERT_EQ(ftruncate(fd, 8192), 0);
  ASSERT_EQ(fcntl(fd, F_ADD_SEALS, F_SEAL_SHRINK | F_SEAL_GROW), 0);
  EXPECT_EQ(code_of([&] { Channel::adopt_anonymous(fd); }), ErrorCode::ChannelLayout);
}

// Every round leaves a handle while its threads are at any point of a blocking call.
TEST(Handles, ClosingWhileThreadsAreInBlockingCallsLeavesNothingBehind) {
  auto keeper = Channel::create_anonymous(small(2));
  for (int round = 0; round < 300; ++round) {
    auto handle = adopt(*keeper);
    std::thread sender([&] {
      while (handle->send("m", 1, Backpressure::Block, patience()) == Outcome::Ok) {
      }
    });
    std::thread receiver([&] {
      Received message;
      while (handle->recv(message, patience()) == Outcome::Ok) handle->release(message);
    });
    while (handle->stats().next_sequence < static_cast<std::uint64_t>(round) * 3) std::this_thread::yield();
    handle->close();
    sender.join();
    receiver.join();
    while (next(*keeper) != "(empty)") {
    }
    ASSERT_EQ(keeper->stats().free_slots, 2u) << "round " << round;
    ASSERT_EQ(keeper->stats().participants, 1u) << "round " << round;
  }
}

// --- fork ---

TEST(Fork, AChildRegistersAnewAtItsFirstUse) {
  auto channel = Channel::create_anonymous(small());
  EXPECT_EQ(in_child([&] {
              if (send(*channel, "from the child") != Outcome::Ok) return false;
              return channel->stats().participants == 2;
            }),
            0);
  EXPECT_EQ(next(*channel), "from the child");
}

TEST(Fork, AChildThatUsesNothingTakesNoNumberAndDropsNoLock) {
  auto channel = Channel::create_anonymous(small());
  EXPECT_EQ(in_child([&] {
              channel.reset();
              return true;
            }),
            0);
  auto other = adopt(*channel);
  EXPECT_EQ(other->stats().participants, 2u);
  EXPECT_EQ(send(*channel, "a"), Outcome::Ok);
}

TEST(Fork, AChildReleasesNothingThatItsParentHolds) {
  auto channel = Channel::create_anonymous(small());
  send(*channel, "a");
  Received message;
  ASSERT_EQ(channel->try_recv(message), Outcome::Ok);
  EXPECT_EQ(in_child([&] {
              if (text_of(message) != "a") return false;
              channel->release(message);
              channel->give_back(message);
              channel->abandon();
              channel->depth();
              send(*channel, "b");
              channel->release(message);
              channel->give_back(message);
              channel->abandon();
              return true;
            }),
            0);
  EXPECT_EQ(channel->stats().pinned_by_me, 1u);
  EXPECT_EQ(text_of(message), "a");
  channel->release(message);
  EXPECT_EQ(next(*channel), "b");
  EXPECT_EQ(channel->stats().free_slots, 4u);
}

TEST(Fork, AChildsAbortOfAnInheritedLoanDoesNotTouchTheParentsSlot) {
  auto channel = Channel::create_anonymous(small());
  Loan loan;
  ASSERT_EQ(channel->try_alloc(1, 0, Backpressure::Raise, loan), Outcome::Ok);
  EXPECT_EQ(in_child([&] {
              channel->abort(loan);
              return true;
            }),
            0);
  EXPECT_EQ(channel->stats().writing_slots, 1u);
  EXPECT_EQ(channel->publish(loan, kBytesMessage, 0), Outcome::Ok);
}

TEST(Fork, AHeapChannelSaysThatItDoesNotCrossAFork) {
  auto channel = Channel::create_heap(small());
  EXPECT_EQ(in_child([&] {
              Received message;
              return code_of([&] { channel->try_recv(message); }) == ErrorCode::FeatureUnavailable;
            }),
            0);
}

TEST(Fork, AChildForWhichThereIsNoNumberIsToldSo) {
  ChannelOptions options = small();
  options.max_handles = 1;
  auto channel = Channel::create_anonymous(options);
  EXPECT_EQ(in_child([&] {
              Received message;
              return code_of([&] { channel->try_recv(message); }) == ErrorCode::TooManyHandles;
            }),
            0);
  EXPECT_EQ(send(*channel, "a"), Outcome::Ok);
}

// --- death ---

TEST(Death, WhatAKilledReceiverHeldIsDeliveredToOneWhoWaits) {
  auto channel = Channel::create_anonymous(small());
  send(*channel, "a");
  die_holding([&] {
    Received message;
    channel->try_recv(message);
  });
  Received message;
  ASSERT_EQ(channel->recv(message, patience()), Outcome::Ok);
  EXPECT_EQ(text_of(message), "a");
  EXPECT_EQ(message.attempts, 1u);
  channel->release(message);
}

TEST(Death, WhatAKilledReceiverHeldIsDeliveredToOneWhoOnlyPolls) {
  auto channel = Channel::create_anonymous(small());
  send(*channel, "a");
  die_holding([&] {
    Received message;
    channel->try_recv(message);
  });
  std::string text = "(empty)";
  for (std::int64_t end = base::monotonic_ns() + 2'000'000'000;
       text == "(empty)" && base::monotonic_ns() < end;) {
    text = next(*channel);
  }
  EXPECT_EQ(text, "a");
}

TEST(Death, TheSlotThatAKilledSenderWasWritingIsFoundByASenderThatWaits) {
  auto channel = Channel::create_anonymous(small(1));
  die_holding([&] {
    Loan loan;
    channel->try_alloc(1, 0, Backpressure::Raise, loan);
  });
  EXPECT_EQ(channel->send("x", 1, Backpressure::Block, patience()), Outcome::Ok);
}

TEST(Death, AShutDownChannelEndsAlsoWhenASenderDiedWhileWriting) {
  auto channel = Channel::create_anonymous(small());
  die_holding([&] {
    Loan loan;
    channel->try_alloc(1, 0, Backpressure::Raise, loan);
  });
  channel->shutdown(false);
  Received message;
  EXPECT_EQ(channel->recv(message, patience()), Outcome::Closed);
}

TEST(Death, HintsThatDiedWithTheirHandleAreFound) {
  auto channel = Channel::create_anonymous(small(64));
  die_holding([&] { send(*channel, "from the dead"); });
  for (int i = 0; i < 63; ++i) ASSERT_EQ(send(*channel, "m"), Outcome::Ok) << i;
  EXPECT_EQ(send(*channel, "m"), Outcome::Full);
  EXPECT_EQ(next(*channel), "from the dead");
}

#if defined(DSLINE_CRASH_POINTS)

using support::CrashPoint;
using support::Ending;

/// Everything still to be received, as text/attempts, each released.
std::vector<std::pair<std::string, std::uint32_t>> drain(Channel& channel) {
  std::vector<std::pair<std::string, std::uint32_t>> all;
  Received message;
  while (channel.try_recv(message) == Outcome::Ok) {
    all.emplace_back(text_of(message), message.attempts);
    channel.release(message);
  }
  return all;
}

class DeathAtEveryStore : public testing::TestWithParam<std::uint32_t> {
 protected:
  void SetUp() override {
    options = small(GetParam());
    options.first_position = (std::uint64_t{1} << 44) - 3;
  }
  /// No slot, number or hint is lost.
  void expect_whole(Channel& channel, int store) {
    ASSERT_EQ(channel.stats().free_slots, GetParam()) << "died before store " << store;
    for (std::uint32_t i = 0; i < GetParam(); ++i) ASSERT_EQ(send(channel, "again"), Outcome::Ok) << store;
    ASSERT_EQ(drain(channel).size(), GetParam()) << store;
    ASSERT_EQ(channel.stats().participants, 1u) << "died before store " << store;
  }
  ChannelOptions options;
};

using Texts = std::vector<std::pair<std::string, std::uint32_t>>;

TEST_P(DeathAtEveryStore, OfASendDeliversTheMessageOnceOrNotAtAll) {
  bool delivered = false;
  Ending ending = Ending::Died;
  for (int store = 1; ending == Ending::Died; ++store) {
    auto channel = Channel::create_anonymous(options);
    if (GetParam() > 1) send(*channel, "a");
    ending = CrashPoint::die_before(store, [&](CrashPoint& point) {
      auto mine = adopt(*channel);
      point.arm(channel->descriptor());
      send(*mine, "b");
    });
    ASSERT_NE(ending, Ending::Failed) << store;
    adopt(*channel);
    Texts got = drain(*channel);
    if (GetParam() > 1) {
      ASSERT_FALSE(got.empty()) << store;
      EXPECT_EQ(got.front(), (std::pair<std::string, std::uint32_t>{"a", 0})) << store;
      got.erase(got.begin());
    }
    ASSERT_LE(got.size(), 1u) << "died before store " << store;
    ASSERT_GE(got.size(), delivered ? 1u : 0u) << "committed, but lost: died before store " << store;
    for (const auto& message : got)
      EXPECT_EQ(message, (std::pair<std::string, std::uint32_t>{"b", 0})) << store;
    delivered = !got.empty();
    expect_whole(*channel, store);
  }
  EXPECT_TRUE(delivered);
}

TEST_P(DeathAtEveryStore, OfAReceiveLosesNothingAndFlagsWhatComesTwice) {
  int stage = 0;  // 0: untouched, 1: delivered again, 2: released
  Ending ending = Ending::Died;
  for (int store = 1; ending == Ending::Died; ++store) {
    auto channel = Channel::create_anonymous(options);
    send(*channel, "a");
    if (GetParam() > 1) send(*channel, "b");
    ending = CrashPoint::die_before(store, [&](CrashPoint& point) {
      auto mine = adopt(*channel);
      point.arm(channel->descriptor());
      next(*mine);
    });
    ASSERT_NE(ending, Ending::Failed) << store;
    adopt(*channel);
    Texts got = drain(*channel);
    int now = 2;
    if (!got.empty() && got.front().first == "a") {
      now = got.front().second == 0 ? 0 : 1;
      got.erase(got.begin());
    }
    EXPECT_GE(now, stage) << "died before store " << store;
    stage = now;
    EXPECT_EQ(got, GetParam() > 1 ? (Texts{{"b", 0}}) : Texts{}) << "died before store " << store;
    expect_whole(*channel, store);
  }
  EXPECT_EQ(stage, 2);
}

TEST_P(DeathAtEveryStore, OfGivingBackLosesNothing) {
  Ending ending = Ending::Died;
  for (int store = 1; ending == Ending::Died; ++store) {
    auto channel = Channel::create_anonymous(options);
    send(*channel, "a");
    ending = CrashPoint::die_before(store, [&](CrashPoint& point) {
      auto mine = adopt(*channel);
      Received message;
      mine->try_recv(message);
      point.arm(channel->descriptor());
      mine->give_back(message);
    });
    ASSERT_NE(ending, Ending::Failed) << store;
    adopt(*channel);
    EXPECT_EQ(drain(*channel), (Texts{{"a", 1}})) << "died before store " << store;
    expect_whole(*channel, store);
  }
}

TEST_P(DeathAtEveryStore, OfDroppingTheOldestLosesNothingElse) {
  Ending ending = Ending::Died;
  for (int store = 1; ending == Ending::Died; ++store) {
    auto channel = Channel::create_anonymous(options);
    for (std::uint32_t i = 0; i < GetParam(); ++i) send(*channel, std::to_string(i));
    ending = CrashPoint::die_before(store, [&](CrashPoint& point) {
      auto mine = adopt(*channel);
      point.arm(channel->descriptor());
      send(*mine, "new", Backpressure::DropOldest);
    });
    ASSERT_NE(ending, Ending::Failed) << store;
    adopt(*channel);
    Texts got = drain(*channel);
    std::vector<std::string> texts;
    for (const auto& each : got) texts.push_back(each.first);
    if (!texts.empty() && texts.back() == "new") texts.pop_back();
    std::uint32_t first = texts.size() == GetParam() ? 0 : 1;
    for (std::uint32_t i = first; i < GetParam(); ++i) {
      ASSERT_LT(i - first, texts.size()) << "died before store " << store;
      EXPECT_EQ(texts[i - first], std::to_string(i)) << "died before store " << store;
    }
    expect_whole(*channel, store);
  }
}

TEST_P(DeathAtEveryStore, OfJoiningAndLeavingLosesNoNumber) {
  Ending ending = Ending::Died;
  for (int store = 1; ending == Ending::Died; ++store) {
    auto channel = Channel::create_anonymous(options);
    send(*channel, "a");
    ending = CrashPoint::die_before(store, [&](CrashPoint& point) {
      Received message;
      channel->try_recv(message);  // registers the inherited handle
      channel->give_back(message);
      point.arm(channel->descriptor());
      channel->close();
    });
    ASSERT_NE(ending, Ending::Failed) << store;
    adopt(*channel);
    EXPECT_EQ(drain(*channel).size(), 1u) << store;
    expect_whole(*channel, store);
  }
}

// The first process dies with a message held, one half sent, and one slot in writing; the second while it recovers it.
TEST(DeathOfARecoverer, AtEveryStoreIsMadeGoodByTheNext) {
  ChannelOptions options = small(5);
  options.first_position = (std::uint64_t{1} << 44) - 3;
  int most = 0;
  for (int first = 1; first < 40; first += 1) {
    Ending ending = Ending::Died;
    for (int store = 1; ending == Ending::Died; store += first % 4 == 0 ? 1 : 5) {
      auto channel = Channel::create_anonymous(options);
      send(*channel, "a");
      send(*channel, "b");
      Ending died = CrashPoint::die_before(first, [&](CrashPoint& point) {
        auto mine = adopt(*channel);
        Received message;
        mine->try_recv(message);
        Loan loan;
        mine->try_alloc(1, 0, Backpressure::Raise, loan);
        point.arm(channel->descriptor());
        send(*mine, "c");
        kill(getpid(), SIGKILL);
      });
      ASSERT_EQ(died, Ending::Died);
      // The inherited handle registers, which recovers the dead, before its message is refused.
      ending = CrashPoint::die_before(store, [&](CrashPoint& point) {
        point.arm(channel->descriptor());
        code_of([&] { send(*channel, std::string(1000, 'x')); });
      });
      ASSERT_NE(ending, Ending::Failed) << first << "/" << store;
      most = std::max(most, store);
      adopt(*channel);
      Texts got = drain(*channel);
      ASSERT_GE(got.size(), 2u) << first << "/" << store;
      EXPECT_EQ(got[0], (std::pair<std::string, std::uint32_t>{"a", 1})) << first << "/" << store;
      EXPECT_EQ(got[1], (std::pair<std::string, std::uint32_t>{"b", 0})) << first << "/" << store;
      ASSERT_LE(got.size(), 3u) << first << "/" << store;
      got.erase(got.begin(), got.begin() + 2);
      for (const auto& message : got)
        EXPECT_EQ(message, (std::pair<std::string, std::uint32_t>{"c", 0})) << first;
      ASSERT_EQ(channel->stats().free_slots, 5u) << first << "/" << store;
      ASSERT_EQ(channel->stats().participants, 1u) << first << "/" << store;
    }
  }
  EXPECT_GT(most, 20) << "the recoverer was not watched";
}

INSTANTIATE_TEST_SUITE_P(Capacities, DeathAtEveryStore, testing::Values(1u, 2u, 3u, 64u));

#endif

}  // namespace
}  // namespace dsline
