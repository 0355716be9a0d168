#include "memory/file_storage.hpp"

#include <fcntl.h>
#include <signal.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <vector>

#include "base/process.hpp"
#include "dsline/error.hpp"
#include "memory/budget.hpp"

namespace dsline::memory {
namespace {

// Lock bytes lie beyond any file's end; they are names for the kernel, not bytes. No two are neighbours: the kernel
// joins the locks of neighbours into one range, and needs memory to drop one out of its middle, which it may not have.
constexpr off_t kLockBase = off_t{1} << 61;
constexpr off_t kLockDistance = 2;
// A lock that the kernel has no memory for, or that a signal came between, is asked for again.
constexpr int kLockTries = 3;
constexpr int kUnlockTries = 1000;

struct flock lock_of(std::uint32_t byte, short type) noexcept {
  struct flock lock {};
  lock.l_type = type;
  lock.l_whence = SEEK_SET;
  lock.l_start = kLockBase + kLockDistance * byte;
  lock.l_len = 1;
  return lock;
}

// fallocate on tmpfs undoes a long reservation when a signal comes in, so signals wait until it is done.
class SignalsBlocked {
 public:
  SignalsBlocked() {
    sigset_t all;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before_);
  }
  ~SignalsBlocked() { pthread_sigmask(SIG_SETMASK, &before_, nullptr); }

 private:
  sigset_t before_;
};

// For file systems without fallocate: adding zeros to every block allocates it and keeps its content, because
// nobody but the caller may touch the range.
int allocate_by_writing(int fd, std::uint64_t offset, std::uint64_t length) noexcept {
  constexpr std::uint64_t kBlock = 4096;
  for (std::uint64_t at = offset & ~(kBlock - 1); at < offset + length; at += kBlock) {
    char byte = 0;
    if (pread(fd, &byte, 1, static_cast<off_t>(at)) < 0) return errno;
    if (pwrite(fd, &byte, 1, static_cast<off_t>(at)) != 1) return errno == 0 ? ENOSPC : errno;
  }
  return 0;
}

}  // namespace

const char* storage_name(StorageKind kind) noexcept {
  switch (kind) {
    case StorageKind::Heap:
      return "heap";
    case StorageKind::File:
      return "file";
    case StorageKind::PosixShm:
      return "shm";
    case StorageKind::Memfd:
      return "memfd";
  }
  return "unknown";
}

FileStorage::FileStorage(base::Descriptor fd, StorageKind kind, std::string path)
    : data_fd_(std::move(fd)), kind_(kind), path_(std::move(path)) {
  open_lock_descriptor();
}

FileStorage::~FileStorage() { drop_locks(); }

// A lock belongs to an open file description, and dup() shares it; opening through /proc makes a new one, also
// for files that have lost their name.
void FileStorage::open_lock_descriptor() {
  char path[48];
  snprintf(path, sizeof path, "/proc/self/fd/%d", data_fd_.get());
  int fd = base::open_closed_in_child(path, O_RDWR);
  if (fd < 0) {
    throw Error(ErrorCode::System,
                path_ + ": no second descriptor for the locks of this handle (" + strerror(errno) +
                    "); /proc must be mounted and the limit of open files (ulimit -n) not reached",
                errno);
  }
  lock_fd_ = fd;
  lock_generation_ = base::fork_generation();
}

void FileStorage::renew_locks() {
  if (lock_fd_ >= 0 && lock_generation_ == base::fork_generation()) return;
  lock_fd_ = -1;  // the fork handler has closed it
  open_lock_descriptor();
}

void FileStorage::drop_locks() noexcept {
  if (lock_fd_ < 0) return;
  // In a forked child the number may already belong to another file.
  if (lock_generation_ == base::fork_generation()) base::close_closed_in_child(lock_fd_);
  lock_fd_ = -1;
}

std::uint64_t FileStorage::size() const {
  struct stat info {};
  if (fstat(data_fd_.get(), &info) != 0)
    throw Error(ErrorCode::System, path_ + ": cannot be examined", errno);
  return static_cast<std::uint64_t>(info.st_size);
}

// The data descriptor may be shared: it carries no lock.
std::unique_ptr<Storage> FileStorage::again() const {
  base::Descriptor fd = fcntl(data_fd_.get(), F_DUPFD_CLOEXEC, 0);
  if (!fd) {
    throw Error(ErrorCode::System,
                path_ + ": no descriptor for another handle (" + strerror(errno) +
                    "); the limit of open files (ulimit -n) is reached",
                errno);
  }
  if (kind_ == StorageKind::Memfd) return adopt_memfd_storage(std::move(fd));
  return make_file_storage(std::move(fd), kind_, path_);
}

