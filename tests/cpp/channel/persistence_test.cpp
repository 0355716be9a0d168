// A file that outlives its processes, and its machine: what a boot leaves is made by changing the boot's identity in it.
#include <fcntl.h>
#include <gtest/gtest.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstddef>
#include <cstring>
#include <string>
#include <vector>

#include "base/atomic.hpp"
#include "memory/layout.hpp"
#include "support/channels.hpp"
#include "support/processes.hpp"

namespace {

dsline::base::Atomic<int> syncs{0};
dsline::base::Atomic<int> syncs_that_fail{0};
dsline::base::Atomic<int> sync_failure{0};

}  // namespace

// In place of the C library's: counts, and fails where a test asks for it.
extern "C" int fdatasync(int fd) {
  ++syncs;
  if (syncs_that_fail.load() > 0) {
    --syncs_that_fail;
    errno = sync_failure.load();
    return -1;
  }
  return static_cast<int>(syscall(SYS_fdatasync, fd));
}

namespace dsline {
namespace {

using support::code_of;
using support::Folder;
using support::in_child;
using support::next;
using support::send;
using support::small;
using support::text_of;

using ChannelPtr = std::shared_ptr<Channel>;
using Texts = std::vector<std::string>;

SubscribeOptions to(const std::string& group, bool durable, Start start = Start::Next) {
  SubscribeOptions options;
  options.group = group;
  options.start = start;
  options.durable = durable;
  return options;
}

Texts drain(Channel& channel) {
  Texts all;
  for (std::string text = next(channel); text != "(empty)" && text != "(closed)"; text = next(channel))
    all.push_back(text);
  return all;
}

class Persistence : public testing::Test {
 protected:
  void SetUp() override {
    syncs = 0;
    syncs_that_fail = 0;
  }
  ChannelPtr create(const ChannelOptions& options = small()) {
    return Channel::open_file(path, options, OpenMode::OpenOrCreate);
  }
  ChannelPtr open() { return Channel::open_file(path, {}, OpenMode::Open); }
  /// Runs `work` in a process that ends with everything open.
  void in_process_that_dies(const std::function<bool()>& work) { ASSERT_EQ(in_child(work), 0); }
  void write_at(std::size_t offset, const void* bytes, std::size_t size) {
    int fd = ::open(path.c_str(), O_RDWR | O_CLOEXEC);
    ASSERT_GE(fd, 0);
    EXPECT_EQ(pwrite(fd, bytes, size, static_cast<off_t>(offset)), static_cast<ssize_t>(size));
    close(fd);
  }
  void boot() {
    const unsigned char other[16] = {1, 2, 3};
    write_at(offsetof(memory::RegionHeader, boot_id), other, sizeof other);
    ASSERT_TRUE(Channel::report_of(path).other_boot);
  }

