// Kills processes of real channels at labelled places and at random times, and judges what is left by what they wrote
// down outside the channel.
//
//   kill_harness [--kills N] [--seed S] [--lanes L] [--seconds T] [--shape K] [--round R] [--json FILE]
//
// A round is one channel with its processes; lanes run rounds side by side. --seed and --round repeat one: the same
// channel and the same choices, not the same interleaving.
#include <signal.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include <cerrno>
#include <cinttypes>
#include <cstdio>
#include <cstring>
#include <new>
#include <vector>

#include "base/clock.hpp"
#include "report.hpp"
#include "round.hpp"

namespace dsline::kill {
namespace {

constexpr std::int64_t kSilenceNs = 60'000'000'000;

template <class T>
T* share() {
  void* at =
      mmap(nullptr, sizeof(T), PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (at == MAP_FAILED) {
    std::perror("mmap");
    std::exit(2);
  }
  return static_cast<T*>(at);
}

char folder[] = "/tmp/dsline-kill-XXXXXX";

// The harness itself was killed: its children follow by their own death signals, names are removed here, and the folder
// by the last lane.
extern "C" void on_orphaned(int) {
  if (path_to_remove[0] != 0) unlink(path_to_remove);
  rmdir(folder);
  _exit(1);
}

[[noreturn]] void run_lane(const Options& options, Shared& shared, Tally& tally) {
  signal(SIGTERM, on_orphaned);
  prctl(PR_SET_PDEATHSIG, SIGTERM);
  sigset_t child_ended;
  sigemptyset(&child_ended);
  sigaddset(&child_ended, SIGCHLD);
  sigprocmask(SIG_BLOCK, &child_ended, nullptr);
  Log* log = share<Log>();
  if (options.round != ~0ull) {
    tally.round = options.round;
    Round(make_plan(options.seed, options.round, options.shape), folder, *log, tally, shared).run();
    _exit(0);
  }
  while (!shared.stop) {
    const std::uint64_t round = shared.next_round++;
    tally.round = round;
    Round(make_plan(options.seed, round, options.shape), folder, *log, tally, shared).run();
  }
  _exit(0);
}

[[noreturn]] void usage(const char* why) {
  std::fprintf(
      stderr,
      "%s\nkill_harness [--kills N] [--seed S] [--lanes L] [--seconds T] [--shape NUMBER] [--round R] "
      "[--json FILE]\n",
      why);
  for (std::uint32_t s = 0; s < kShapes; ++s) std::fprintf(stderr, "  shape %u: %s\n", s, shape_name(s));
  std::exit(2);
}

Options parse(int argc, char** argv) {
  Options options;
  for (int i = 1; i + 1 < argc; i += 2) {
    const char* name = argv[i];
    const char* value = argv[i + 1];
    if (std::strcmp(name, "--kills") == 0) {
      options.kills = strtoull(value, nullptr, 10);
    } else if (std::strcmp(name, "--seed") == 0) {
      options.seed = strtoull(value, nullptr, 10);
    } else if (std::strcmp(name, "--lanes") == 0) {
      options.lanes = static_cast<std::uint32_t>(atoi(value));
    } else if (std::strcmp(name, "--seconds") == 0) {
      options.most_seconds = atof(value);
    } else if (std::strcmp(name, "--shape") == 0) {
      options.shape = static_cast<std::uint32_t>(atoi(value));
    } else if (std::strcmp(name, "--round") == 0) {
      options.round = strtoull(value, nullptr, 10);
      options.lanes = 1;
    } else if (std::strcmp(name, "--json") == 0) {
      options.json = value;
    } else {
      usage(name);
    }
  }
  if (argc % 2 == 0 || options.lanes < 1 || options.lanes > 64) usage("what is asked for is not clear");
  return options;
}

int run(const Options& options) {
  std::printf("seed %" PRIu64 ", %" PRIu64 " kills, %u lanes\n", options.seed, options.kills, options.lanes);
  std::fflush(stdout);
  if (mkdtemp(folder) == nullptr) {
    std::perror("mkdtemp");
    return 2;
  }
  Shared* shared = share<Shared>();
  std::vector<Tally*> tallies;
  std::vector<pid_t> lanes;
  for (std::uint32_t i = 0; i < options.lanes; ++i) {
    tallies.push_back(share<Tally>());
    const pid_t pid = fork();
    if (pid == 0) run_lane(options, *shared, *tallies.back());
    lanes.push_back(pid);
  }

  const std::int64_t start = base::monotonic_ns();
  std::vector<std::uint64_t> beats(options.lanes, 0);
  std::vector<std::int64_t> moved(options.lanes, start);
  std::int64_t told = start;
  bool good = true;
  std::uint32_t running = options.lanes;
  while (running > 0) {
    timespec tick{0, 20'000'000};
    nanosleep(&tick, nullptr);
    const std::int64_t now = base::monotonic_ns();
    const double seconds = static_cast<double>(now - start) / 1e9;
    if (shared->kills >= options.kills || (options.most_seconds > 0 && seconds > options.most_seconds)) {
      shared->stop = true;
    }
    if (now - told > 30'000'000'000) {
      std::printf("%8.0f s  %10" PRIu64 " kills\n", seconds, shared->kills.load());
      std::fflush(stdout);
      told = now;
    }
    for (std::uint32_t i = 0; i < options.lanes; ++i) {
      if (lanes[i] == 0) continue;
      int status = 0;
      if (waitpid(lanes[i], &status, WNOHANG) == lanes[i]) {
        if (!WIFEXITED(status) || WEXITSTATUS(status) != 0) {
          std::printf("FAILED: lane %u ended with status %x in round %" PRIu64 "\n", i, status,
                      tallies[i]->round.load());
          good = false;
        }
        lanes[i] = 0;
        --running;
        continue;
      }
      if (tallies[i]->heartbeat != beats[i]) {
        beats[i] = tallies[i]->heartbeat;
        moved[i] = now;
      } else if (now - moved[i] > kSilenceNs) {
        std::printf("FAILED: lane %u hangs in round %" PRIu64 "\n", i, tallies[i]->round.load());
        good = false;
        ::kill(lanes[i], SIGTERM);
        moved[i] = now;
      }
    }
  }
  const double seconds = static_cast<double>(base::monotonic_ns() - start) / 1e9;
  std::vector<const Tally*> results(tallies.begin(), tallies.end());
  if (!report(options, results, seconds)) good = false;
  if (rmdir(folder) != 0) {
    std::printf("FAILED: something is left in %s: %s\n", folder, strerror(errno));
    good = false;
  }
  return good ? 0 : 1;
}

}  // namespace
}  // namespace dsline::kill

int main(int argc, char** argv) { return dsline::kill::run(dsline::kill::parse(argc, argv)); }