std::uint64_t FileStorage::read_start(void* to, std::uint64_t bytes) const noexcept {
  const ssize_t got = pread(data_fd_.get(), to, bytes, 0);
  return got > 0 ? static_cast<std::uint64_t>(got) : 0;
}

bool FileStorage::sync() noexcept {
  if (kind_ != StorageKind::File) return true;
  int result = 0;
  do {
    result = fdatasync(data_fd_.get());
  } while (result != 0 && errno == EINTR);
  return result == 0;
}

void FileStorage::resize(std::uint64_t bytes) {
  if (ftruncate(data_fd_.get(), static_cast<off_t>(bytes)) != 0) {
    throw Error(ErrorCode::SharedMemoryFull,
                path_ + ": its file system does not take a sparse file of " + std::to_string(bytes) +
                    " bytes (" + strerror(errno) + "); lower max_message_size or capacity",
                errno);
  }
}

void FileStorage::check_room(std::uint64_t bytes, const std::string& purpose) const {
  check_budget(bytes, data_fd_.get(), path_, purpose);
}

void FileStorage::reserve_checked(std::uint64_t offset, std::uint64_t length, const std::string& purpose) {
  int failure = 0;
  {
    SignalsBlocked guard;
    do {
      failure = fallocate(data_fd_.get(), 0, static_cast<off_t>(offset), static_cast<off_t>(length)) == 0
                    ? 0
                    : errno;
    } while (failure == EINTR);
  }
  if (failure == EOPNOTSUPP) failure = allocate_by_writing(data_fd_.get(), offset, length);
  if (failure == 0) return;
  if (failure == ENOSPC || failure == ENOMEM || failure == EDQUOT || failure == EFBIG) {
    throw Error(ErrorCode::SharedMemoryFull,
                purpose + " needs " + std::to_string(length) + " bytes more in " + path_ +
                    ", but they cannot be reserved (" + strerror(failure) +
                    "); free space, raise its limit, or use fewer or smaller slots",
                failure);
  }
  throw Error(ErrorCode::System,
              path_ + ": reserving " + std::to_string(length) + " bytes failed: " + strerror(failure),
              failure);
}

void FileStorage::give_back(std::uint64_t offset, std::uint64_t length) noexcept {
  // A file system that cannot punch holes keeps the pages; nothing but memory is lost.
  [[maybe_unused]] int result = fallocate(data_fd_.get(), FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE,
                                          static_cast<off_t>(offset), static_cast<off_t>(length));
}

std::byte* FileStorage::map(std::uint64_t offset, std::uint64_t length, Access access) {
  int protection = access == Access::ReadWrite ? PROT_READ | PROT_WRITE : PROT_READ;
  void* address = mmap(nullptr, length, protection, MAP_SHARED | MAP_NORESERVE, data_fd_.get(),
                       static_cast<off_t>(offset));
  if (address == MAP_FAILED) {
    throw Error(ErrorCode::SharedMemoryFull,
                path_ + ": no address space to map " + std::to_string(length) + " bytes (" + strerror(errno) +
                    "); lower max_message_size or capacity, or raise the limit (ulimit -v)",
                errno);
  }
  madvise(address, length, MADV_DONTDUMP);
  return static_cast<std::byte*>(address);
}

void FileStorage::unmap(std::byte* address, std::uint64_t length) noexcept { munmap(address, length); }

bool FileStorage::try_lock(std::uint32_t byte) noexcept {
  for (int attempt = 1;; ++attempt) {
    struct flock lock = lock_of(byte, F_WRLCK);
    if (fcntl(lock_fd_, F_OFD_SETLK, &lock) == 0) return true;
    if (errno == EAGAIN || errno == EACCES || attempt == kLockTries) return false;
  }
}

void FileStorage::unlock(std::uint32_t byte) noexcept {
  // A lock that stays would make others wait as long as this object lives.
  for (int attempt = 0; attempt < kUnlockTries; ++attempt) {
    struct flock lock = lock_of(byte, F_UNLCK);
    if (fcntl(lock_fd_, F_OFD_SETLK, &lock) == 0) return;
  }
}

bool FileStorage::is_locked(std::uint32_t byte) const noexcept {
  for (int attempt = 0; attempt < kLockTries; ++attempt) {
    struct flock lock = lock_of(byte, F_WRLCK);
    if (fcntl(lock_fd_, F_OFD_GETLK, &lock) == 0) return lock.l_type != F_UNLCK;
  }
  return true;  // not known to be dead
}

std::unique_ptr<Storage> make_file_storage(base::Descriptor fd, StorageKind kind, std::string path) {
  return std::make_unique<FileStorage>(std::move(fd), kind, std::move(path));
}

}  // namespace dsline::memory
