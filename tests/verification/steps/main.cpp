// Steps through every act of a process, instruction by instruction, and judges every state of the shared region that
// comes up on the way: it is what SIGKILL at that instruction leaves.
//
//   steps_checker [--long] [--seed S] [--act NAME] [--start NAME] [--json FILE]
//
// Besides, real SIGKILLs at some instructions, where the kernel drops the locks itself.
#include <sched.h>
#include <signal.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <cinttypes>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <string>
#include <unordered_set>
#include <vector>

#include "base/clock.hpp"
#include "judge.hpp"
#include "scene.hpp"
#include "stepper.hpp"

namespace dsline::steps {
namespace {

constexpr std::uint64_t kMostSteps = 3'000'000;
constexpr int kSkipped = 77;  // meson's word for it

struct Options {
  bool is_long = false;
  std::uint64_t seed = 1;
  std::string act;
  std::string start;
  std::string json;
};

struct Row {
  Act act;
  Start start;
  std::uint64_t steps = 0;
  std::uint64_t states = 0;
  std::uint64_t kills = 0;
  std::uint64_t violations = 0;
};

/// Both run on one core, where a switch is cheapest.
void stay_on_one_core() {
  cpu_set_t set;
  CPU_ZERO(&set);
  CPU_SET(sched_getcpu(), &set);
  sched_setaffinity(0, sizeof set, &set);
}

void complain(Row& row, std::uint64_t step, const char* how, const std::string& what) {
  if (++row.violations > 5) return;
  std::printf("VIOLATION: %s / %s, %s after %" PRIu64 " of its instructions: %s\n", act_name(row.act),
              start_name(row.start), how, step, what.c_str());
}

void walk_through(Row& row) {
  Scene scene(row.act, row.start);
  Walk way = walk(scene.mover(), scene.bytes(), scene.size(), kMostSteps);
  row.steps = way.steps;
  if (!way.finished) {
    complain(row, way.steps, "the act did not end", "status " + std::to_string(way.status));
    return;
  }
  scene.kill_mover();
  std::vector<Item> items = scene.items();
  std::unordered_set<std::string_view> known;
  for (const Snapshot& snapshot : way.snapshots) {
    std::string_view bytes(reinterpret_cast<const char*>(snapshot.bytes.data()), snapshot.bytes.size());
    if (!known.insert(bytes).second) continue;
    ++row.states;
    std::string wrong = judge_copy(snapshot.bytes, items, scene);
    if (!wrong.empty()) complain(row, snapshot.step, "a death", wrong);
  }
  std::string wrong = judge_end(items);
  if (!wrong.empty()) complain(row, way.steps, "nobody died", wrong);
}

void kill_really(Row& row, std::uint64_t step) {
  Scene scene(row.act, row.start);
  walk(scene.mover(), scene.bytes(), scene.size(), step);
  scene.kill_mover();
  ++row.kills;
  std::vector<Item> items = scene.items();
  std::string wrong = judge(
      scene.descriptor(), items, [&scene] { scene.kill_bystander(); }, scene);
  if (!wrong.empty()) complain(row, step, "SIGKILL", wrong);
}

bool write_json(const std::string& path, const std::vector<Row>& rows, const Row& sum, double seconds) {
  FILE* file = std::fopen(path.c_str(), "we");
  if (file == nullptr) {
    std::perror(path.c_str());
    return false;
  }
  std::fprintf(file,
               "{\n  \"seconds\": %.1f,\n  \"cases\": %zu,\n  \"instructions\": %" PRIu64
               ",\n  \"states\": %" PRIu64 ",\n  \"kills\": %" PRIu64 ",\n  \"violations\": %" PRIu64
               ",\n  \"by_case\": [",
               seconds, rows.size(), sum.steps, sum.states, sum.kills, sum.violations);
  for (std::size_t i = 0; i < rows.size(); ++i) {
    const Row& r = rows[i];
    std::fprintf(file,
                 "%s\n    {\"act\": \"%s\", \"start\": \"%s\", \"instructions\": %" PRIu64
                 ", \"states\": %" PRIu64 ", \"kills\": %" PRIu64 ", \"violations\": %" PRIu64 "}",
                 i == 0 ? "" : ",", act_name(r.act), start_name(r.start), r.steps, r.states, r.kills,
                 r.violations);
  }
  std::fprintf(file, "\n  ]\n}\n");
  return std::fclose(file) == 0;
}

Options parse(int argc, char** argv) {
  Options options;
  for (int i = 1; i < argc; ++i) {
    const std::string name = argv[i];
    const char* value = i + 1 < argc ? argv[i + 1] : nullptr;
    if (name == "--long") {
      options.is_long = true;
      continue;
    }
    if (value != nullptr && name == "--seed") {
      options.seed = strtoull(value, nullptr, 10);
    } else if (value != nullptr && name == "--act") {
      options.act = value;
    } else if (value != nullptr && name == "--start") {
      options.start = value;
    } else if (value != nullptr && name == "--json") {
      options.json = value;
    } else {
      std::fprintf(stderr, "steps_checker [--long] [--seed S] [--act NAME] [--start NAME] [--json FILE]\n");
      std::exit(2);
    }
    ++i;
  }
  return options;
}

int run(const Options& options) {
  const std::string why = why_no_stepping();
  if (!why.empty()) {
    std::printf("SKIPPED: no process can be stepped through here: %s\n", why.c_str());
    return kSkipped;
  }
  stay_on_one_core();
  std::mt19937_64 random(options.seed);
  const std::int64_t begin = base::monotonic_ns();
  std::vector<Row> rows;
  Row sum{};
  std::printf("%-17s %-15s %12s %8s %8s %10s\n", "act", "start", "instructions", "states", "SIGKILLs",
              "violations");
  for (std::uint32_t a = 0; a < kActs; ++a) {
    for (std::uint32_t s = 0; s < kStarts; ++s) {
      Row row{static_cast<Act>(a), static_cast<Start>(s)};
      if (!fits(row.act, row.start) || (!options.is_long && is_extra(row.act, row.start))) continue;
      if (!options.act.empty() && options.act != act_name(row.act)) continue;
      if (!options.start.empty() && options.start != start_name(row.start)) continue;
      try {
        walk_through(row);
        const std::uint64_t wanted = options.is_long ? 40 : row.steps < 4000 ? 4 : 1;
        for (std::uint64_t k = 0; k < wanted && row.steps > 0; ++k)
          kill_really(row, 1 + random() % row.steps);
      } catch (const std::exception& error) {
        complain(row, 0, "the scene failed", error.what());
      }
      std::printf("%-17s %-15s %12" PRIu64 " %8" PRIu64 " %8" PRIu64 " %10" PRIu64 "\n", act_name(row.act),
                  start_name(row.start), row.steps, row.states, row.kills, row.violations);
      std::fflush(stdout);
      rows.push_back(row);
      sum.steps += row.steps;
      sum.states += row.states;
      sum.kills += row.kills;
      sum.violations += row.violations;
    }
  }
  const double seconds = static_cast<double>(base::monotonic_ns() - begin) / 1e9;
  std::printf("%zu cases, %" PRIu64 " instructions, %" PRIu64 " distinct states judged, %" PRIu64
              " SIGKILLs, %" PRIu64 " violations, %.1f s (seed %" PRIu64 ")\n",
              rows.size(), sum.steps, sum.states, sum.kills, sum.violations, seconds, options.seed);
  bool good = sum.violations == 0 && sum.states > rows.size() && !rows.empty();
  if (!options.json.empty() && !write_json(options.json, rows, sum, seconds)) good = false;
  std::printf("%s\n", good ? "ok" : "FAILED");
  return good ? 0 : 1;
}

}  // namespace
}  // namespace dsline::steps

int main(int argc, char** argv) { return dsline::steps::run(dsline::steps::parse(argc, argv)); }