  Folder folder;
  std::string path = folder / "channel";
};

// --- another boot ----------------------------------------------------------------------------------------------------

TEST_F(Persistence, MessagesOutliveTheBootInTheirOrderAndTheSequenceGoesOn) {
  {
    auto channel = create();
    for (const char* text : {"1", "2", "3"}) send(*channel, text);
    EXPECT_EQ(next(*channel), "1");
    send(*channel, "4");
  }
  boot();
  auto channel = open();
  EXPECT_FALSE(Channel::report_of(path).other_boot) << "it is this boot's now";
  EXPECT_EQ(channel->stats().participants, 1u);
  EXPECT_EQ(channel->stats().next_sequence, 4u);
  Received message;
  ASSERT_EQ(channel->try_recv(message), Outcome::Ok);
  EXPECT_EQ(message.sequence, 1u);
  EXPECT_EQ(message.attempts, 0u);
  EXPECT_EQ(text_of(message), "2");
  channel->release(message);
  EXPECT_EQ(drain(*channel), (Texts{"3", "4"}));
  EXPECT_EQ(channel->stats().free_slots, 4u);
  send(*channel, "5");
  ASSERT_EQ(channel->try_recv(message), Outcome::Ok);
  EXPECT_EQ(message.sequence, 4u);
  channel->release(message);
}

TEST_F(Persistence, SomebodyElsesBootIsNotRebuiltUnderTheLiving) {
  auto first = create();
  send(*first, "1");
  send(*first, "2");
  Received held;
  ASSERT_EQ(first->try_recv(held), Outcome::Ok);
  boot();
  auto second = open();
  EXPECT_EQ(drain(*second), (Texts{"2"})) << "the first one still holds its message";
  first->release(held);
  EXPECT_EQ(second->stats().free_slots, 4u);
}

TEST_F(Persistence, WhatWasHeldIsDeliveredAgainAndFlagged) {
  in_process_that_dies([&] {
    auto* channel = new ChannelPtr(create());
    for (const char* text : {"1", "2", "3"}) send(**channel, text);
    Received message;
    return (*channel)->try_recv(message) == Outcome::Ok;
  });
  boot();
  auto channel = open();
  Received message;
  ASSERT_EQ(channel->try_recv(message), Outcome::Ok);
  EXPECT_EQ(text_of(message), "1");
  EXPECT_EQ(message.attempts, 1u);
  channel->release(message);
  EXPECT_EQ(drain(*channel), (Texts{"2", "3"}));
}

TEST_F(Persistence, WhatWasGivenBackKeepsItsAttempts) {
  {
    auto channel = create();
    send(*channel, "1");
    for (int i = 0; i < 2; ++i) {
      Received message;
      ASSERT_EQ(channel->try_recv(message), Outcome::Ok);
      channel->give_back(message);
    }
  }
  boot();
  auto channel = open();
  Received message;
  ASSERT_EQ(channel->try_recv(message), Outcome::Ok);
  EXPECT_EQ(message.attempts, 2u);
  channel->give_back(message);
  EXPECT_EQ(next(*channel), "(empty)");
  EXPECT_EQ(channel->stats().dead_letters, 1u) << "the count went on";
}

TEST_F(Persistence, WhatWasHalfWrittenIsGone) {
  in_process_that_dies([&] {
    auto* channel = new ChannelPtr(create(small(2)));
    send(**channel, "1");
    Loan loan;
    return (*channel)->try_alloc(1, 0, Backpressure::Raise, loan) == Outcome::Ok;
  });
  boot();
  auto channel = open();
  EXPECT_EQ(channel->stats().writing_slots, 0u);
  EXPECT_EQ(drain(*channel), (Texts{"1"}));
  EXPECT_EQ(channel->stats().free_slots, 2u);
}

TEST_F(Persistence, DurableGroupsOutliveTheBootWithWhatTheyHadNotTaken) {
  in_process_that_dies([&] {
    auto* channel = new ChannelPtr(create());
    auto* sub = new ChannelPtr((*channel)->subscribe(to("durable", true)));
    for (const char* text : {"1", "2", "3"}) send(**channel, text);
    Received message;
    return next(**sub) == "1" && (*sub)->try_recv(message) == Outcome::Ok && drain(**channel).size() == 3;
  });
  boot();
  auto channel = open();
  const Report report = channel->report();
  ASSERT_EQ(report.groups.size(), 2u);
  EXPECT_EQ(report.groups[1].name, "durable");
  EXPECT_TRUE(report.groups[1].durable);
  EXPECT_EQ(report.groups[1].members, 0u);
  auto sub = channel->subscribe(to("durable", true));
  Received message;
  ASSERT_EQ(sub->try_recv(message), Outcome::Ok);
  EXPECT_EQ(text_of(message), "2");
  EXPECT_EQ(message.attempts, 1u);
  sub->release(message);
  EXPECT_EQ(drain(*sub), (Texts{"3"}));
  EXPECT_EQ(next(*channel), "(empty)");
  EXPECT_EQ(channel->stats().free_slots, 4u);
}

TEST_F(Persistence, GroupsThatAreNotDurableEndWithTheBoot) {
  in_process_that_dies([&] {
    auto* channel = new ChannelPtr(create());
    auto* sub = new ChannelPtr((*channel)->subscribe(to("viewers", false)));
    send(**channel, "1");
    send(**channel, "2");
    Received message;
    return next(**channel) == "1" && (*sub)->try_recv(message) == Outcome::Ok;
  });
  boot();
  auto channel = open();
  EXPECT_EQ(channel->report().groups.size(), 1u);
  EXPECT_EQ(channel->stats().free_slots, 3u);
  EXPECT_EQ(drain(*channel), (Texts{"2"}));
  EXPECT_EQ(channel->stats().free_slots, 4u);
  auto sub = channel->subscribe(to("viewers", false));
  send(*channel, "3");
  EXPECT_EQ(drain(*sub), (Texts{"3"}));
}

TEST_F(Persistence, TheHistoryOutlivesTheBoot) {
  ChannelOptions options = small(6);
  options.history = 3;
  {
    auto channel = create(options);
    for (const char* text : {"1", "2", "3", "4", "5"}) {
      send(*channel, text);
      next(*channel);
    }
  }
  boot();
  auto channel = open();
  EXPECT_EQ(drain(*channel->subscribe(to("late", false, Start::Oldest))), (Texts{"3", "4", "5"}));
  EXPECT_EQ(next(*channel), "(empty)");
  Received latest;
  ASSERT_EQ(channel->try_read_latest(true, 0, latest), Outcome::Ok);
  EXPECT_EQ(text_of(latest), "5");
  for (const char* text : {"6", "7"}) {
    send(*channel, text);
    next(*channel);
  }
  EXPECT_EQ(drain(*channel->subscribe(to("late", false, Start::Oldest))), (Texts{"5", "6", "7"}));
  EXPECT_EQ(channel->stats().free_slots, 3u);
}

TEST_F(Persistence, DeadLettersOutliveTheBoot) {
  ChannelOptions options = small();
  options.max_deliveries = 1;
  pid_t victim = 0;
  {
    auto channel = create(options);
    auto sub = channel->subscribe(to("durable", true));
    send(*channel, "bad");
    drain(*channel);
    victim = support::die_holding([&] {
      Received message;
      sub->try_recv(message);
    });
    channel->check_peers();
    EXPECT_EQ(next(*sub), "(empty)");
    EXPECT_EQ(channel->stats().dead_letters, 1u);
  }
  boot();
  auto channel = open();
  EXPECT_EQ(channel->stats().dead_letters, 1u);
  auto sub = channel->subscribe(to("durable", true));
  EXPECT_EQ(next(*sub), "(empty)") << "it is not delivered";
  Received letter;
  DeadLetter why;
  ASSERT_EQ(channel->try_take_dead_letter(letter, why), Outcome::Ok);
  EXPECT_EQ(text_of(letter), "bad");
  EXPECT_EQ(why.group, "durable");
  EXPECT_EQ(why.last_pid, static_cast<std::uint32_t>(victim));
  EXPECT_TRUE(why.last_holder_died);
  channel->release(letter);
  EXPECT_EQ(channel->stats().free_slots, 4u);
}

TEST_F(Persistence, AChannelThatWasShutDownIsDrainedAfterTheBoot) {
  {
    auto channel = create();
    send(*channel, "1");
    channel->shutdown(false);
  }
  boot();
  auto channel = open();
  EXPECT_TRUE(channel->is_shut_down());
  EXPECT_EQ(next(*channel), "1");
  EXPECT_EQ(next(*channel), "(closed)");
}

TEST_F(Persistence, BootAfterBootKeepsTheSameMessages) {
  {
    auto channel = create();
    for (const char* text : {"1", "2", "3"}) send(*channel, text);
    channel->subscribe(to("durable", true, Start::Oldest))->close();
  }
  for (int i = 0; i < 5; ++i) {
    boot();
    open();
  }
  auto channel = open();
  EXPECT_EQ(drain(*channel), (Texts{"1", "2", "3"}));
  EXPECT_EQ(drain(*channel->subscribe(to("durable", true))), (Texts{"1", "2", "3"}));
}

// --- power loss ------------------------------------------------------------------------------------------------------

ChannelOptions synced(std::uint32_t capacity = 4, std::uint64_t slot_size = 64) {
  ChannelOptions options = small(capacity, slot_size);
  options.sync = 1;
  return options;
}

TEST_F(Persistence, APayloadOfWhichThePagesAreMissingIsFoundAndTheNextMessageArrives) {
  const std::string big(5 * 4096, 'b');
  {
    auto channel = create(synced(3, 8 * 4096));
    EXPECT_TRUE(channel->is_synced());
    EXPECT_EQ(channel->checksum(), 2) << "without it nobody could see it";
    EXPECT_EQ(send(*channel, big), Outcome::Ok);
    EXPECT_EQ(send(*channel, "good"), Outcome::Ok);
    EXPECT_EQ(send(*channel, big), Outcome::Ok);
  }
  // The third page of the first payload did not reach the disk.
  std::string content(static_cast<std::size_t>(std::filesystem::file_size(path)), '\0');
  int fd = ::open(path.c_str(), O_RDONLY | O_CLOEXEC);
  ASSERT_EQ(pread(fd, content.data(), content.size(), 0), static_cast<ssize_t>(content.size()));
  close(fd);
  const std::size_t payload = content.find(std::string(4 * 4096, 'b'));
  ASSERT_NE(payload, std::string::npos);
  const std::size_t page = (payload / 4096 + 2) * 4096;
  const std::string zeros(4096, '\0');
  write_at(page, zeros.data(), zeros.size());
  boot();
  auto channel = open();
  Received message;
  ASSERT_EQ(channel->try_recv(message), Outcome::Corrupted);
  ASSERT_NE(message.fault, nullptr);
  EXPECT_NE(std::string(message.fault).find("payload"), std::string::npos) << message.fault;
  EXPECT_EQ(next(*channel), "good");
  EXPECT_TRUE(next(*channel) == big);
  EXPECT_EQ(channel->stats().corrupted, 1u);
}

TEST_F(Persistence, SyncingWithoutTheFullChecksumIsRefused) {
  ChannelOptions options = synced();
  options.checksum = 1;
  EXPECT_EQ(code_of([&] { create(options); }), ErrorCode::InvalidArgument);
  EXPECT_NE(access(path.c_str(), F_OK), 0);
}

TEST_F(Persistence, EverySendIsOnTheDiskBeforeItReturns) {
  auto channel = create(synced());
  const int before = syncs.load();
  for (int i = 1; i <= 3; ++i) {
    EXPECT_EQ(send(*channel, "m"), Outcome::Ok);
    EXPECT_EQ(syncs.load(), before + i);
  }
  Loan loan;
  ASSERT_EQ(channel->try_alloc(1, 0, Backpressure::Raise, loan), Outcome::Ok);
  EXPECT_EQ(syncs.load(), before + 3);
  EXPECT_EQ(channel->publish(loan, kBytesMessage, 0), Outcome::Ok);
  EXPECT_EQ(syncs.load(), before + 4);
  EXPECT_EQ(send(*channel, "m"), Outcome::Full);
  EXPECT_EQ(syncs.load(), before + 4) << "what did not enter is not written";
}

TEST_F(Persistence, WithoutSyncingNothingIsWrittenToTheDisk) {
  auto channel = create();
  EXPECT_FALSE(channel->is_synced());
  EXPECT_EQ(send(*channel, "m"), Outcome::Ok);
  EXPECT_EQ(syncs.load(), 0);
}

TEST_F(Persistence, AMessageThatTheDiskRefusesEnteredAndTheSenderIsTold) {
  auto channel = create(synced());
  sync_failure = EIO;
  syncs_that_fail = 2;
  EXPECT_EQ(send(*channel, "1"), Outcome::NotSynced);
  EXPECT_EQ(channel->send("2", 1, Backpressure::Block, support::patience()), Outcome::NotSynced);
  EXPECT_EQ(send(*channel, "3"), Outcome::Ok);
  EXPECT_EQ(drain(*channel), (Texts{"1", "2", "3"}));
}

TEST_F(Persistence, AnInterruptedWriteIsTriedAgain) {
  auto channel = create(synced());
  const int before = syncs.load();
  sync_failure = EINTR;
  syncs_that_fail = 3;
  EXPECT_EQ(send(*channel, "1"), Outcome::Ok);
  EXPECT_EQ(syncs.load(), before + 4);
}

TEST_F(Persistence, BytesThatNoDiskHoldsAreSyncedAtOnce) {
  sync_failure = EIO;
  syncs_that_fail = 1000;
  EXPECT_EQ(send(*Channel::create_anonymous(synced()), "1"), Outcome::Ok);
  EXPECT_EQ(send(*Channel::create_heap(synced()), "1"), Outcome::Ok);
  EXPECT_EQ(syncs.load(), 0);
}

}  // namespace
}  // namespace dsline
