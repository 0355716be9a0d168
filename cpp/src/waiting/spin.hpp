#pragma once

#include <sched.h>

#include <algorithm>
#include <cstdint>

#include "base/atomic.hpp"
#include "base/clock.hpp"

namespace dsline::waiting {

/// How long to spin before the first sleep, learnt from what spinning brought.
///
/// A wake-up across cores costs tens of microseconds on a virtual machine, so spinning about that long is never
/// more than twice as dear as the better choice. Two spinners that share one core stop each other for whole
/// time slices: a spin that did not pay halves the next one, and past a few microseconds every look gives up
/// the core to whoever is ready to run.
///
/// A sleep that was over sooner than the longest spin makes the next spin longer again: waking costs the other side a
/// system call that spinning would have spared it.
///
/// In a stream (many messages since the last wait, each within a fraction of a microsecond) whoever is faster would
/// catch up with every single message, and the two would take the same cache lines from each other all the time. It
/// then stays away for a moment, so that the other can go ahead by a batch.
///
/// Threads: one handle's threads share it; the budget is a hint and a lost update is harmless.
class AdaptiveSpin {
 public:
  static constexpr std::int64_t kLongestNs = 50'000;
  static constexpr std::int64_t kShortestNs = 1'000;
  static constexpr std::int64_t kWakeNs = 50'000;  // a wake-up across cores at its slowest
  static constexpr std::int64_t kYieldAfterNs = 10'000;
  static constexpr int kMostPauses = 16;
  static constexpr std::int64_t kStreamNs = 1'000;  // per message
  static constexpr std::uint64_t kBatchThatPays = 3;
  static constexpr std::uint32_t kShortestPause = 8;  // waits
  static constexpr std::uint32_t kLongestPause = 4096;
  static constexpr std::int64_t kStayAwayNs = 1'000;

  /// Looks at `ready` until it is true or the budget is spent; true when it paid. `done` counts the messages that the
  /// caller has sent or taken.
  template <class Ready>
  bool operator()(Ready&& ready, std::int64_t deadline_ns, std::uint64_t done) noexcept {
    const std::int64_t budget = budget_ns_.load(std::memory_order_relaxed);
    std::int64_t start = base::monotonic_ns();
    if (is_stream(start, done)) {
      while (base::monotonic_ns() - start < kStayAwayNs) {
        for (int i = 0; i < 8; ++i) base::cpu_relax();
      }
    }
    std::int64_t end = std::min(start + budget, deadline_ns);
    std::int64_t now = start;
    // Every look takes a cache line away from the one who is about to write it, so looks become rarer: a batch
    // builds up meanwhile.
    int pauses = 1;
    do {
      for (int look = 0; look < 4; ++look) {
        if (ready()) {
          budget_ns_.store(std::min(budget * 2, kLongestNs), std::memory_order_relaxed);
          return true;
        }
        for (int i = 0; i < pauses; ++i) base::cpu_relax();
        pauses = std::min(pauses * 2, kMostPauses);
      }
      if (now - start > kYieldAfterNs) sched_yield();
      now = base::monotonic_ns();
    } while (now < end);
    budget_ns_.store(std::max(budget / 2, kShortestNs), std::memory_order_relaxed);
    return ready();
  }

  /// Length of the next spin.
  std::int64_t budget_ns() const noexcept { return budget_ns_.load(std::memory_order_relaxed); }

  /// Told after a sleep that a waker ended, `waited_ns` after the spin before it began.
  void woken_after(std::int64_t waited_ns) noexcept {
    if (waited_ns >= kLongestNs + kWakeNs) return;
    const std::int64_t budget = budget_ns_.load(std::memory_order_relaxed);
    budget_ns_.store(std::min(budget * 4, kLongestNs), std::memory_order_relaxed);
  }

 private:
  // Staying away pays when a batch has built up meanwhile. In an exchange of single messages it never does, and is
  // tried ever more rarely.
  bool is_stream(std::int64_t now, std::uint64_t done) noexcept {
    const std::uint64_t batch = done - done_.load(std::memory_order_relaxed);
    const std::int64_t since = now - started_ns_.load(std::memory_order_relaxed);
    done_.store(done, std::memory_order_relaxed);
    started_ns_.store(now, std::memory_order_relaxed);
    std::uint32_t pause = pause_.load(std::memory_order_relaxed);
    if (stayed_away_.load(std::memory_order_relaxed)) {
      pause = batch < kBatchThatPays ? std::min(pause * 2, kLongestPause) : kShortestPause;
      pause_.store(pause, std::memory_order_relaxed);
      if (batch < kBatchThatPays) waits_left_.store(pause, std::memory_order_relaxed);
    }
    const std::uint32_t left = waits_left_.load(std::memory_order_relaxed);
    if (left > 0) waits_left_.store(left - 1, std::memory_order_relaxed);
    const bool fast = batch != 0 && since < kStreamNs * static_cast<std::int64_t>(batch);
    stayed_away_.store(fast && left == 0, std::memory_order_relaxed);
    return fast && left == 0;
  }

  base::Atomic<std::int64_t> budget_ns_{kLongestNs};
  base::Atomic<std::int64_t> started_ns_{0};
  base::Atomic<std::uint64_t> done_{0};
  base::Atomic<std::uint32_t> pause_{kShortestPause};
  base::Atomic<std::uint32_t> waits_left_{kShortestPause};
  base::Atomic<bool> stayed_away_{false};
};

}  // namespace dsline::waiting
