/// Makes the n-th system call of an operation fail, for n = 1, 2, … until the operation succeeds without one failing; the
/// same for the n-th allocation. Once (the call before and behind it work) and for good (nothing works from there on).
///
/// Passes when the operation ends with a typed error or succeeds all the same, nothing is leaked (descriptors,
/// mappings, names, locks, slots), and trying again without failures works. Each try runs in a forked child.
///
/// The linker sends the core's calls here (--wrap), and operator new is this program's own.

#include <dirent.h>
#include <fcntl.h>
#include <linux/futex.h>
#include <sys/mman.h>
#include <sys/statfs.h>
#include <sys/syscall.h>

#include <cstdarg>
#include <functional>
#include <initializer_list>
#include <new>

#include "operations.hpp"

namespace dsline::robust {
namespace {

/// Which call fails. In shared memory, so that the program sees what its children reached.
struct Injector {
  bool armed;
  bool allocations;  // else system calls
  bool for_good;
  int choice;  // of the errnos that the call may give
  std::uint64_t calls;
  std::uint64_t fail_at;
  std::uint64_t failed;
  const char* first_failed;
};
Injector* injector = nullptr;

bool is_due(const char* name) noexcept {
  ++injector->calls;
  const bool due =
      injector->for_good ? injector->calls >= injector->fail_at : injector->calls == injector->fail_at;
  if (!due) return false;
  if (injector->failed++ == 0) injector->first_failed = name;
  return true;
}

bool fails(const char* name, std::initializer_list<int> errors) noexcept {
  if (injector == nullptr || !injector->armed || injector->allocations) return false;
  if (injector->choice >= static_cast<int>(errors.size())) {
    ++injector->calls;
    return false;
  }
  if (!is_due(name)) return false;
  const int error = errors.begin()[injector->choice];
  // No kernel interrupts every call for ever.
  if (error == EINTR && injector->for_good) return false;
  errno = error;
  return true;
}

}  // namespace
}  // namespace dsline::robust

using dsline::robust::fails;
using dsline::robust::injector;

