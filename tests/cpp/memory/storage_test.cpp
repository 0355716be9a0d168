// One conformance suite for every storage: what Storage promises, each of the four keeps.
#include "memory/storage.hpp"

#include <fcntl.h>
#include <gtest/gtest.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cerrno>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <string>
#include <vector>

#include "dsline/error.hpp"
#include "memory/layout.hpp"

namespace dsline::memory {
namespace {

constexpr std::uint64_t kBytes = 1 << 20;

struct Backend {
  const char* name;
  std::function<std::unique_ptr<Storage>()> make;
  bool crosses_processes;
};

std::unique_ptr<Storage> make_unlinked_file(const char* directory, StorageKind kind) {
  std::string path = std::string(directory) + "/dsline-storage-test-XXXXXX";
  int fd = mkstemp(path.data());
  EXPECT_GE(fd, 0);
  unlink(path.c_str());
  return make_file_storage(fd, kind, path);
}

class StorageConformance : public testing::TestWithParam<Backend> {
 protected:
  void SetUp() override {
    storage = GetParam().make();
    storage->resize(kBytes);
    storage->reserve(0, kBytes, "the test");
  }
  std::unique_ptr<Storage> storage;
};

TEST_P(StorageConformance, HasTheSizeItWasGiven) { EXPECT_EQ(storage->size(), kBytes); }

TEST_P(StorageConformance, NewBytesAreZero) {
  std::byte* at = storage->map(0, kBytes, Access::ReadOnly);
  for (std::uint64_t i = 0; i < kBytes; i += 512) ASSERT_EQ(at[i], std::byte{0}) << i;
  storage->unmap(at, kBytes);
}

TEST_P(StorageConformance, TwoMappingsShowTheSameBytes) {
  std::byte* writer = storage->map(4096, 8192, Access::ReadWrite);
  std::byte* reader = storage->map(4096, 8192, Access::ReadOnly);
  writer[5000] = std::byte{42};
  EXPECT_EQ(reader[5000], std::byte{42});
  storage->unmap(writer, 8192);
  storage->unmap(reader, 8192);
}

TEST_P(StorageConformance, ReservingAgainKeepsTheContent) {
  std::byte* at = storage->map(0, kBytes, Access::ReadWrite);
  std::memset(at, 7, kBytes);
  storage->reserve(0, kBytes, "the test");
  storage->reserve(4096, 100, "the test");
  for (std::uint64_t i = 0; i < kBytes; i += 512) ASSERT_EQ(at[i], std::byte{7}) << i;
  storage->unmap(at, kBytes);
}

TEST_P(StorageConformance, GivenBackPagesReadAsZeroAndCanBeReservedAgain) {
  std::byte* at = storage->map(0, kBytes, Access::ReadWrite);
  std::memset(at, 7, kBytes);
  storage->give_back(65536, 65536);
  EXPECT_EQ(at[65535], std::byte{7});
  EXPECT_EQ(at[65536], std::byte{0});
  EXPECT_EQ(at[131072], std::byte{7});
  storage->reserve(65536, 65536, "the test");
  at[70000] = std::byte{9};
  EXPECT_EQ(at[70000], std::byte{9});
  storage->unmap(at, kBytes);
}

TEST_P(StorageConformance, MoreThanThereIsIsRefusedBeforeAByteIsWritten) {
  try {
    storage->check_room(std::uint64_t{1} << 50, "a petabyte");
    FAIL() << "a petabyte was promised";
  } catch (const Error& error) {
    EXPECT_EQ(error.code(), ErrorCode::SharedMemoryFull);
    EXPECT_NE(std::string(error.what()).find("a petabyte"), std::string::npos) << error.what();
    EXPECT_NE(std::string(error.what()).find("free"), std::string::npos) << error.what();
  }
}

TEST_P(StorageConformance, ALockIsReleasedByUnlockAndByDropLocks) {
  ASSERT_TRUE(storage->try_lock(3));
  storage->unlock(3);
  ASSERT_TRUE(storage->try_lock(3));
  storage->drop_locks();
}

TEST_P(StorageConformance, ItsLocksExcludeAnotherObjectOverTheSameBytes) {
  if (!GetParam().crosses_processes) return;  // the only object over its bytes
  std::unique_ptr<Storage> other = make_file_storage(dup(storage->descriptor()), storage->kind(), "other");
  ASSERT_TRUE(storage->try_lock(3));
  EXPECT_TRUE(other->is_locked(3));
  EXPECT_FALSE(storage->is_locked(3)) << "an own lock is not somebody else's";
  EXPECT_FALSE(other->try_lock(3));
  EXPECT_TRUE(other->try_lock(4));
  storage->unlock(3);
  EXPECT_TRUE(other->try_lock(3));
}

TEST_P(StorageConformance, TheKernelDropsTheLocksOfAKilledProcess) {
  if (!GetParam().crosses_processes) return;
  int ready[2];
  ASSERT_EQ(pipe(ready), 0);
  pid_t child = fork();
  if (child == 0) {
    storage->renew_locks();
    char ok = storage->try_lock(5) ? 'y' : 'n';
    if (write(ready[1], &ok, 1) != 1) _exit(1);
    for (;;) pause();
  }
  char answer = 0;
  ASSERT_EQ(read(ready[0], &answer, 1), 1);
  EXPECT_EQ(answer, 'y');
  EXPECT_FALSE(storage->try_lock(5));
  kill(child, SIGKILL);
  ASSERT_EQ(waitpid(child, nullptr, 0), child);
  EXPECT_TRUE(storage->try_lock(5));
  close(ready[0]);
  close(ready[1]);
}

TEST_P(StorageConformance, AForkedChildDoesNotKeepTheParentsLock) {
  if (!GetParam().crosses_processes) return;
  ASSERT_TRUE(storage->try_lock(6));
  int gone[2];
  int running[2];
  ASSERT_EQ(pipe(gone), 0);
  ASSERT_EQ(pipe(running), 0);
  pid_t child = fork();
  if (child == 0) {
    close(gone[1]);
    char byte = 0;
    if (write(running[1], &byte, 1) != 1) _exit(1);
    [[maybe_unused]] ssize_t n = read(gone[0], &byte, 1);  // until the parent closes its end
    _exit(0);
  }
  close(gone[0]);
  char byte = 0;
  ASSERT_EQ(read(running[0], &byte, 1), 1) << "until it runs, a new child has every descriptor of its parent";
  close(running[0]);
  close(running[1]);
  int fd = dup(storage->descriptor());
  storage->drop_locks();
  std::unique_ptr<Storage> other = make_file_storage(fd, storage->kind(), "other");
  EXPECT_TRUE(other->try_lock(6)) << "the child still holds a copy of the lock's description";
  close(gone[1]);
  waitpid(child, nullptr, 0);
}

TEST_P(StorageConformance, AnotherObjectShowsTheSameBytesAndOutlivesTheFirst) {
  std::byte* mine = storage->map(0, kBytes, Access::ReadWrite);
  std::unique_ptr<Storage> other = storage->again();
  EXPECT_EQ(other->kind(), storage->kind());
  EXPECT_EQ(other->size(), kBytes);
  std::byte* theirs = other->map(0, kBytes, Access::ReadWrite);
  mine[777] = std::byte{1};
  EXPECT_EQ(theirs[777], std::byte{1});
  theirs[778] = std::byte{2};
  EXPECT_EQ(mine[778], std::byte{2});
  storage->unmap(mine, kBytes);
  storage.reset();
  EXPECT_EQ(theirs[777], std::byte{1});
  std::unique_ptr<Storage> third = other->again();
  std::byte* last = third->map(0, kBytes, Access::ReadOnly);
  EXPECT_EQ(last[778], std::byte{2});
  third->unmap(last, kBytes);
  other->unmap(theirs, kBytes);
}

TEST_P(StorageConformance, LocksOfTwoObjectsExcludeEachOther) {
  std::unique_ptr<Storage> other = storage->again();
  ASSERT_TRUE(storage->try_lock(3));
  EXPECT_TRUE(storage->try_lock(3)) << "it is this object's";
  EXPECT_TRUE(other->is_locked(3));
  EXPECT_FALSE(storage->is_locked(3)) << "an own lock is not somebody else's";
  EXPECT_FALSE(other->try_lock(3));
  other->unlock(3);  // not its to give up
  EXPECT_TRUE(other->is_locked(3));
  EXPECT_TRUE(other->try_lock(4));
  EXPECT_TRUE(storage->is_locked(4));
  storage->unlock(3);
  EXPECT_FALSE(other->is_locked(3));
  EXPECT_TRUE(other->try_lock(3));
  other->drop_locks();
  EXPECT_FALSE(storage->is_locked(3));
  EXPECT_FALSE(storage->is_locked(4));
  if (GetParam().crosses_processes) other->renew_locks();
  ASSERT_TRUE(other->try_lock(kControlLock));
  other.reset();
  EXPECT_TRUE(storage->try_lock(kControlLock)) << "locks go with their object";
}

TEST_P(StorageConformance, TheFirstBytesAreReadWithoutAMapping) {
  std::byte* at = storage->map(0, kBytes, Access::ReadWrite);
  for (std::uint64_t i = 0; i < 5000; ++i) at[i] = static_cast<std::byte>(i * 7);
  std::vector<std::byte> copy(5001, std::byte{0xEE});
  ASSERT_EQ(storage->read_start(copy.data(), 5000), 5000u);
  EXPECT_EQ(std::memcmp(copy.data(), at, 5000), 0);
  EXPECT_EQ(copy[5000], std::byte{0xEE});
  storage->unmap(at, kBytes);
  std::vector<std::byte> all(2 * kBytes);
  EXPECT_EQ(storage->read_start(all.data(), all.size()), kBytes) << "no more than there is";
}

TEST_P(StorageConformance, SyncingKeepsTheContent) {
  std::byte* at = storage->map(0, kBytes, Access::ReadWrite);
  std::memset(at, 9, kBytes);
  EXPECT_TRUE(storage->sync());
  EXPECT_EQ(at[kBytes - 1], std::byte{9});
  storage->unmap(at, kBytes);
}

INSTANTIATE_TEST_SUITE_P(
    Every, StorageConformance,
    testing::Values(Backend{"heap", [] { return make_heap_storage(); }, false},
                    Backend{"memfd", [] { return make_memfd_storage(); }, true},
                    Backend{"shm", [] { return make_unlinked_file("/dev/shm", StorageKind::PosixShm); },
                            true},
                    Backend{"file", [] { return make_unlinked_file("/tmp", StorageKind::File); }, true}),
    [](const testing::TestParamInfo<Backend>& info) { return std::string(info.param.name); });

TEST(FileStorage, AFileThatCannotBeWrittenToTheDiskSaysSo) {
  // A pipe has no disk behind it: fdatasync refuses it.
  int ends[2];
  ASSERT_EQ(pipe(ends), 0);
  std::unique_ptr<Storage> storage = make_unlinked_file("/tmp", StorageKind::File);
  ASSERT_EQ(dup2(ends[0], storage->descriptor()), storage->descriptor());
  EXPECT_FALSE(storage->sync());
  EXPECT_EQ(errno, EINVAL);
  close(ends[0]);
  close(ends[1]);
}

TEST(FileStorage, AShortFileGivesWhatItHas) {
  std::unique_ptr<Storage> storage = make_unlinked_file("/tmp", StorageKind::File);
  std::byte bytes[16];
  EXPECT_EQ(storage->read_start(bytes, sizeof bytes), 0u);
  storage->resize(5);
  EXPECT_EQ(storage->read_start(bytes, sizeof bytes), 5u);
}

TEST(MemfdStorage, ItsSizeIsSealed) {
  std::unique_ptr<Storage> storage = make_memfd_storage();
  storage->resize(kBytes);
  EXPECT_NE(ftruncate(storage->descriptor(), 0), 0);
  EXPECT_NE(ftruncate(storage->descriptor(), 2 * kBytes), 0);
}

TEST(MemfdStorage, ADescriptorThatIsNotSealedIsNotAdopted) {
  char path[] = "/tmp/dsline-storage-test-XXXXXX";
  int fd = mkstemp(path);
  unlink(path);
  EXPECT_THROW(adopt_memfd_storage(fd), Error);
}

}  // namespace
}  // namespace dsline::memory
