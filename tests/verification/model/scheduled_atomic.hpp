#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <type_traits>

/// What takes the place of std::atomic in the model checker: every access to the simulated shared memory is one step, and
/// before it any other process may run. One operating-system thread runs everything, so the word itself is plain, and the
/// memory orders are ignored: the model is sequentially consistent.
namespace dsline::model {

/// The simulated shared memory. Atomics outside of it belong to one process and are no steps.
extern std::uintptr_t shared_begin;
extern std::size_t shared_bytes;

/// Lets the scheduler run others. False: a word that nobody decides by; it reads as zero and writes to it are forgotten.
bool before_access(const void* at) noexcept;
/// After a load (`before` and `after` are equal) or a write.
void after_access(const void* at, std::uint64_t before, std::uint64_t after, bool wrote) noexcept;

template <class T>
class ScheduledAtomic {
 public:
  using value_type = T;
  static constexpr bool is_always_lock_free = true;

  constexpr ScheduledAtomic() noexcept = default;
  constexpr ScheduledAtomic(T value) noexcept : value_(value) {}
  ScheduledAtomic(const ScheduledAtomic&) = delete;
  ScheduledAtomic& operator=(const ScheduledAtomic&) = delete;

  T load(std::memory_order = std::memory_order_seq_cst) const noexcept {
    if (!is_shared()) return value_;
    if (!before_access(this)) return T{};
    after_access(this, bits(value_), bits(value_), false);
    return value_;
  }
  operator T() const noexcept { return load(); }

  void store(T value, std::memory_order = std::memory_order_seq_cst) noexcept {
    change([value](T) { return value; });
  }
  T operator=(T value) noexcept {
    store(value);
    return value;
  }
  T exchange(T value, std::memory_order = std::memory_order_seq_cst) noexcept {
    return change([value](T) { return value; });
  }

  bool compare_exchange_strong(T& expected, T wanted, std::memory_order = std::memory_order_seq_cst,
                               std::memory_order = std::memory_order_seq_cst) noexcept {
    const bool shared = is_shared();
    if (shared && !before_access(this)) return true;
    const T before = value_;
    const bool equal = before == expected;
    if (equal) {
      value_ = wanted;
    } else {
      expected = before;
    }
    if (shared) after_access(this, bits(before), bits(value_), equal);
    return equal;
  }
  /// Never fails without a reason: a spurious failure is one more round of the same loop.
  bool compare_exchange_weak(T& expected, T wanted, std::memory_order success = std::memory_order_seq_cst,
                             std::memory_order failure = std::memory_order_seq_cst) noexcept {
    return compare_exchange_strong(expected, wanted, success, failure);
  }

  T fetch_add(T by, std::memory_order = std::memory_order_seq_cst) noexcept {
    return change([by](T value) { return static_cast<T>(value + by); });
  }
  T fetch_sub(T by, std::memory_order = std::memory_order_seq_cst) noexcept {
    return change([by](T value) { return static_cast<T>(value - by); });
  }
  T fetch_and(T mask, std::memory_order = std::memory_order_seq_cst) noexcept {
    return change([mask](T value) { return static_cast<T>(value & mask); });
  }
  T fetch_or(T mask, std::memory_order = std::memory_order_seq_cst) noexcept {
    return change([mask](T value) { return static_cast<T>(value | mask); });
  }

 private:
  static std::uint64_t bits(T value) noexcept {
    if constexpr (std::is_pointer_v<T>) {
      return reinterpret_cast<std::uintptr_t>(value);
    } else {
      return static_cast<std::uint64_t>(value);
    }
  }
  bool is_shared() const noexcept {
    return reinterpret_cast<std::uintptr_t>(this) - shared_begin < shared_bytes;
  }
  template <class Change>
  T change(Change&& to) noexcept {
    const bool shared = is_shared();
    if (shared && !before_access(this)) return T{};
    const T before = value_;
    value_ = to(before);
    if (shared) after_access(this, bits(before), bits(value_), true);
    return before;
  }

  T value_;
};

}  // namespace dsline::model
