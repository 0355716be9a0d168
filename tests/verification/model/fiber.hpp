#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

/// Stackful coroutines small enough to be copied: a fiber at rest is the used part of its stack, which saved registers are
/// part of, at a fixed address.
namespace dsline::model {

inline constexpr std::size_t kStackBytes = 32 * 1024;

/// Saves the caller's registers on its stack, its stack pointer to `*save`, and goes on where `to` was saved.
extern "C" void dsline_model_switch(void** save, void* to);

/// A stack that begins with a call of `entry`, with all other registers zero, so that equal states have equal bytes.
/// `entry` must not return.
inline void* prepare_stack(std::byte* top, void (*entry)()) noexcept {
  constexpr std::size_t kSavedRegisters = 6;
  void** sp = reinterpret_cast<void**>(top);
  *--sp = nullptr;  // the stack pointer at entry is as after a call
  *--sp = reinterpret_cast<void*>(entry);
  for (std::size_t i = 0; i < kSavedRegisters; ++i) *--sp = nullptr;
  return sp;
}

}  // namespace dsline::model
