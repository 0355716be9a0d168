// The kernel's futexes as the scheduler sees them.
#include "waiting/futex.hpp"
#include "engine.hpp"

namespace dsline::waiting {

Wake futex_wait(const base::Atomic<std::uint32_t>& word, std::uint32_t expected, std::int64_t) noexcept {
  // The load is the kernel's look under its lock; falling asleep belongs to the same step.
  if (word.load() != expected) return Wake::Woken;
  return model::fall_asleep(&word) ? Wake::Woken : Wake::TimedOut;
}

void futex_wake(const base::Atomic<std::uint32_t>& word, int count) noexcept {
  model::kernel_step(&word);
  model::wake_sleepers(&word, count);
}

}  // namespace dsline::waiting
