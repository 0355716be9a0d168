#pragma once

#include <cstdint>
#include <limits>

/// Stands before the core's own in the model's include path. The model has no time: a process that is patient never sees a
/// deadline pass, and one that is not sees the next one pass at once.
namespace dsline::base {

inline constexpr std::int64_t kForever = std::numeric_limits<std::int64_t>::max();

std::int64_t monotonic_ns() noexcept;
inline std::int64_t coarse_ns() noexcept { return 0; }
inline std::int64_t realtime_ns() noexcept { return 0; }

}  // namespace dsline::base
