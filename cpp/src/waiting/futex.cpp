#include "waiting/futex.hpp"

#include <linux/futex.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include <array>
#include <cerrno>

namespace dsline::waiting {
namespace {

// The headers that this is built with may be older than the kernel it runs on.
constexpr long kFutexWaitv = 449;
constexpr std::uint32_t kFutex32 = 2;

struct KernelWaiter {
  std::uint64_t value;
  std::uint64_t address;
  std::uint32_t flags;
  std::uint32_t reserved;
};

enum Support : std::uint32_t { Unknown, Yes, No };
base::Atomic<std::uint32_t> support{Unknown};
base::Atomic<bool> pretending{false};

}  // namespace

bool can_wait_for_many() noexcept {
  std::uint32_t known = support.load(std::memory_order_relaxed);
  if (known == Unknown) {
    // No words at all are refused as an invalid argument where the call exists.
    syscall(kFutexWaitv, nullptr, 0, 0, nullptr, 0);
    known = errno == EINVAL ? Yes : No;
    support.store(known, std::memory_order_relaxed);
  }
  return known == Yes && !pretending.load(std::memory_order_relaxed);
}

void pretend_not_to_wait_for_many(bool pretend) noexcept {
  pretending.store(pretend, std::memory_order_relaxed);
}

Wake futex_wait_many(const Expected* words, std::size_t count, std::int64_t deadline_ns,
                     std::size_t& hit) noexcept {
  std::array<KernelWaiter, kMostWords> waiters;
  for (std::size_t i = 0; i < count; ++i) {
    waiters[i] = {words[i].value, reinterpret_cast<std::uintptr_t>(words[i].word), kFutex32, 0};
  }
  timespec deadline{static_cast<time_t>(deadline_ns / 1'000'000'000),
                    static_cast<long>(deadline_ns % 1'000'000'000)};
  const long result =
      syscall(kFutexWaitv, waiters.data(), count, 0, &deadline, static_cast<long>(CLOCK_MONOTONIC));
  hit = result >= 0 ? static_cast<std::size_t>(result) : count;
  if (result >= 0 || errno == EAGAIN) return Wake::Woken;
  if (errno == ETIMEDOUT) return Wake::TimedOut;
  if (errno != EINTR) {
    // The kernel has no memory for it: the caller looks at everything again, and must not do so without a pause.
    const timespec pause{0, 1'000'000};
    nanosleep(&pause, nullptr);
  }
  return Wake::Interrupted;
}

Wake futex_wait(const base::Atomic<std::uint32_t>& word, std::uint32_t expected,
                std::int64_t deadline_ns) noexcept {
  timespec deadline{static_cast<time_t>(deadline_ns / 1'000'000'000),
                    static_cast<long>(deadline_ns % 1'000'000'000)};
  // FUTEX_WAIT_BITSET takes an absolute time, so an interrupted wait needs no arithmetic to go on.
  long result =
      syscall(SYS_futex, &word, FUTEX_WAIT_BITSET, expected, &deadline, nullptr, FUTEX_BITSET_MATCH_ANY);
  if (result == 0 || errno == EAGAIN) return Wake::Woken;
  return errno == ETIMEDOUT ? Wake::TimedOut : Wake::Interrupted;
}

void futex_wake(const base::Atomic<std::uint32_t>& word, int count) noexcept {
  syscall(SYS_futex, &word, FUTEX_WAKE, count, nullptr, nullptr, 0);
}

}  // namespace dsline::waiting
