#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>

#include "simulation.hpp"

namespace {

int usage() {
  std::fprintf(
      stderr,
      "model --list\n"
      "model --setup NAME [--mutant N] [--max-states N] [--max-seconds S] [--preemptions N] [--no-end]\n"
      "      [--histories] [--trace]\n");
  return 2;
}

}  // namespace

#if defined(DSLINE_MUTANTS)
int dsline_mutant = 0;
#endif

int main(int argc, char** argv) {
  using namespace dsline::model;
  std::string name;
  Bounds bounds;
  bool show_trace = false;
  for (int i = 1; i < argc; ++i) {
    const std::string option = argv[i];
    auto value = [&]() -> const char* {
      if (i + 1 == argc) std::exit(usage());
      return argv[++i];
    };
    if (option == "--list") {
      for (const Setup& setup : setups())
        std::printf("%s\t%d\t%s\t%s\n", setup.name.c_str(), setup.kills, setup.is_long ? "long" : "short",
                    setup.what.c_str());
      return 0;
    }
    if (option == "--setup") {
      name = value();
    } else if (option == "--max-states") {
      bounds.max_states = std::strtoull(value(), nullptr, 10);
    } else if (option == "--max-seconds") {
      bounds.max_seconds = std::atof(value());
    } else if (option == "--preemptions") {
      bounds.preemptions = std::atoi(value());
    } else if (option == "--no-end") {
      bounds.kill_everybody = false;
    } else if (option == "--histories") {
      bounds.compare_stacks = false;
    } else if (option == "--trace") {
      show_trace = true;
#if defined(DSLINE_MUTANTS)
    } else if (option == "--mutant") {
      dsline_mutant = std::atoi(value());
#endif
    } else {
      return usage();
    }
  }
  for (const Setup& setup : setups()) {
    if (setup.name != name) continue;
    Simulation simulation(setup);
    const Result result = explore(simulation, bounds);
    std::printf(
        "{\"setup\": \"%s\", \"states\": %llu, \"steps\": %llu, \"kills\": %llu, \"rests\": %llu, \"ends\": "
        "%llu, \"depth\": %llu, "
        "\"shared_words\": %llu, \"seconds\": %.2f, \"complete\": %s, \"violation\": \"%s\"}\n",
        name.c_str(), static_cast<unsigned long long>(result.states),
        static_cast<unsigned long long>(result.steps), static_cast<unsigned long long>(result.kills),
        static_cast<unsigned long long>(result.checks_at_rest), static_cast<unsigned long long>(result.ends),
        static_cast<unsigned long long>(result.depth), static_cast<unsigned long long>(result.shared_words),
        result.seconds, result.cut ? "false" : "true", result.violation.c_str());
    if (show_trace) {
      for (const std::string& line : result.trace) std::printf("  %s\n", line.c_str());
    }
    return result.violation.empty() ? 0 : 1;
  }
  return usage();
}
