#pragma once

#include <gtest/gtest.h>
#include <signal.h>
#include <sys/wait.h>
#include <unistd.h>

#include <functional>

namespace dsline::support {

/// Exit status of `work` in a forked child, which ends without closing anything; 0 when it returned true.
inline int in_child(const std::function<bool()>& work) {
  pid_t child = fork();
  if (child == 0) {
    int status = 1;
    try {
      status = work() ? 0 : 1;
    } catch (...) {
      status = 2;
    }
    _exit(status);
  }
  int status = -1;
  waitpid(child, &status, 0);
  return WIFEXITED(status) ? WEXITSTATUS(status) : -1;
}

/// Lets a child take what it wants, and kills it while it holds it: its pid.
inline pid_t die_holding(const std::function<void()>& take) {
  int ready[2];
  EXPECT_EQ(pipe(ready), 0);
  pid_t child = fork();
  if (child == 0) {
    try {
      take();
    } catch (...) {
      _exit(1);
    }
    char byte = 1;
    if (write(ready[1], &byte, 1) != 1) _exit(1);
    for (;;) pause();
  }
  close(ready[1]);
  char byte = 0;
  EXPECT_EQ(read(ready[0], &byte, 1), 1) << "the child failed";
  close(ready[0]);
  kill(child, SIGKILL);
  waitpid(child, nullptr, 0);
  return child;
}

}  // namespace dsline::support
