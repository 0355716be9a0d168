#pragma once

#include <cstddef>
#include <cstdint>

#include "base/atomic.hpp"

namespace dsline::waiting {

enum class Wake { Woken, TimedOut, Interrupted };

/// Sleeps while `word` holds `expected`, at the longest until `deadline_ns` on CLOCK_MONOTONIC. The futex is
/// shared between processes and works on read-only mappings too. A changed word counts as woken.
Wake futex_wait(const base::Atomic<std::uint32_t>& word, std::uint32_t expected,
                std::int64_t deadline_ns) noexcept;

/// A word and what it must hold for its waiter to sleep.
struct Expected {
  const base::Atomic<std::uint32_t>* word;
  std::uint32_t value;
};
/// Words of one futex_wait_many() at most.
inline constexpr std::size_t kMostWords = 128;

/// As futex_wait() for several words: over as soon as one of them was woken or has changed. `hit` becomes the number of one
/// that was woken; others may have been woken as well, of which nothing tells. Unless the result is Woken none was.
/// Requires: can_wait_for_many(), 1 to kMostWords of them.
Wake futex_wait_many(const Expected* words, std::size_t count, std::int64_t deadline_ns,
                     std::size_t& hit) noexcept;

/// Whether this kernel has futex_waitv (Linux 5.16) and lets this process call it.
bool can_wait_for_many() noexcept;
/// For tests: makes can_wait_for_many() say no, and what it found again.
void pretend_not_to_wait_for_many(bool pretend) noexcept;

/// Wakes at most `count` sleepers.
void futex_wake(const base::Atomic<std::uint32_t>& word, int count) noexcept;

}  // namespace dsline::waiting
