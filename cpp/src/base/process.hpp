#pragma once

#include <array>
#include <cstdint>
#include <mutex>
#include <string>

#include "base/atomic.hpp"

namespace dsline::base {

/// Counts the forks between this process and the one that loaded the core. A handle that remembers another
/// value was inherited and belongs to the parent. Writer: the fork handler, alone in the new child.
extern Atomic<std::uint32_t> fork_generation_word;

inline std::uint32_t fork_generation() noexcept {
  return fork_generation_word.load(std::memory_order_relaxed);
}

/// Opens a file whose descriptor a forked child must close at once, because it carries kernel locks of the parent; -1
/// with errno as open(). No fork comes between the opening and the registration.
int open_closed_in_child(const char* path, int flags);
/// An eventfd (counter 0, not blocking) that a forked child closes at once, because its reads would be missed by the
/// parent; -1 with errno as eventfd().
int make_event_closed_in_child();
/// Closes one of these, in the process that opened it.
void close_closed_in_child(int fd) noexcept;

/// Serialises what changes per process: registering handles anew in a forked child, and the list of handles. Locked
/// across fork(), so that the child finds it unlocked. Taken before the list of descriptors above.
std::mutex& process_mutex();

/// Start time of a process in clock ticks since boot (field 22 of /proc/PID/stat); 0 where it cannot be read.
std::uint64_t process_start_time(std::uint32_t pid) noexcept;

/// The kernel's identity of this boot; 16 zero bytes where it cannot be read.
std::array<unsigned char, 16> boot_id() noexcept;

std::array<unsigned char, 16> random_id();

/// 32 lower-case hexadecimal digits.
std::string to_hex(const std::array<unsigned char, 16>& id);

}  // namespace dsline::base
