#pragma once

#include <atomic>
#include <cstdint>

#if defined(DSLINE_SCHEDULED_ATOMICS)
#include "scheduled_atomic.hpp"  // supplied by the model checker, tests/verification/model
#endif

namespace dsline::base {

/// The one name under which the core uses atomics, so that a test build can swap in instrumented ones.
/// Every instance that lives in shared memory is lock-free and address-free.
#if defined(DSLINE_SCHEDULED_ATOMICS)
template <class T>
using Atomic = model::ScheduledAtomic<T>;
#else
template <class T>
using Atomic = std::atomic<T>;
#endif

static_assert(Atomic<std::uint64_t>::is_always_lock_free && sizeof(Atomic<std::uint64_t>) == 8);
static_assert(Atomic<std::uint32_t>::is_always_lock_free && sizeof(Atomic<std::uint32_t>) == 4);

#if defined(__SANITIZE_THREAD__)
inline Atomic<std::uint32_t> tsan_fence_word{0};
#endif

/// A full fence. ThreadSanitizer does not model fences, so its build orders through one sequentially
/// consistent read-modify-write instead.
inline void fence_seq_cst() noexcept {
#if defined(__SANITIZE_THREAD__)
  tsan_fence_word.fetch_add(1, std::memory_order_seq_cst);
#else
  std::atomic_thread_fence(std::memory_order_seq_cst);
#endif
}

/// An acquire fence.
inline void fence_acquire() noexcept {
#if defined(__SANITIZE_THREAD__)
  fence_seq_cst();
#else
  std::atomic_thread_fence(std::memory_order_acquire);
#endif
}

/// A release fence.
inline void fence_release() noexcept {
#if defined(__SANITIZE_THREAD__)
  fence_seq_cst();
#else
  std::atomic_thread_fence(std::memory_order_release);
#endif
}

/// A full fence behind a sequentially consistent read-modify-write, which is one already on x86.
inline void fence_seq_cst_after_rmw() noexcept {
#if !defined(__x86_64__) && !defined(__i386__)
  fence_seq_cst();
#endif
}

/// Tells the core that this is a spin loop; does not give up the time slice.
inline void cpu_relax() noexcept {
#if defined(__x86_64__) || defined(__i386__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("isb" ::: "memory");
#endif
}

}  // namespace dsline::base
