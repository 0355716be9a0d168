#pragma once

#include <cstdint>
#include <string>

namespace dsline::memory {

/// What can still be reserved, and what sets the limit.
struct Budget {
  std::uint64_t free_bytes;
  std::string limited_by;  ///< for people: "MemAvailable", "the cgroup's memory limit …"
  std::string way_out;     ///< for people: how to raise it
};

/// The smaller of MemAvailable and the room that the process's cgroups (v2 and v1) leave, less a margin that
/// keeps the machine usable.
Budget memory_budget();

/// Throws Error(SharedMemoryFull) when `bytes` do not fit into memory_budget(), or into the free space of the
/// file system of `fd` (fd < 0: not asked).
void check_budget(std::uint64_t bytes, int fd, const std::string& where, const std::string& purpose);

}  // namespace dsline::memory
