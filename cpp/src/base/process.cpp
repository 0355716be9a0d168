#include "base/process.hpp"

#include <fcntl.h>
#include <pthread.h>
#include <sys/eventfd.h>
#include <sys/random.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstdlib>
#include <cstring>
#include <mutex>
#include <vector>

#include "dsline/error.hpp"

namespace dsline::base {

Atomic<std::uint32_t> fork_generation_word{0};

namespace {

struct ChildList {
  std::mutex mutex;
  std::vector<int> descriptors;
};

// Never destroyed: handles may be dropped after static destructors have run.
ChildList& child_list() {
  static ChildList* list = new ChildList;
  return *list;
}

// The mutex is held across fork(), so the child sees a whole list and an unlocked mutex.
void before_fork() {
  process_mutex().lock();
  child_list().mutex.lock();
}
void after_fork_parent() {
  child_list().mutex.unlock();
  process_mutex().unlock();
}
void after_fork_child() {
  ChildList& list = child_list();
  for (int fd : list.descriptors) close(fd);
  list.descriptors.clear();
  fork_generation_word.fetch_add(1, std::memory_order_relaxed);
  list.mutex.unlock();
  process_mutex().unlock();
}

[[maybe_unused]] const int fork_handlers_installed = [] {
  child_list();
  process_mutex();
  return pthread_atfork(before_fork, after_fork_parent, after_fork_child);
}();

}  // namespace

std::mutex& process_mutex() {
  static std::mutex* mutex = new std::mutex;
  return *mutex;
}

int open_closed_in_child(const char* path, int flags) {
  std::lock_guard lock(child_list().mutex);
  child_list().descriptors.reserve(child_list().descriptors.size() + 1);
  int fd = open(path, flags | O_CLOEXEC);
  if (fd >= 0) child_list().descriptors.push_back(fd);
  return fd;
}

int make_event_closed_in_child() {
  std::lock_guard lock(child_list().mutex);
  child_list().descriptors.reserve(child_list().descriptors.size() + 1);
  int fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
  if (fd >= 0) child_list().descriptors.push_back(fd);
  return fd;
}

void close_closed_in_child(int fd) noexcept {
  std::lock_guard lock(child_list().mutex);
  std::erase(child_list().descriptors, fd);
  close(fd);
}

std::uint64_t process_start_time(std::uint32_t pid) noexcept {
  char path[32];
  snprintf(path, sizeof path, "/proc/%u/stat", pid);
  int fd = open(path, O_RDONLY | O_CLOEXEC);
  if (fd < 0) return 0;
  char text[1024];
  ssize_t size = read(fd, text, sizeof text - 1);
  close(fd);
  if (size <= 0) return 0;
  text[size] = 0;
  // The command (field 2) may hold blanks and parentheses; the fields behind it start after the last ')'.
  const char* at = strrchr(text, ')');
  if (at == nullptr) return 0;
  for (int field = 2; field < 22; ++field) {
    at = strchr(at + 1, ' ');
    if (at == nullptr) return 0;
  }
  return strtoull(at + 1, nullptr, 10);
}

std::array<unsigned char, 16> boot_id() noexcept {
  std::array<unsigned char, 16> id{};
  int fd = open("/proc/sys/kernel/random/boot_id", O_RDONLY | O_CLOEXEC);
  if (fd < 0) return id;
  char text[64] = {};
  ssize_t size = read(fd, text, sizeof text - 1);
  close(fd);
  std::size_t digits = 0;
  for (ssize_t i = 0; i < size && digits < 32; ++i) {
    char c = text[i];
    int value = c >= '0' && c <= '9' ? c - '0' : c >= 'a' && c <= 'f' ? c - 'a' + 10 : -1;
    if (value < 0) continue;
    id[digits / 2] = static_cast<unsigned char>(id[digits / 2] << 4 | value);
    ++digits;
  }
  return id;
}

std::array<unsigned char, 16> random_id() {
  std::array<unsigned char, 16> id{};
  while (getrandom(id.data(), id.size(), 0) != static_cast<ssize_t>(id.size())) {
    if (errno != EINTR) throw Error(ErrorCode::System, "the kernel gives no random bytes", errno);
  }
  return id;
}

std::string to_hex(const std::array<unsigned char, 16>& id) {
  static constexpr char kDigits[] = "0123456789abcdef";
  std::string text;
  for (unsigned char byte : id) {
    text += kDigits[byte >> 4];
    text += kDigits[byte & 15];
  }
  return text;
}

}  // namespace dsline::base
