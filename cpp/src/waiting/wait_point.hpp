#pragma once

#include <climits>
#include <cstdint>

#include "base/atomic.hpp"
#include "waiting/futex.hpp"

namespace dsline::waiting {

/// A place where participants sleep until a condition may have changed: a bitmap with one bit per participant
/// and a futex word that counts wake-ups. Both live in shared memory; the condition is the caller's.
///
/// Threads: any number, of any processes. Threads that share a participant keep a count of their own and add
/// or remove the participant's bit on 0 → 1 and 1 → 0.
/// Invariants: 1. A sleeper set its bit before it looked at the condition the last time, and a waker changed
///   the condition before it looks at the bits (Dekker); so either the sleeper sees the change or the waker
///   sees the bit. 2. A waker changes the sequence before the system call, so a sleeper that is between its
///   last look and the call does not sleep.
/// Death: the bit of a dead sleeper costs a needless wake-up until it is swept. A woken sleeper that dies
///   before it acts swallows one wake-up; the others look again when their slice ends.
struct WaitState {
  static constexpr std::uint32_t kWords = 4;

  base::Atomic<std::uint64_t> waiters[kWords];  // writers: sleepers and recoverers; readers: wakers
  base::Atomic<std::uint32_t> sequence;         // writers: wakers
  std::uint32_t reserved[7];
};
static_assert(sizeof(WaitState) == 64);

class WaitPoint {
 public:
  WaitPoint(WaitState& state, std::uint32_t participants) noexcept
      : state_(&state), words_((participants + 63) / 64) {}

  void add(std::uint32_t participant) noexcept {
    // SYNC waiters: pairs with the waker's load in anyone(); both sides are sequentially consistent.
    state_->waiters[participant / 64].fetch_or(bit(participant), std::memory_order_seq_cst);
    base::fence_seq_cst();
  }

  void remove(std::uint32_t participant) noexcept {
    state_->waiters[participant / 64].fetch_and(~bit(participant), std::memory_order_seq_cst);
  }

  std::uint32_t sequence() const noexcept { return state_->sequence.load(std::memory_order_seq_cst); }

  /// What sleepers sleep on, for who sleeps on several.
  const base::Atomic<std::uint32_t>& word() const noexcept { return state_->sequence; }

  /// Requires: add() was called and the condition was looked at after sequence() gave `expected`.
  Wake sleep(std::uint32_t expected, std::int64_t deadline_ns) const noexcept {
    return futex_wait(state_->sequence, expected, deadline_ns);
  }

  /// One load of a line that is rarely written (one per 64 participants).
  /// Requires: a full fence, or a sequentially consistent read-modify-write on x86, since the condition changed.
  bool anyone() const noexcept {
    std::uint64_t any = 0;
    for (std::uint32_t i = 0; i < words_; ++i) any |= state_->waiters[i].load(std::memory_order_seq_cst);
    return any != 0;
  }

  void wake(int count) noexcept {
    state_->sequence.fetch_add(1, std::memory_order_seq_cst);
    futex_wake(state_->sequence, count);
  }

  void wake_one_if_anyone() noexcept {
    if (anyone()) [[unlikely]]
      wake(1);
  }
  void wake_all() noexcept { wake(INT_MAX); }

 private:
  static std::uint64_t bit(std::uint32_t participant) noexcept {
    return std::uint64_t{1} << (participant % 64);
  }

  WaitState* state_;
  std::uint32_t words_;
};

}  // namespace dsline::waiting
