#pragma once

// Single-steps over the store by the processor's trap flag. ThreadSanitizer's runtime does not go along with it.
#if defined(__x86_64__) && !defined(__SANITIZE_THREAD__)
#define DSLINE_CRASH_POINTS 1

#include <signal.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <ucontext.h>
#include <unistd.h>

#include <cinttypes>
#include <cstdint>
#include <cstdio>

/// Deaths at every store. A child process write-protects the control part of a region; each of its stores there faults,
/// is counted, and is either let through (one instruction, then the protection is back) or is where the child dies by
/// SIGKILL. A store is what others can see of a process, so all its deaths are among these.
namespace dsline::support {

enum class Ending { Died, Finished, Failed };

class CrashPoint {
 public:
  /// From here on the calling process dies before its `store`-th store (from 1) into the regions behind these descriptors.
  template <class... Fd>
  void arm(Fd... fds) {
    range_count_ = 0;
    for (const int fd : {fds...}) {
      struct stat info {};
      if (fstat(fd, &info) != 0 || !find_ranges(info.st_ino)) _exit(3);
    }
    struct sigaction action {};
    action.sa_flags = SA_SIGINFO | SA_NODEFER;
    action.sa_sigaction = on_store;
    sigaction(SIGSEGV, &action, nullptr);
    action.sa_sigaction = on_step;
    sigaction(SIGTRAP, &action, nullptr);
    left_ = store_;
    protect(PROT_READ);
  }

  /// Runs `work(point)` in a forked child, which arms the point when it is ready.
  template <class Work>
  static Ending die_before(int store, Work&& work) {
    pid_t child = fork();
    if (child < 0) return Ending::Failed;
    if (child == 0) {
      CrashPoint point;
      store_ = store;
      try {
        work(point);
      } catch (...) {
        _exit(4);
      }
      protect(PROT_READ | PROT_WRITE);
      _exit(0);
    }
    int status = 0;
    if (waitpid(child, &status, 0) != child) return Ending::Failed;
    if (WIFEXITED(status) && WEXITSTATUS(status) == 0) return Ending::Finished;
    return WIFSIGNALED(status) && WTERMSIG(status) == SIGKILL ? Ending::Died : Ending::Failed;
  }

 private:
  struct Range {
    char* begin;
    std::size_t bytes;
  };

  /// Adds them; false when there are none.
  static bool find_ranges(ino_t wanted) {
    FILE* maps = fopen("/proc/self/maps", "re");
    if (maps == nullptr) return false;
    const int before = range_count_;
    char line[512];
    while (fgets(line, sizeof line, maps) != nullptr && range_count_ < kMostRanges) {
      std::uintptr_t begin = 0, end = 0;
      std::uint64_t offset = 0, inode = 0;
      char access[5] = {};
      if (sscanf(line, "%" SCNxPTR "-%" SCNxPTR " %4s %" SCNx64 " %*s %" SCNu64, &begin, &end, access,
                 &offset, &inode) != 5) {
        continue;
      }
      if (inode != wanted || offset != 0 || access[1] != 'w' || access[3] != 's') continue;
      ranges_[range_count_++] = {reinterpret_cast<char*>(begin), end - begin};
    }
    fclose(maps);
    return range_count_ > before;
  }

  static void protect(int access) {
    for (int i = 0; i < range_count_; ++i) mprotect(ranges_[i].begin, ranges_[i].bytes, access);
  }

  static void on_store(int, siginfo_t* info, void* context) {
    char* at = static_cast<char*>(info->si_addr);
    bool ours = false;
    for (int i = 0; i < range_count_; ++i)
      ours |= at >= ranges_[i].begin && at < ranges_[i].begin + ranges_[i].bytes;
    if (!ours) _exit(5);
    if (--left_ == 0) {
      kill(getpid(), SIGKILL);
      for (;;) pause();
    }
    protect(PROT_READ | PROT_WRITE);
    static_cast<ucontext_t*>(context)->uc_mcontext.gregs[REG_EFL] |= kTrapFlag;
  }

  static void on_step(int, siginfo_t*, void* context) {
    protect(PROT_READ);
    static_cast<ucontext_t*>(context)->uc_mcontext.gregs[REG_EFL] &= ~kTrapFlag;
  }

  static constexpr int kMostRanges = 16;
  static constexpr greg_t kTrapFlag = 0x100;
  static inline Range ranges_[kMostRanges];
  static inline int range_count_ = 0;
  static inline int store_ = 0;
  static inline int left_ = 0;
};

}  // namespace dsline::support

#endif
