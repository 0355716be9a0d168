#pragma once

#include <sys/types.h>

#include <cstddef>
#include <cstdint>
#include <functional>
#include <string>
#include <vector>

/// Runs another process instruction by instruction (ptrace).
namespace dsline::steps {

/// Empty where a process may trace its child; else why not.
std::string why_no_stepping();

struct Snapshot {
  std::uint64_t step;  ///< instructions before it
  std::vector<std::byte> bytes;
};

struct Walk {
  std::uint64_t steps = 0;
  bool finished = false;  ///< the process came to its second stop; else it ended, or `most_steps` were over
  int status = 0;         ///< of waitpid, when it ended
  std::vector<Snapshot> snapshots;
};

/// Steps `pid`, which has stopped itself, until it stops itself again or `most_steps` instructions are done. Every state
/// of the `size` bytes at `watched` that differs from the one before is kept.
Walk walk(pid_t pid, const std::byte* watched, std::size_t size, std::uint64_t most_steps);

}  // namespace dsline::steps
