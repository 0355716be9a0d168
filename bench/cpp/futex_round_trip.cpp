// P1 ◀─▶ C1: two bare futex wake-ups between two processes that are both asleep: the limit of a round trip that
// does not spin.
//
// Timed on each side's own words: P1 notes the time, changes a word and wakes C1, which does the same back. Between round
// trips P1 pauses, so that C1 is asleep in the kernel, and P1 sleeps while it waits for the answer.
//
//   futex_round_trip --count 500 --pause-us 3000 [--cpus 0,1]
// prints {"count": …, "p50_us": …, "p99_us": …, "p999_us": …, "max_us": …}.

#include <sys/mman.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <limits>
#include <string>
#include <vector>

#include "base/clock.hpp"
#include "pin.hpp"
#include "waiting/futex.hpp"

namespace {

using Word = dsline::base::Atomic<std::uint32_t>;

void wait_for(const Word& word, std::uint32_t wanted) {
  for (std::uint32_t seen = word.load(); seen != wanted; seen = word.load()) {
    dsline::waiting::futex_wait(word, seen, dsline::base::monotonic_ns() + 5'000'000'000);
  }
}

void tell(Word& word, std::uint32_t value) {
  word.store(value);
  dsline::waiting::futex_wake(word, 1);
}

}  // namespace

int main(int argc, char** argv) {
  std::uint32_t count = 500;
  long pause_us = 3000;
  int cpus[2] = {-1, -1};
  for (int i = 1; i + 1 < argc; i += 2) {
    std::string option = argv[i];
    if (option == "--cpus" && std::sscanf(argv[i + 1], "%d,%d", &cpus[0], &cpus[1]) == 2) continue;
    long value = std::strtol(argv[i + 1], nullptr, 10);
    if (option == "--count" && value >= 1) {
      count = static_cast<std::uint32_t>(value);
    } else if (option == "--pause-us" && value >= 0) {
      pause_us = value;
    } else {
      std::fprintf(stderr, "usage: %s --count N --pause-us MICROSECONDS [--cpus A,B]\n", argv[0]);
      return 2;
    }
  }
  void* shared = mmap(nullptr, 4096, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
  if (shared == MAP_FAILED) return 1;
  Word& there = *new (shared) Word(0);
  Word& back = *new (static_cast<char*>(shared) + 128) Word(0);
  pid_t child = fork();
  pin(cpus[child == 0 ? 1 : 0]);
  if (child == 0) {
    for (std::uint32_t i = 1; i <= count; ++i) {
      wait_for(there, i);
      tell(back, i);
    }
    _exit(0);
  }
  std::vector<double> trips;
  for (std::uint32_t i = 1; i <= count; ++i) {
    timespec pause{pause_us / 1'000'000, pause_us % 1'000'000 * 1000};
    nanosleep(&pause, nullptr);
    std::int64_t start = dsline::base::monotonic_ns();
    tell(there, i);
    wait_for(back, i);
    trips.push_back(static_cast<double>(dsline::base::monotonic_ns() - start) * 1e-3);
  }
  waitpid(child, nullptr, 0);
  std::sort(trips.begin(), trips.end());
  auto at = [&trips](double share) {
    return trips[std::min(trips.size() - 1,
                          static_cast<std::size_t>(share * static_cast<double>(trips.size())))];
  };
  std::printf("{\"count\": %u, \"p50_us\": %.3f, \"p99_us\": %.3f, \"p999_us\": %.3f, \"max_us\": %.3f}\n",
              count, at(0.5), at(0.99), at(0.999), trips.back());
}
