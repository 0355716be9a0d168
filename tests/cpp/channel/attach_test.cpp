#include "channel/attach.hpp"

#include <fcntl.h>
#include <gtest/gtest.h>
#include <signal.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cstddef>
#include <fstream>
#include <functional>
#include <thread>
#include <vector>

#include "dsline/metadata.hpp"
#include "memory/layout.hpp"
#include "support/channels.hpp"

namespace dsline {
namespace {

using support::code_of;
using support::Folder;
using support::Name;
using support::next;
using support::send;
using support::small;

/// Runs `work` in a child that ends without closing anything.
void in_process_that_dies(const std::function<void()>& work) {
  pid_t child = fork();
  if (child == 0) {
    try {
      work();
    } catch (...) {
      _exit(1);
    }
    _exit(0);
  }
  int status = -1;
  waitpid(child, &status, 0);
  EXPECT_EQ(status, 0);
}

void overwrite(const std::string& path, std::size_t offset, const void* bytes, std::size_t size) {
  int fd = open(path.c_str(), O_RDWR | O_CLOEXEC);
  ASSERT_GE(fd, 0);
  ASSERT_EQ(pwrite(fd, bytes, size, static_cast<off_t>(offset)), static_cast<ssize_t>(size));
  close(fd);
}

ChannelOptions with(OnStale on_stale, ChannelOptions options = small()) {
  options.on_stale = on_stale;
  return options;
}

std::shared_ptr<Channel> named(const std::string& name, const ChannelOptions& options = small(),
                               OpenMode mode = OpenMode::OpenOrCreate) {
  return Channel::open_named(name, options, mode);
}

TEST(NamedChannel, TheSecondOpenerGetsTheFirstOnesChannel) {
  Name name;
  auto first = named(name);
  auto second = named(name, {}, OpenMode::Open);
  EXPECT_EQ(first->uuid(), second->uuid());
  EXPECT_EQ(second->capacity(), 4u);
  EXPECT_EQ(second->storage(), "shm");
  EXPECT_EQ(second->path(), name.path());
  send(*first, "a");
  EXPECT_EQ(next(*second), "a");
}

TEST(NamedChannel, OpeningWhatDoesNotExistSaysSo) {
  Name name;
  std::string why;
  EXPECT_EQ(code_of([&] { named(name, {}, OpenMode::Open); }, &why), ErrorCode::ChannelNotFound);
  EXPECT_NE(why.find(static_cast<const std::string&>(name)), std::string::npos) << why;
  EXPECT_FALSE(name.exists());
}

TEST(NamedChannel, CreatingWhatIsAliveIsRefused) {
  Name name;
  auto first = named(name);
  EXPECT_EQ(code_of([&] { named(name, small(), OpenMode::Create); }), ErrorCode::ChannelExists);
  EXPECT_EQ(send(*first, "a"), Outcome::Ok);
}

TEST(NamedChannel, EveryOptionThatDiffersFromTheLiveChannelIsNamed) {
  Name name;
  auto first = named(name);
  ChannelOptions other;
  other.capacity = 5;
  other.slot_size = 65;
  other.max_message_size = 66;
  other.max_handles = 17;
  other.checksum = 2;
  std::string why;
  EXPECT_EQ(code_of([&] { named(name, other); }, &why), ErrorCode::ChannelMismatch);
  for (const char* part : {"capacity=5", "has 4", "slot_size=65", "has 64", "max_message_size=66",
                           "max_handles=17", "has 16", "checksum=full", "has header"}) {
    EXPECT_NE(why.find(part), std::string::npos) << part << " in: " << why;
  }
  EXPECT_NO_THROW(named(name, small()));
  EXPECT_NO_THROW(named(name, {}));
}

TEST(NamedChannel, ABadNameMakesNoFile) {
  EXPECT_EQ(code_of([&] { named("../cpptest-evil"); }), ErrorCode::InvalidArgument);
  EXPECT_NE(access((channel_directory() + "/../cpptest-evil").c_str(), F_OK), 0);
}

TEST(NamedChannel, TheModeOfTheFileIsTheOneAskedFor) {
  Name name;
  auto channel = named(name);
  struct stat info {};
  ASSERT_EQ(stat(name.path().c_str(), &info), 0);
  EXPECT_EQ(info.st_mode & 0777, 0600u);
}

TEST(NamedChannel, TheLastCloseTakesTheNameAlongAndNoEarlierOne) {
  Name name;
  auto first = named(name);
  auto second = named(name);
  first->close();
  EXPECT_TRUE(name.exists());
  second->close();
  EXPECT_FALSE(name.exists());
}

TEST(NamedChannel, DestroyingTheLastHandleTakesTheNameAlong) {
  Name name;
  named(name).reset();
  EXPECT_FALSE(name.exists());
}

TEST(NamedChannel, QueuedMessagesKeepTheNameAndTheNextOneReceivesThem) {
  Name name;
  auto channel = named(name);
  std::string uuid = channel->uuid();
  send(*channel, "a");
  channel->close();
  EXPECT_TRUE(name.exists());
  channel = named(name, {}, OpenMode::Open);
  EXPECT_EQ(channel->uuid(), uuid);
  EXPECT_EQ(next(*channel), "a");
  channel->close();
  EXPECT_FALSE(name.exists());
}

TEST(NamedChannel, AShutDownChannelLosesItsNameWithItsLastHandleEvenWithMessagesInIt) {
  Name name;
  auto channel = named(name);
  send(*channel, "a");
  channel->shutdown(false);
  channel->close();
  EXPECT_FALSE(name.exists());
}

TEST(NamedChannel, UnlinkFreesTheNameAndTheHandlesGoOn) {
  Name name;
  auto first = named(name);
  auto second = named(name);
  first->unlink();
  EXPECT_FALSE(name.exists());
  auto third = named(name, small(), OpenMode::Create);
  EXPECT_NE(third->uuid(), first->uuid());
  send(*first, "a");
  EXPECT_EQ(next(*third), "(empty)");
  EXPECT_EQ(next(*second), "a");
  first->close();
  second->close();
  EXPECT_TRUE(name.exists()) << "the name belongs to the new channel";
}

TEST(NamedChannel, UnlinkAfterCloseStillRemovesANameWithMessages) {
  Name name;
  auto channel = named(name);
  send(*channel, "a");
  channel->close();
  channel->unlink();
  EXPECT_FALSE(name.exists());
}

TEST(NamedChannel, AnAnonymousChannelHasNoNameToRemove) {
  auto channel = Channel::create_anonymous(small());
  EXPECT_EQ(code_of([&] { channel->unlink(); }), ErrorCode::InvalidArgument);
}

TEST(NamedChannel, MessagesOfADeadSenderAreReceived) {
  Name name;
  in_process_that_dies([&] { send(*named(name), "a"); });
  auto channel = named(name);
  EXPECT_EQ(next(*channel), "a");
  EXPECT_EQ(channel->stats().participants, 1u);
}

TEST(NamedChannel, AStaleNameIsResetRaisedOrRecoveredAsAsked) {
  Name name;
  auto leave_stale = [&name] {
    in_process_that_dies([&name] {
      auto* channel = new std::shared_ptr<Channel>(named(name));
      send(**channel, "a");
    });
  };
  leave_stale();
  EXPECT_EQ(code_of([&] { named(name, with(OnStale::Raise)); }), ErrorCode::ChannelExists);
  EXPECT_EQ(next(*named(name, with(OnStale::Recover))), "a");
  leave_stale();
  EXPECT_EQ(next(*named(name, with(OnStale::Reset))), "(empty)");
}

TEST(NamedChannel, AStaleEmptyChannelOfAnotherGeometryIsReplacedAndAFullOneIsNot) {
  Name name;
  in_process_that_dies([&] { new std::shared_ptr<Channel>(named(name)); });
  EXPECT_EQ(named(name, small(9))->capacity(), 9u);
  in_process_that_dies([&] {
    auto* channel = new std::shared_ptr<Channel>(named(name));
    send(**channel, "a");
  });
  EXPECT_EQ(code_of([&] { named(name, small(9)); }), ErrorCode::ChannelMismatch);
}

TEST(NamedChannel, ADamagedOrOlderRegionThatNobodyUsesIsReplaced) {
  Name name;
  for (std::size_t offset :
       {offsetof(memory::RegionHeader, layout_version), offsetof(memory::RegionHeader, uuid)}) {
    in_process_that_dies([&] { new std::shared_ptr<Channel>(named(name)); });
    std::uint32_t bad = 0x7777;
    overwrite(name.path(), offset, &bad, sizeof bad);
    EXPECT_EQ(code_of([&] { named(name, {}, OpenMode::Open); }), ErrorCode::ChannelLayout) << offset;
    auto channel = named(name);
    EXPECT_EQ(send(*channel, "a"), Outcome::Ok);
    EXPECT_EQ(next(*channel), "a");
  }
}

std::string schema_of(std::int64_t length) {
  frames::MetadataBuilder builder;
  builder.add_dtype(std::string("f\1\0\0\4\0\0\0", 8));
  builder.add_shape(&length, 1);
  return builder.bytes();
}

ChannelOptions typed(const std::string& schema) {
  ChannelOptions options = small();
  options.schema = schema;
  return options;
}

TEST(NamedChannel, TheSchemaIsTheCreatorsAndAnotherOneIsRefusedWithIt) {
  Name name;
  auto channel = named(name, typed(schema_of(3)));
  EXPECT_EQ(channel->schema(), schema_of(3));
  EXPECT_EQ(named(name)->schema(), schema_of(3)) << "not given: that of the channel";
  EXPECT_EQ(named(name, typed(schema_of(3)))->schema(), schema_of(3));
  EXPECT_EQ(channel->again()->schema(), schema_of(3));
  SubscribeOptions group;
  group.group = "g";
  EXPECT_EQ(channel->subscribe(group)->schema(), schema_of(3));
  for (OpenMode mode : {OpenMode::OpenOrCreate, OpenMode::Open}) {
    try {
      named(name, typed(schema_of(4)), mode);
      FAIL() << "another schema was taken";
    } catch (const Error& error) {
      EXPECT_EQ(error.code(), ErrorCode::SchemaMismatch);
      EXPECT_EQ(error.detail(), schema_of(3));
    }
  }
  EXPECT_EQ(channel->stats().participants, 1u);
}

TEST(NamedChannel, AChannelWithoutASchemaDoesNotGetOneLater) {
  Name name;
  auto channel = named(name);
  EXPECT_EQ(channel->schema(), "");
  EXPECT_EQ(code_of([&] { named(name, typed(schema_of(3))); }), ErrorCode::SchemaMismatch);
}

TEST(NamedChannel, AStaleEmptyChannelOfAnotherSchemaIsReplacedAndAFullOneIsNot) {
  Name name;
  in_process_that_dies([&] { new std::shared_ptr<Channel>(named(name, typed(schema_of(3)))); });
  EXPECT_EQ(named(name, typed(schema_of(4)))->schema(), schema_of(4));
  in_process_that_dies([&] {
    auto* channel = new std::shared_ptr<Channel>(named(name, typed(schema_of(3))));
    send(**channel, "a");
  });
  EXPECT_EQ(code_of([&] { named(name, typed(schema_of(4))); }), ErrorCode::SchemaMismatch);
  EXPECT_EQ(named(name)->schema(), schema_of(3));
}

TEST(NamedChannel, ASchemaThatDescribesNothingIsDamage) {
  Name name;
  for (const std::string& nonsense : {std::string("nonsense"), std::string(16, '\0')}) {
    in_process_that_dies([&] { new std::shared_ptr<Channel>(named(name, typed(nonsense))); });
    std::string why;
    EXPECT_EQ(code_of([&] { named(name, {}, OpenMode::Open); }, &why), ErrorCode::ChannelLayout);
    EXPECT_NE(why.find("describes no array"), std::string::npos) << why;
    EXPECT_EQ(named(name)->schema(), "") << "replaced, as any damaged one that nobody has open";
    auto anonymous = Channel::create_anonymous(typed(nonsense));
    EXPECT_EQ(code_of([&] { Channel::adopt_anonymous(dup(anonymous->descriptor())); }),
              ErrorCode::ChannelLayout);
  }
  in_process_that_dies([&] { new std::shared_ptr<Channel>(named(name, typed(schema_of(3)))); });
  const char bad = 0x55;
  overwrite(name.path(), memory::kSchemaOffset + 3, &bad, 1);
  EXPECT_EQ(code_of([&] { named(name, {}, OpenMode::Open); }), ErrorCode::ChannelLayout);
  EXPECT_EQ(named(name)->schema(), "");
}

TEST(NamedChannel, TheDefaultSlotSizeIsForCreatorsOnly) {
  Name name;
  ChannelOptions options;
  options.capacity = 4;
  options.default_slot_size = 12345;
  auto channel = named(name, options);
  EXPECT_EQ(channel->slot_size(), 12345u);
  options.default_slot_size = 999;
  EXPECT_EQ(named(name, options)->slot_size(), 12345u);
}

TEST(NamedChannel, ADamagedRegionThatIsInUseIsNotTakenAway) {
  Name name;
  auto channel = named(name);
  std::uint32_t bad = 0x7777;
  overwrite(name.path(), offsetof(memory::RegionHeader, uuid), &bad, sizeof bad);
  std::string why;
  EXPECT_EQ(code_of([&] { named(name); }, &why), ErrorCode::ChannelLayout);
  EXPECT_NE(why.find("attached"), std::string::npos) << why;
  EXPECT_TRUE(name.exists());
}

TEST(NamedChannel, ATruncatedRegionIsDamagedAndReplaced) {
  Name name;
  in_process_that_dies([&] { new std::shared_ptr<Channel>(named(name)); });
  ASSERT_EQ(truncate(name.path().c_str(), 4096), 0);
  EXPECT_EQ(code_of([&] { named(name, {}, OpenMode::Open); }), ErrorCode::ChannelLayout);
  EXPECT_NO_THROW(named(name));
}

TEST(NamedChannel, AFileThatIsNotOursIsNeverRemoved) {
  Name name;
  named(name).reset();  // makes the directory
  std::ofstream(name.path()) << "somebody's notes";
  for (OpenMode mode : {OpenMode::OpenOrCreate, OpenMode::Create, OpenMode::Open}) {
    EXPECT_EQ(code_of([&] { named(name, with(OnStale::Reset), mode); }), ErrorCode::ChannelLayout);
  }
  std::ofstream(name.path(), std::ios::trunc);
  EXPECT_EQ(code_of([&] { named(name); }), ErrorCode::ChannelLayout) << "an empty file";
  EXPECT_TRUE(name.exists());
}

TEST(NamedChannel, RacingOpenersAllGetOneChannel) {
  Name name;
  for (int round = 0; round < 20; ++round) {
    std::vector<std::shared_ptr<Channel>> channels(4);
    std::vector<std::thread> openers;
    for (auto& channel : channels) openers.emplace_back([&] { channel = named(name); });
    for (std::thread& opener : openers) opener.join();
    for (auto& channel : channels) EXPECT_EQ(channel->uuid(), channels[0]->uuid());
    EXPECT_EQ(channels[0]->stats().participants, 4u);
    for (auto& channel : channels) channel.reset();
    EXPECT_FALSE(name.exists());
  }
}

TEST(NamedChannel, OfRacingCreatorsOneWins) {
  Name name;
  for (int round = 0; round < 20; ++round) {
    std::shared_ptr<Channel> channels[3];
    base::Atomic<int> refused{0};
    std::vector<std::thread> creators;
    for (auto& channel : channels) {
      creators.emplace_back([&] {
        try {
          channel = named(name, small(), OpenMode::Create);
        } catch (const Error& error) {
          EXPECT_EQ(error.code(), ErrorCode::ChannelExists) << error.what();
          ++refused;
        }
      });
    }
    for (std::thread& creator : creators) creator.join();
    EXPECT_EQ(refused.load(), 2);
  }
}

TEST(NamedChannel, OpeningWhileOthersCloseAlwaysGivesAChannelThatWorks) {
  Name name;
  base::Atomic<int> failures{0};
  std::vector<std::thread> users;
  for (int i = 0; i < 3; ++i) {
    users.emplace_back([&] {
      for (int round = 0; round < 60; ++round) {
        try {
          auto channel = named(name);
          failures += send(*channel, "m") != Outcome::Ok;
          Received message;
          failures += channel->recv(message, support::patience()) != Outcome::Ok;
          channel->release(message);
        } catch (const Error& error) {
          ADD_FAILURE() << error.what();
        }
      }
    });
  }
  for (std::thread& user : users) user.join();
  EXPECT_EQ(failures.load(), 0);
  EXPECT_FALSE(name.exists());
}

TEST(FileChannel, OutlivesItsHandlesWithWhatIsInIt) {
  Folder folder;
  std::string path = folder / "queue";
  auto channel = Channel::open_file(path, small(), OpenMode::Create);
  EXPECT_EQ(channel->storage(), "file");
  send(*channel, "a");
  Received message;
  channel->try_recv(message);
  channel->give_back(message);
  channel.reset();
  channel = Channel::open_file(path, {}, OpenMode::Open);
  ASSERT_EQ(channel->try_recv(message), Outcome::Ok);
  EXPECT_EQ(message.attempts, 1u);
  channel->release(message);
  channel.reset();
  EXPECT_EQ(access(path.c_str(), F_OK), 0) << "a file stays, also when it is empty";
}

TEST(FileChannel, OpeningWhatDoesNotExistSaysSo) {
  Folder folder;
  EXPECT_EQ(code_of([&] { Channel::open_file(folder / "none", {}, OpenMode::Open); }),
            ErrorCode::ChannelNotFound);
}

TEST(FileChannel, CreatingOverAFileIsRefusedUnlessItIsReset) {
  Folder folder;
  std::string path = folder / "queue";
  Channel::open_file(path, small(), OpenMode::Create).reset();
  EXPECT_EQ(code_of([&] { Channel::open_file(path, small(), OpenMode::Create); }), ErrorCode::ChannelExists);
  auto channel = Channel::open_file(path, with(OnStale::Reset, small(7)), OpenMode::Create);
  EXPECT_EQ(channel->capacity(), 7u);
}

TEST(FileChannel, ADamagedFileIsNotReplacedWithoutBeingAsked) {
  Folder folder;
  std::string path = folder / "queue";
  Channel::open_file(path, small(), OpenMode::Create).reset();
  std::uint32_t bad = 0x7777;
  overwrite(path, offsetof(memory::RegionHeader, uuid), &bad, sizeof bad);
  EXPECT_EQ(code_of([&] { Channel::open_file(path, small(), OpenMode::OpenOrCreate); }),
            ErrorCode::ChannelLayout);
  EXPECT_NO_THROW(Channel::open_file(path, with(OnStale::Reset), OpenMode::OpenOrCreate));
}

TEST(FileChannel, AFileFromAnotherBootIsRebuiltAndItsMessagesArrive) {
  Folder folder;
  std::string path = folder / "queue";
  in_process_that_dies([&] {
    auto& channel = *new std::shared_ptr<Channel>(Channel::open_file(path, small(), OpenMode::Create));
    for (const char* text : {"a", "b", "c"}) send(*channel, text);
    Received message;
    channel->try_recv(message);
  });
  unsigned char boot[16] = {1, 2, 3};
  overwrite(path, offsetof(memory::RegionHeader, boot_id), boot, sizeof boot);
  auto channel = Channel::open_file(path, {}, OpenMode::Open);
  Received message;
  ASSERT_EQ(channel->try_recv(message), Outcome::Ok);
  EXPECT_EQ(support::text_of(message), "a");
  EXPECT_EQ(message.attempts, 1u);
  channel->release(message);
  EXPECT_EQ(next(*channel), "b");
  EXPECT_EQ(next(*channel), "c");
  EXPECT_EQ(channel->stats().participants, 1u);
  EXPECT_EQ(channel->stats().free_slots, 4u);
}

}  // namespace
}  // namespace dsline
