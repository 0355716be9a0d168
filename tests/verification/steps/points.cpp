#include "points.hpp"

#include <signal.h>
#include <unistd.h>

#include <cstring>

#include "base/points.hpp"

namespace dsline::steps {
namespace {
const char* deadly = nullptr;
}  // namespace

void die_at(const char* label) noexcept { deadly = label; }

}  // namespace dsline::steps

namespace dsline::base {

void reached(const char* label) noexcept {
  if (steps::deadly == nullptr || std::strcmp(label, steps::deadly) != 0) return;
  ::kill(getpid(), SIGKILL);
  for (;;) pause();
}

}  // namespace dsline::base
