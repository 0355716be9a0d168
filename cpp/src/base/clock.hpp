#pragma once

#include <time.h>

#include <cstdint>
#include <limits>

namespace dsline::base {

/// A point on CLOCK_MONOTONIC in nanoseconds that never comes.
inline constexpr std::int64_t kForever = std::numeric_limits<std::int64_t>::max();

inline std::int64_t clock_ns(clockid_t id) noexcept {
  timespec now{};
  clock_gettime(id, &now);
  return static_cast<std::int64_t>(now.tv_sec) * 1'000'000'000 + now.tv_nsec;
}

/// For deadlines inside one process.
inline std::int64_t monotonic_ns() noexcept { return clock_ns(CLOCK_MONOTONIC); }

/// The same to a few milliseconds, and cheaper.
inline std::int64_t coarse_ns() noexcept { return clock_ns(CLOCK_MONOTONIC_COARSE); }

/// For people: the time of day, as `time.time_ns()` gives it.
inline std::int64_t realtime_ns() noexcept { return clock_ns(CLOCK_REALTIME); }

}  // namespace dsline::base
