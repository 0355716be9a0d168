#pragma once

#include <cstdint>

#include "base/atomic.hpp"

namespace dsline::waiting {

enum class Wake { Woken, TimedOut, Interrupted };

/// Sleeps while `word` holds `expected`, at the longest until `deadline_ns` on CLOCK_MONOTONIC. The futex is
/// shared between processes and works on read-only mappings too. A changed word counts as woken.
Wake futex_wait(const base::Atomic<std::uint32_t>& word, std::uint32_t expected,
                std::int64_t deadline_ns) noexcept;

/// Wakes at most `count` sleepers.
void futex_wake(const base::Atomic<std::uint32_t>& word, int count) noexcept;

}  // namespace dsline::waiting