// NOLINTBEGIN: these names are the linker's.
extern "C" {
#define DSLINE_WRAP(result, name, parameters, arguments, ...) \
  result __real_##name parameters;                            \
  result __wrap_##name parameters {                           \
    if (fails(#name, {__VA_ARGS__})) return (result)-1;       \
    return __real_##name arguments;                           \
  }

int __real_open64(const char*, int, ...);
int __wrap_open64(const char* path, int flags, ...) {
  va_list list;
  va_start(list, flags);
  const mode_t mode = (flags & (O_CREAT | O_TMPFILE)) != 0 ? va_arg(list, mode_t) : 0;
  va_end(list);
  if (fails("open", {EMFILE, ENOMEM, EPERM, EIO, EINTR, ENOSPC})) return -1;
  return __real_open64(path, flags, mode);
}
int __wrap_open(const char* path, int flags, ...) {
  va_list list;
  va_start(list, flags);
  const mode_t mode = (flags & (O_CREAT | O_TMPFILE)) != 0 ? va_arg(list, mode_t) : 0;
  va_end(list);
  return __wrap_open64(path, flags, mode);
}
int __wrap___open64_2(const char* path, int flags) { return __wrap_open64(path, flags); }
int __wrap___open_2(const char* path, int flags) { return __wrap_open64(path, flags); }

int __real_openat64(int, const char*, int, ...);
int __wrap_openat64(int folder, const char* path, int flags, ...) {
  va_list list;
  va_start(list, flags);
  const mode_t mode = (flags & (O_CREAT | O_TMPFILE)) != 0 ? va_arg(list, mode_t) : 0;
  va_end(list);
  if (fails("openat", {EMFILE, ENOMEM, EPERM, EIO, EINTR, ENOSPC})) return -1;
  return __real_openat64(folder, path, flags, mode);
}
int __wrap___openat64_2(int folder, const char* path, int flags) {
  return __wrap_openat64(folder, path, flags);
}

int __real_fcntl64(int, int, ...);
int __wrap_fcntl64(int fd, int command, ...) {
  va_list list;
  va_start(list, command);
  void* argument = va_arg(list, void*);
  va_end(list);
  // A descriptor is copied, flags are read: the kernel refuses little. A lock needs memory.
  const bool is_lock = command == F_OFD_SETLK || command == F_OFD_SETLKW || command == F_OFD_GETLK;
  // To drop a lock that has no neighbours takes no memory: it may fail once, not for good.
  if (is_lock && injector->for_good && static_cast<struct flock*>(argument)->l_type == F_UNLCK) {
    return __real_fcntl64(fd, command, argument);
  }
  if (is_lock ? fails("fcntl lock", {ENOLCK, ENOMEM, EIO, EINTR}) : fails("fcntl", {EMFILE, EPERM, EINVAL})) {
    return -1;
  }
  return __real_fcntl64(fd, command, argument);
}
int __wrap_fcntl(int fd, int command, ...) {
  va_list list;
  va_start(list, command);
  void* argument = va_arg(list, void*);
  va_end(list);
  return __wrap_fcntl64(fd, command, argument);
}

long __real_syscall(long, ...);
long __wrap_syscall(long number, ...) {
  va_list list;
  va_start(list, number);
  long a[6];
  for (long& one : a) one = va_arg(list, long);
  va_end(list);
  const bool is_futex = number == SYS_futex;
  if (is_futex ? fails("futex", {ENOMEM, EINTR, EPERM, EIO})
               : fails("syscall", {ENOMEM, EPERM, ENOSYS, EIO})) {
    return -1;
  }
  return __real_syscall(number, a[0], a[1], a[2], a[3], a[4], a[5]);
}

void* __real_mmap64(void*, std::size_t, int, int, int, off_t);
void* __wrap_mmap64(void* at, std::size_t size, int protection, int flags, int fd, off_t offset) {
  if (fails("mmap", {ENOMEM, EPERM, EMFILE})) return MAP_FAILED;
  return __real_mmap64(at, size, protection, flags, fd, offset);
}

DIR* __real_opendir(const char*);
DIR* __wrap_opendir(const char* path) {
  if (fails("opendir", {EMFILE, ENOMEM})) return nullptr;
  return __real_opendir(path);
}

DSLINE_WRAP(int, fallocate64, (int fd, int mode, off_t at, off_t size), (fd, mode, at, size), ENOSPC, ENOMEM,
            EIO, EPERM, EINTR, EOPNOTSUPP)
DSLINE_WRAP(int, ftruncate64, (int fd, off_t size), (fd, size), ENOMEM, EPERM, EIO, EINTR, EFBIG)
DSLINE_WRAP(int, fchmod, (int fd, mode_t mode), (fd, mode), EPERM, EIO, ENOMEM)
DSLINE_WRAP(int, fstat64, (int fd, struct stat64* info), (fd, info), EIO, ENOMEM)
DSLINE_WRAP(int, lstat64, (const char* path, struct stat64* info), (path, info), EIO, ENOMEM, EPERM)
DSLINE_WRAP(int, stat64, (const char* path, struct stat64* info), (path, info), EIO, ENOMEM, EPERM)
DSLINE_WRAP(int, fstatat64, (int fd, const char* path, struct stat64* info, int flags),
            (fd, path, info, flags), EIO, ENOMEM, EPERM)
DSLINE_WRAP(int, fstatfs64, (int fd, struct statfs64* info), (fd, info), EIO, ENOMEM)
DSLINE_WRAP(int, linkat, (int from, const char* a, int to, const char* b, int flags), (from, a, to, b, flags),
            EPERM, ENOSPC, ENOMEM, EIO)
DSLINE_WRAP(int, unlink, (const char* path), (path), EIO, EPERM, ENOMEM)
DSLINE_WRAP(int, unlinkat, (int fd, const char* path, int flags), (fd, path, flags), EIO, EPERM, ENOMEM)
DSLINE_WRAP(int, mkdir, (const char* path, mode_t mode), (path, mode), ENOSPC, ENOMEM, EPERM, EIO)
DSLINE_WRAP(int, memfd_create, (const char* name, unsigned flags), (name, flags), EMFILE, ENOMEM, EPERM)
DSLINE_WRAP(ssize_t, read, (int fd, void* to, std::size_t size), (fd, to, size), EIO, EINTR, ENOMEM)
DSLINE_WRAP(ssize_t, pread64, (int fd, void* to, std::size_t size, off_t at), (fd, to, size, at), EIO, EINTR,
            ENOMEM)
DSLINE_WRAP(ssize_t, pwrite64, (int fd, const void* from, std::size_t size, off_t at), (fd, from, size, at),
            ENOSPC, EIO, EINTR)
DSLINE_WRAP(int, madvise, (void* at, std::size_t size, int advice), (at, size, advice), ENOMEM, EINVAL, EIO)
DSLINE_WRAP(int, msync, (void* at, std::size_t size, int flags), (at, size, flags), EIO, ENOMEM)
DSLINE_WRAP(int, fsync, (int fd), (fd), EIO, ENOSPC, EINTR)
DSLINE_WRAP(int, fdatasync, (int fd), (fd), EIO, ENOSPC, EINTR)
DSLINE_WRAP(ssize_t, getrandom, (void* to, std::size_t size, unsigned flags), (to, size, flags), EIO, EINTR)
}  // extern "C"
// NOLINTEND

namespace {
void* allocate(std::size_t size) {
  if (injector != nullptr && injector->armed && injector->allocations &&
      dsline::robust::is_due("operator new")) {
    throw std::bad_alloc();
  }
  void* at = std::malloc(size == 0 ? 1 : size);
  if (at == nullptr) throw std::bad_alloc();
  return at;
}
}  // namespace
void* operator new(std::size_t size) { return allocate(size); }
void* operator new[](std::size_t size) { return allocate(size); }
void operator delete(void* at) noexcept { std::free(at); }
void operator delete[](void* at) noexcept { std::free(at); }
void operator delete(void* at, std::size_t) noexcept { std::free(at); }
void operator delete[](void* at, std::size_t) noexcept { std::free(at); }

namespace dsline::robust {
namespace {

constexpr std::uint32_t kHandles = 4;
constexpr double kLongestTry = 20;
constexpr std::int64_t kLongestAttemptNs = 4'000'000'000;

ChannelOptions small_options() {
  ChannelOptions o;
  o.capacity = 4;
  o.slot_size = 8192;
  o.max_message_size = 1 << 20;
  o.max_handles = kHandles;
  o.checksum = 2;
  return o;
}

struct Held {
  std::size_t descriptors;
  std::size_t mappings;
};
Held what_is_held() {
  return {count_descriptors(getpid()),
          count_mappings(getpid(), "dsline") + count_mappings(getpid(), "robust-file")};
}

/// One try of one operation, in its own process.
class Trial {
 public:
  explicit Trial(std::string folder) : folder_(std::move(folder)), first_(what_is_held()) {}

  const std::string& folder() const noexcept { return folder_; }
  std::string file() const { return folder_ + "/robust-file"; }
  static std::string name() { return "robust-" + std::to_string(getppid()); }
  static std::string name_path() { return channel_directory() + "/" + name(); }
  static bool name_exists() { return access(name_path().c_str(), F_OK) == 0; }
  bool for_good() const noexcept { return injector->for_good; }
  bool has_failed() const noexcept { return injector->failed != 0; }

  void check(bool good, const std::string& what) {
    if (!good && wrong_.empty()) wrong_ = what;
  }

  /// Runs `work` with the failure armed. False when it ended with an error, which has to be a typed one.
  template <class Work>
  bool attempt(Work&& work) {
    const std::int64_t start = base::monotonic_ns();
    bool good = false;
    injector->armed = true;
    try {
      work();
      injector->armed = false;
      good = true;
    } catch (const Error& error) {
      injector->armed = false;
      error_ = error.what();
      check(error.code() != ErrorCode::Internal, "an internal error: " + error_);
    } catch (const std::bad_alloc&) {
      injector->armed = false;
      error_ = "out of memory";
      check(injector->allocations, "out of memory without a reason");
    } catch (const std::exception& error) {
      injector->armed = false;
      error_ = error.what();
      check(false, std::string("an untyped error: ") + error.what());
    }
    check(good || injector->failed != 0, "failed though nothing was made to fail: " + error_);
    check(base::monotonic_ns() - start < kLongestAttemptNs, "the attempt took longer than 4 s");
    return good;
  }

  template <class Work>
  void expect_works(const std::string& what, Work&& work) {
    try {
      work();
    } catch (const std::exception& error) {
      check(false, what + ": " + error.what());
    }
  }

  void expect_no_leak(const Held& before, const std::string& when) {
    const Held now = what_is_held();
    check(now.descriptors == before.descriptors, when + ": " + std::to_string(now.descriptors) +
                                                     " descriptors, before " +
                                                     std::to_string(before.descriptors));
    check(now.mappings == before.mappings, when + ": " + std::to_string(now.mappings) + " mappings, before " +
                                               std::to_string(before.mappings));
  }

  const Held& first() const noexcept { return first_; }
  const std::string& wrong() const noexcept { return wrong_; }

 private:
  std::string folder_;
  Held first_;
  std::string wrong_;
  std::string error_;
};

void send_one(Channel& channel, std::uint64_t bytes = 64) {
  std::vector<std::byte> payload(bytes);
  make_proof(payload.data(), payload.size(), 1, bytes);
  if (channel.try_send(payload.data(), payload.size(), kBytesMessage, nullptr, 0, 0, Backpressure::Raise) !=
      Outcome::Ok) {
    throw Error(ErrorCode::Internal, "a channel that should have room took no message");
  }
}
void receive_one(Channel& channel) {
  Received message;
  if (channel.try_recv(message) != Outcome::Ok) {
    throw Error(ErrorCode::Internal, "a channel that should have a message gave none");
  }
  if (!read_proof(message.payload, message.payload_bytes).is_good) {
    throw Error(ErrorCode::Internal, "a message is not what was sent");
  }
  channel.release(message);
}

/// Everything works: all slots can be used, and all numbers of participants.
void expect_whole(Trial& trial, Channel& channel, const std::function<std::shared_ptr<Channel>()>& open) {
  trial.expect_works("using the channel afterwards", [&] {
    std::vector<std::shared_ptr<Channel>> others;
    const std::uint32_t there = channel.stats().participants;
    for (std::uint32_t i = there; i < kHandles; ++i) others.push_back(open());
    Received message;
    while (channel.try_recv(message) == Outcome::Ok) channel.release(message);
    for (int i = 0; i < 4; ++i) send_one(channel);
    for (int i = 0; i < 4; ++i) receive_one(others.empty() ? channel : *others.back());
    if (channel.stats().free_slots != 4) throw Error(ErrorCode::Internal, "a slot is lost");
  });
}

std::shared_ptr<Channel> open_named(OpenMode mode) {
  return Channel::open_named(Trial::name(), small_options(), mode);
}
std::shared_ptr<Channel> open_file(const Trial& trial, OpenMode mode) {
  return Channel::open_file(trial.file(), small_options(), mode);
}

// --- the operations -------------------------------------------------------------------------------------------------

void create_named(Trial& t) {
  std::shared_ptr<Channel> channel;
  if (!t.attempt([&] { channel = open_named(OpenMode::OpenOrCreate); })) {
    t.expect_no_leak(t.first(), "after a failed creation");
    if (!t.for_good()) t.check(!Trial::name_exists(), "a failed creation left its name");
    t.expect_works("creating again", [&] { channel = open_named(OpenMode::OpenOrCreate); });
  }
  if (channel) expect_whole(t, *channel, [] { return open_named(OpenMode::Open); });
  channel.reset();
  t.expect_no_leak(t.first(), "after the last handle");
  t.check(!Trial::name_exists(), "the last handle left the name of an empty channel");
}

void open_existing(Trial& t) {
  auto first = open_named(OpenMode::Create);
  send_one(*first);
  const Held before = what_is_held();
  std::shared_ptr<Channel> channel;
  if (!t.attempt([&] { channel = open_named(OpenMode::Open); })) {
    t.expect_no_leak(before, "after a failed opening");
    t.check(first->stats().participants == 1, "a failed opening left a participant");
    t.expect_works("opening again", [&] { channel = open_named(OpenMode::Open); });
  }
  if (channel) {
    t.expect_works("receiving", [&] { receive_one(*channel); });
    expect_whole(t, *channel, [] { return open_named(OpenMode::Open); });
  }
  channel.reset();
  t.expect_no_leak(before, "after the handle");
  first.reset();
  t.check(!Trial::name_exists(), "the last handle left the name of an empty channel");
}

void create_file(Trial& t) {
  std::shared_ptr<Channel> channel;
  if (!t.attempt([&] { channel = open_file(t, OpenMode::OpenOrCreate); })) {
    t.expect_no_leak(t.first(), "after a failed creation");
    t.expect_works("creating again", [&] { channel = open_file(t, OpenMode::OpenOrCreate); });
  }
  if (channel) expect_whole(t, *channel, [&] { return open_file(t, OpenMode::Open); });
  channel.reset();
  t.expect_no_leak(t.first(), "after the last handle");
}

void open_left_file(Trial& t) {
  {
    auto first = open_file(t, OpenMode::Create);
    send_one(*first);
  }
  std::shared_ptr<Channel> channel;
  if (!t.attempt([&] { channel = open_file(t, OpenMode::Open); })) {
    t.expect_no_leak(t.first(), "after a failed opening");
    t.expect_works("opening again", [&] { channel = open_file(t, OpenMode::Open); });
  }
  if (channel) {
    t.expect_works("receiving what was left", [&] { receive_one(*channel); });
    expect_whole(t, *channel, [&] { return open_file(t, OpenMode::Open); });
  }
  channel.reset();
  t.expect_no_leak(t.first(), "after the last handle");
}

void replace_damaged(Trial& t) {
  open_named(OpenMode::Create).reset();
  const int fd = open(Trial::name_path().c_str(), O_RDWR | O_CREAT | O_CLOEXEC, 0600);
  const bool written = pwrite(fd, "DSLN\1\1\1\1", 8, 0) == 8;
  close(fd);
  t.check(written, "no damaged file could be made");
  std::shared_ptr<Channel> channel;
  if (!t.attempt([&] { channel = open_named(OpenMode::OpenOrCreate); })) {
    t.expect_no_leak(t.first(), "after a failed replacement");
    t.expect_works("replacing again", [&] { channel = open_named(OpenMode::OpenOrCreate); });
  }
  if (channel) expect_whole(t, *channel, [] { return open_named(OpenMode::Open); });
  channel.reset();
  t.expect_no_leak(t.first(), "after the last handle");
  t.check(!Trial::name_exists(), "the last handle left the name of an empty channel");
}

void create_anonymous(Trial& t) {
  std::shared_ptr<Channel> channel;
  if (!t.attempt([&] { channel = Channel::create_anonymous(small_options()); })) {
    t.expect_no_leak(t.first(), "after a failed creation");
    t.expect_works("creating again", [&] { channel = Channel::create_anonymous(small_options()); });
  }
  if (channel)
    expect_whole(t, *channel, [&] { return Channel::adopt_anonymous(dup(channel->descriptor())); });
  channel.reset();
  t.expect_no_leak(t.first(), "after the last handle");
}

void adopt(Trial& t) {
  auto first = Channel::create_anonymous(small_options());
  send_one(*first);
  const Held before = what_is_held();
  std::shared_ptr<Channel> channel;
  const int fd = dup(first->descriptor());
  if (!t.attempt([&] { channel = Channel::adopt_anonymous(fd); })) {
    t.expect_no_leak(before, "after a failed adoption");
    t.check(first->stats().participants == 1, "a failed adoption left a participant");
    t.expect_works("adopting again", [&] { channel = Channel::adopt_anonymous(dup(first->descriptor())); });
  }
  if (channel) {
    t.expect_works("receiving", [&] { receive_one(*channel); });
    expect_whole(t, *channel, [&] { return Channel::adopt_anonymous(dup(first->descriptor())); });
  }
  channel.reset();
  t.expect_no_leak(before, "after the handle");
}

void create_heap(Trial& t) {
  std::shared_ptr<Channel> channel;
  if (!t.attempt([&] { channel = Channel::create_heap(small_options()); })) {
    t.expect_works("creating again", [&] { channel = Channel::create_heap(small_options()); });
  }
  if (channel)
    t.expect_works("using it", [&] {
      send_one(*channel);
      receive_one(*channel);
    });
}

void send_that_grows(Trial& t) {
  auto channel = Channel::create_anonymous(small_options());
  const std::uint64_t before = channel->stats().free_slots;
  const Held held = what_is_held();
  if (!t.attempt([&] { send_one(*channel, 300'000); })) {
    t.check(channel->stats().free_slots == before, "a failed send kept its slot");
    t.check(channel->depth() == 0, "a failed send left a message");
    t.check(what_is_held().descriptors == held.descriptors, "a failed send left a descriptor");
    t.expect_works("sending again", [&] { send_one(*channel, 300'000); });
  }
  t.expect_works("receiving", [&] { receive_one(*channel); });
  expect_whole(t, *channel, [&] { return Channel::adopt_anonymous(dup(channel->descriptor())); });
  channel.reset();
  t.expect_no_leak(t.first(), "after the last handle");
}

void receive(Trial& t) {
  auto sender = Channel::create_anonymous(small_options());
  auto channel = Channel::adopt_anonymous(dup(sender->descriptor()));
  frames::MetadataBuilder builder;
  builder.add_tag_bytes("long", std::string(2000, 'x'));  // private memory of its own
  std::vector<std::byte> payload(64);
  make_proof(payload.data(), payload.size(), 1, 64);
  sender->try_send(payload.data(), payload.size(), kBytesMessage, builder.bytes().data(),
                   static_cast<std::uint32_t>(builder.bytes().size()), 0, Backpressure::Raise);
  if (!t.attempt([&] { receive_one(*channel); })) {
    t.check(sender->depth() == 1, "a failed receive lost its message");
    t.expect_works("receiving again", [&] { receive_one(*channel); });
  }
  expect_whole(t, *channel, [&] { return Channel::adopt_anonymous(dup(sender->descriptor())); });
  channel.reset();
  sender.reset();
  t.expect_no_leak(t.first(), "after the last handle");
}

void wait_for_a_message(Trial& t) {
  auto channel = Channel::create_anonymous(small_options());
  const std::int64_t deadline = base::monotonic_ns() + 5'000'000;
  Outcome outcome = Outcome::Ok;
  t.attempt([&] {
    Received message;
    outcome = channel->recv(message, deadline);
  });
  const std::int64_t late = base::monotonic_ns() - deadline;
  t.check(outcome == Outcome::TimedOut || t.has_failed(), "an empty channel gave a message");
  t.check(late > -1'000'000, "the wait was over before its time");
  t.check(late < 500'000'000, "the wait was over 500 ms too late");
  t.expect_works("using it", [&] {
    send_one(*channel);
    receive_one(*channel);
  });
}

void wait_for_room(Trial& t) {
  auto channel = Channel::create_anonymous(small_options());
  for (int i = 0; i < 4; ++i) send_one(*channel);
  std::byte payload[64] = {};
  const std::int64_t deadline = base::monotonic_ns() + 5'000'000;
  Outcome outcome = Outcome::Ok;
  t.attempt([&] { outcome = channel->send(payload, sizeof payload, Backpressure::Block, deadline); });
  t.check(outcome == Outcome::TimedOut || t.has_failed(), "a full channel took a message");
  t.check(base::monotonic_ns() - deadline < 500'000'000, "the wait was over 500 ms too late");
  t.expect_works("using it", [&] {
    for (int i = 0; i < 4; ++i) receive_one(*channel);
  });
}

void close_one(Trial& t) {
  auto first = open_named(OpenMode::Create);
  const Held before = what_is_held();
  auto channel = open_named(OpenMode::Open);
  send_one(*channel);
  Received message;
  channel->try_recv(message);
  t.attempt([&] {
    channel->release(message);
    channel->close();
    channel.reset();
  });
  channel.reset();
  t.expect_no_leak(before, "after a close");
  t.check(first->stats().participants == 1, "a closed handle is still a participant");
  expect_whole(t, *first, [] { return open_named(OpenMode::Open); });
  first.reset();
  t.check(!Trial::name_exists(), "the last handle left the name of an empty channel");
}

void close_last(Trial& t) {
  auto channel = open_named(OpenMode::Create);
  t.attempt([&] {
    channel->close();
    channel.reset();
  });
  channel.reset();
  t.expect_no_leak(t.first(), "after a close");
  if (!t.for_good()) t.check(!Trial::name_exists(), "the last handle left the name of an empty channel");
  t.expect_works("creating it anew", [&] { channel = open_named(OpenMode::OpenOrCreate); });
  if (channel) expect_whole(t, *channel, [] { return open_named(OpenMode::Open); });
  channel.reset();
  t.check(!Trial::name_exists(), "a name was left");
}

void unlink_name(Trial& t) {
  auto channel = open_named(OpenMode::Create);
  if (!t.attempt([&] { channel->unlink(); })) {
    t.expect_works("unlinking again", [&] { channel->unlink(); });
  }
  t.check(!Trial::name_exists(), "unlink came back and the name is there");
  t.expect_works("using the channel without its name", [&] {
    send_one(*channel);
    receive_one(*channel);
  });
  channel.reset();
  t.expect_no_leak(t.first(), "after the last handle");
}

void recover_dead(Trial& t) {
  auto first = Channel::create_anonymous(small_options());
  for (int i = 0; i < 2; ++i) send_one(*first);
  const pid_t child = start_child([&] {
    auto mine = Channel::adopt_anonymous(dup(first->descriptor()));
    Received message;
    mine->try_recv(message);
    Loan loan;
    mine->try_alloc(64, 0, Backpressure::Raise, loan);
    kill(getpid(), SIGKILL);
    return 0;
  });
  wait_child(child, 5);
  const Held before = what_is_held();
  std::shared_ptr<Channel> channel;
  if (!t.attempt([&] { channel = Channel::adopt_anonymous(dup(first->descriptor())); })) {
    // The descriptor that was copied for it goes with it.
    t.expect_no_leak(before, "after a failed adoption");
    t.expect_works("adopting again", [&] { channel = Channel::adopt_anonymous(dup(first->descriptor())); });
  }
  if (channel) {
    t.expect_works("receiving what the dead one held", [&] {
      receive_one(*channel);
      receive_one(*channel);
    });
    expect_whole(t, *channel, [&] { return Channel::adopt_anonymous(dup(first->descriptor())); });
  }
}

void use_after_fork(Trial& t) {
  auto channel = Channel::create_anonymous(small_options());
  send_one(*channel);
  struct Verdict {
    char wrong[200];
  };
  auto* verdict = static_cast<Verdict*>(
      mmap(nullptr, sizeof(Verdict), PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0));
  const pid_t child = start_child([&] {
    Trial inner(t.folder());
    const Held before = what_is_held();
    if (!inner.attempt([&] { receive_one(*channel); })) {
      inner.check(what_is_held().descriptors <= before.descriptors + 1,
                  "a failed registration left a descriptor");
      inner.expect_works("using it again", [&] { receive_one(*channel); });
    }
    inner.expect_works("sending", [&] { send_one(*channel); });
    std::snprintf(verdict->wrong, sizeof verdict->wrong, "%s", inner.wrong().c_str());
    channel->close();
    return 0;
  });
  const int status = wait_child(child, 10);
  t.check(status == 0, "the forked child " + describe_status(status));
  t.check(verdict->wrong[0] == 0, std::string("in the forked child: ") + verdict->wrong);
  munmap(verdict, sizeof(Verdict));
  t.check(channel->stats().participants == 1, "the child's handle is still there");
  t.expect_works("receiving from the child", [&] { receive_one(*channel); });
  expect_whole(t, *channel, [&] { return Channel::adopt_anonymous(dup(channel->descriptor())); });
}

void list_names(Trial& t) {
  auto channel = open_named(OpenMode::Create);
  const Held before = what_is_held();
  t.attempt([&] { static_cast<void>(list_channels()); });
  t.expect_no_leak(before, "after listing");
  t.attempt([&] { static_cast<void>(channel->stats()); });
  t.expect_no_leak(before, "after looking");
}

void subscribe(Trial& t) {
  auto channel = open_named(OpenMode::Create);
  send_one(*channel);  // maps what sending needs
  receive_one(*channel);
  const Held before = what_is_held();
  SubscribeOptions options;
  options.group = "viewers";
  std::shared_ptr<Channel> member;
  if (!t.attempt([&] { member = channel->subscribe(options); })) {
    t.expect_no_leak(before, "after a failed subscription");
    t.check(channel->stats().participants == 1, "a failed subscription left a participant");
    t.expect_works("subscribing again", [&] { member = channel->subscribe(options); });
  }
  t.expect_works("sending to both", [&] {
    send_one(*channel);
    receive_one(*channel);
    if (member) receive_one(*member);
  });
  member.reset();
  t.expect_no_leak(before, "after the member");
  // The group ended with its member: it holds nothing up.
  expect_whole(t, *channel, [] { return open_named(OpenMode::Open); });
  channel.reset();
  t.check(!Trial::name_exists(), "the last handle left the name of an empty channel");
}

void leave_group(Trial& t) {
  auto channel = Channel::create_anonymous(small_options());
  SubscribeOptions options;
  options.group = "viewers";
  auto member = channel->subscribe(options);
  send_one(*channel);
  t.attempt([&] {
    member->close();
    member.reset();
  });
  member.reset();
  t.check(channel->stats().participants == 1, "a closed member is still a participant");
  t.expect_works("receiving", [&] { receive_one(*channel); });
  channel->check_peers();
  expect_whole(t, *channel, [&] { return Channel::adopt_anonymous(dup(channel->descriptor())); });
  channel.reset();
  t.expect_no_leak(t.first(), "after the last handle");
}

void send_to_disk(Trial& t) {
  ChannelOptions options = small_options();
  options.sync = 1;
  auto channel = Channel::open_file(t.file(), options, OpenMode::Create);
  std::byte payload[64];
  make_proof(payload, sizeof payload, 1, 64);
  Outcome outcome = Outcome::Ok;
  const bool good = t.attempt([&] {
    outcome = channel->try_send(payload, sizeof payload, kBytesMessage, nullptr, 0, 0, Backpressure::Raise);
  });
  if (!good) {
    t.check(channel->stats().free_slots == 4, "a failed send kept its slot");
    t.expect_works("sending again", [&] { send_one(*channel); });
  } else {
    t.check(outcome == Outcome::Ok || (outcome == Outcome::NotSynced && t.has_failed()),
            "a send of another outcome");
  }
  t.expect_works("receiving", [&] { receive_one(*channel); });
  channel.reset();
  t.expect_no_leak(t.first(), "after the last handle");
}

void look_from_outside(Trial& t) {
  auto channel = open_named(OpenMode::Create);
  send_one(*channel);
  const Held before = what_is_held();
  if (!t.attempt([&] { static_cast<void>(Channel::report_of(Trial::name_path())); })) {
    t.expect_works("looking again", [&] { static_cast<void>(Channel::report_of(Trial::name_path())); });
  }
  t.expect_no_leak(before, "after looking");
  t.expect_works("receiving", [&] { receive_one(*channel); });
  channel.reset();
  t.check(!Trial::name_exists(), "the last handle left the name of an empty channel");
}

void remove_left(Trial& t) {
  auto channel = open_named(OpenMode::Create);
  send_one(*channel);
  channel.reset();  // with a message in it, so the name stays
  t.check(Trial::name_exists(), "a channel with a message lost its name");
  Removal removal = Removal::Missing;
  if (!t.attempt([&] { removal = Channel::remove_channel(Trial::name_path(), 0, true, false); }) ||
      removal != Removal::Removed) {
    t.check(t.has_failed(), "a channel that nobody uses was not removed");
    t.expect_works("removing again",
                   [&] { static_cast<void>(Channel::remove_channel(Trial::name_path(), 0, true, false)); });
  }
  t.expect_no_leak(t.first(), "after the removal");
  t.check(!Trial::name_exists(), "a removed name is there");
}

struct Operation {
  const char* name;
  void (*run)(Trial&);
};
constexpr Operation kOperations[] = {
    {"create a named channel", create_named},
    {"open a named channel", open_existing},
    {"create a file", create_file},
    {"open a file that was left", open_left_file},
    {"replace a damaged channel", replace_damaged},
    {"create an anonymous channel", create_anonymous},
    {"adopt an anonymous channel", adopt},
    {"create a heap channel", create_heap},
    {"send that grows", send_that_grows},
    {"receive", receive},
    {"wait for a message", wait_for_a_message},
    {"wait for room", wait_for_room},
    {"close", close_one},
    {"close the last handle", close_last},
    {"unlink", unlink_name},
    {"recover a dead participant", recover_dead},
    {"use after fork", use_after_fork},
    {"list", list_names},
    {"subscribe", subscribe},
    {"leave a group", leave_group},
    {"send to the disk", send_to_disk},
    {"report from outside", look_from_outside},
    {"remove a channel that was left", remove_left},
};

/// What failed, in the shared page.
struct Shared {
  Injector injector;
  char wrong[400];
};

class Loop {
 public:
  Loop(Report& report, Shared& shared, std::string folder)
      : report_(report), shared_(shared), folder_(std::move(folder)) {}

  void run(const Operation& operation, bool allocations, bool for_good, int choice) {
    std::uint64_t n = 1;
    for (; n < 3000; ++n) {
      clean();
      Injector& in = shared_.injector;
      in = Injector{false, allocations, for_good, choice, 0, n, 0, ""};
      shared_.wrong[0] = 0;
      const pid_t child = start_child([&] {
        Trial trial(folder_);
        operation.run(trial);
        std::snprintf(shared_.wrong, sizeof shared_.wrong, "%s", trial.wrong().c_str());
        return trial.wrong().empty() ? 0 : 1;
      });
      const int status = wait_child(child, kLongestTry);
      in.armed = false;  // it may have died in the attempt
      ++report_["tries"];
      if (in.failed != 0) ++report_[allocations ? "failed allocations" : "failed system calls"];
      if (status != 0) {
        report_.fail(std::string(operation.name) + ", " + (for_good ? "from call " : "call ") +
                     std::to_string(n) + " (" + in.first_failed + ", choice " + std::to_string(choice) +
                     "): " + (shared_.wrong[0] != 0 ? shared_.wrong : describe_status(status)));
      }
      if (in.calls < n) break;
    }
    report_[std::string("calls of: ") + operation.name] =
        std::max(report_[std::string("calls of: ") + operation.name], n - 1);
  }

 private:
  void clean() const {
    ::unlink(Trial_name_path().c_str());
    ::unlink((folder_ + "/robust-file").c_str());
  }
  static std::string Trial_name_path() { return channel_directory() + "/robust-" + std::to_string(getpid()); }

  Report& report_;
  Shared& shared_;
  std::string folder_;
};

int run(const Options& options) {
  Report report("syscalls", options);
  void* page = mmap(nullptr, sizeof(Shared), PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
  if (page == MAP_FAILED) return 2;
  Shared& shared = *static_cast<Shared*>(page);
  injector = &shared.injector;
  std::string folder = "/tmp/dsline-robust-XXXXXX";
  if (mkdtemp(folder.data()) == nullptr) return 2;

  Loop loop(report, shared, folder);
  const int choices = options.is_long ? 6 : 6;
  for (const Operation& operation : kOperations) {
    if (!options.wants(operation.name)) continue;
    for (bool for_good : {false, true}) {
      for (int choice = 0; choice < choices; ++choice) loop.run(operation, false, for_good, choice);
      loop.run(operation, true, for_good, 0);
    }
  }
  ::unlink((folder + "/robust-file").c_str());
  ::unlink((channel_directory() + "/robust-" + std::to_string(getpid())).c_str());
  rmdir(folder.c_str());
  if (options.only.empty()) {
    report.expect_at_least("failed system calls", 500);
    report.expect_at_least("failed allocations", 100);
    for (const Operation& operation : kOperations) {
      report.expect_at_least(std::string("calls of: ") + operation.name, 1);
    }
  }
  return report.finish();
}

}  // namespace
}  // namespace dsline::robust

int main(int argc, char** argv) { return dsline::robust::run(dsline::robust::parse_options(argc, argv, 0)); }
