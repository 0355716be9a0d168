#include "points.hpp"

#include <sched.h>
#include <signal.h>
#include <time.h>
#include <unistd.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "base/atomic.hpp"
#include "base/clock.hpp"
#include "base/points.hpp"

namespace dsline::kill {
namespace {

constexpr const char* kNames[] = {
#include "kill_labels.inc"
};
constexpr std::uint32_t kCount = sizeof kNames / sizeof kNames[0];
static_assert(kCount <= kMaxPoints);

Arming armed{};
Random random{0};
std::uint32_t hits_left = 0;

// One string may have several addresses, so a number is remembered per address.
struct Known {
  const char* label;
  std::uint32_t point;
};
constexpr std::size_t kKnown = 4096;
Known known[kKnown];

std::uint32_t number_of(const char* label) noexcept {
  std::size_t at = mix(reinterpret_cast<std::uintptr_t>(label)) % kKnown;
  while (known[at].label != nullptr) {
    if (known[at].label == label) return known[at].point;
    at = (at + 1) % kKnown;
  }
  for (std::uint32_t i = 0; i < kCount; ++i) {
    if (std::strcmp(kNames[i], label) != 0) continue;
    known[at] = {label, i};
    return i;
  }
  std::fprintf(stderr, "kill harness: label '%s' is not in the list; build again\n", label);
  std::abort();
}

void linger() noexcept {
  const std::uint32_t kind = random.below(8);
  if (kind < 4) {
    sched_yield();
  } else if (kind < 7) {
    const std::int64_t end = base::monotonic_ns() + random.below(30'000);
    while (base::monotonic_ns() < end) base::cpu_relax();
  } else {
    timespec pause{0, static_cast<long>(random.below(200'000))};
    nanosleep(&pause, nullptr);
  }
}

}  // namespace

std::uint32_t point_count() noexcept { return kCount; }
const char* point_name(std::uint32_t point) noexcept { return kNames[point]; }

void arm(const Arming& arming) noexcept {
  armed = arming;
  random = Random(arming.seed);
  hits_left = arming.life != nullptr ? arming.life->wanted_hit : 0;
}

void at_point(const char* label) noexcept {
  if (armed.life == nullptr) return;
  const std::uint32_t point = number_of(label);
  Life& life = *armed.life;
  life.last_point.store(static_cast<std::int32_t>(point), std::memory_order_relaxed);
  armed.hits[point].fetch_add(1, std::memory_order_relaxed);
  if (static_cast<std::int32_t>(point) == life.wanted_point && hits_left != 0 && --hits_left == 0) {
    if (life.wants_stop) {
      raise(SIGSTOP);
    } else {
      life.killed_at = static_cast<std::int32_t>(point);
      life.killed_ns = base::monotonic_ns();
      std::atomic_signal_fence(std::memory_order_seq_cst);
      ::kill(getpid(), SIGKILL);
      for (;;) pause();
    }
  }
  if (armed.delay_one_in != 0 && random.one_in(armed.delay_one_in)) linger();
}

}  // namespace dsline::kill

namespace dsline::base {
void reached(const char* label) noexcept { kill::at_point(label); }
}  // namespace dsline::base
