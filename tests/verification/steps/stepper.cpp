#include "stepper.hpp"

#include <signal.h>
#include <sys/ptrace.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>

namespace dsline::steps {

std::string why_no_stepping() {
#if !defined(__x86_64__)
  return "not tried on this processor";
#else
  const pid_t pid = fork();
  if (pid < 0) return std::string("fork: ") + strerror(errno);
  if (pid == 0) {
    if (ptrace(PTRACE_TRACEME, 0, nullptr, nullptr) != 0) _exit(errno);
    raise(SIGSTOP);
    _exit(0);
  }
  int status = 0;
  waitpid(pid, &status, 0);
  if (WIFEXITED(status)) return std::string("ptrace(PTRACE_TRACEME): ") + strerror(WEXITSTATUS(status));
  std::string why;
  if (ptrace(PTRACE_SINGLESTEP, pid, nullptr, nullptr) != 0) {
    why = std::string("ptrace(PTRACE_SINGLESTEP): ") + strerror(errno);
  } else {
    waitpid(pid, &status, 0);
    if (!WIFSTOPPED(status) || WSTOPSIG(status) != SIGTRAP)
      why = "the processor does not stop after an instruction";
  }
  kill(pid, SIGKILL);
  while (waitpid(pid, &status, 0) == pid && !WIFSIGNALED(status) && !WIFEXITED(status)) {
  }
  return why;
#endif
}

Walk walk(pid_t pid, const std::byte* watched, std::size_t size, std::uint64_t most_steps) {
  Walk out;
  std::vector<std::byte> last(watched, watched + size);
  out.snapshots.push_back({0, last});
  long signal = 0;
  while (out.steps < most_steps) {
    if (ptrace(PTRACE_SINGLESTEP, pid, nullptr, signal) != 0) return out;
    if (waitpid(pid, &out.status, 0) != pid) return out;
    if (!WIFSTOPPED(out.status)) return out;
    const int stopped_by = WSTOPSIG(out.status);
    if (stopped_by == SIGSTOP && out.steps > 0) {
      out.finished = true;
      return out;
    }
    signal = stopped_by == SIGTRAP || stopped_by == SIGSTOP ? 0 : stopped_by;
    ++out.steps;
    if (std::memcmp(watched, last.data(), size) != 0) {
      last.assign(watched, watched + size);
      out.snapshots.push_back({out.steps, last});
    }
  }
  return out;
}

}  // namespace dsline::steps
