/// Runs a fuzz target without libFuzzer: mutates its seeds, blindly, for --seconds. The inputs run in a forked child; one
/// that ends it is printed in hexadecimal and can be run again: --input FILE.

#include <sys/mman.h>

#include <atomic>
#include <iterator>

#include "fuzz/target.hpp"
#include "support.hpp"

namespace dsline::robust {
namespace {

constexpr std::size_t kLongest = 8192;
constexpr double kLongestInputSeconds = 5;

struct Shared {
  std::atomic<std::uint64_t> runs;
  std::atomic<std::int64_t> started_ns;
  std::size_t size;
  unsigned char input[kLongest];
};

std::string mutate(const std::vector<std::string>& seeds, Random& random) {
  std::string input = seeds[random.below(seeds.size())];
  for (std::uint64_t i = 1 + random.below(6); i > 0; --i) {
    const std::size_t at = input.empty() ? 0 : random.below(input.size());
    switch (random.below(9)) {
      case 0:
        if (!input.empty()) input[at] = static_cast<char>(input[at] ^ (1 << random.below(8)));
        break;
      case 1:
        if (!input.empty()) input[at] = static_cast<char>(random.next());
        break;
      case 2: {  // a number of interest
        static constexpr std::uint64_t kNumbers[] = {0,          1,          7,          8,
                                                     63,         64,         65,         127,
                                                     128,        255,        256,        0xFFFF,
                                                     65536,      65537,      0x7FFFFFFF, 0x80000000,
                                                     0xFFFFFFFF, 1ull << 43, 1ull << 44, 0x7FFFFFFFFFFFFFFF,
                                                     1ull << 63, ~0ull};
        const std::uint64_t value = kNumbers[random.below(std::size(kNumbers))];
        const std::size_t width = std::size_t{1} << random.below(4);
        if (at + width <= input.size()) std::memcpy(input.data() + at, &value, width);
        break;
      }
      case 3:
        if (!input.empty()) input.erase(at, 1 + random.below(16));
        break;
      case 4:
        input.insert(at, std::string(1 + random.below(16), static_cast<char>(random.next())));
        break;
      case 5: {  // a piece of another seed
        const std::string& other = seeds[random.below(seeds.size())];
        if (!other.empty()) input.insert(at, other.substr(random.below(other.size()), 1 + random.below(64)));
        break;
      }
      case 6:
        if (!input.empty()) input += input.substr(at, 1 + random.below(64));
        break;
      case 7:
        if (!input.empty()) input.resize(at);
        break;
      default:
        for (std::size_t k = 0; k < 8 && at + k < input.size(); ++k)
          input[at + k] = static_cast<char>(random.next());
    }
  }
  if (input.size() > kLongest) input.resize(kLongest);
  return input;
}

int run_file(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  const std::string input{std::istreambuf_iterator<char>(file), std::istreambuf_iterator<char>()};
  LLVMFuzzerTestOneInput(reinterpret_cast<const std::uint8_t*>(input.data()), input.size());
  std::printf("%zu bytes: good\n", input.size());
  return 0;
}

int run(const char* program, const Options& options) {
  const std::string name = std::string(program).substr(std::string(program).rfind('/') + 1);
  Report report(name, options);
  const std::vector<std::string> seeds = fuzz_seeds();
  report["seeds"] = seeds.size();
  void* page = mmap(nullptr, sizeof(Shared), PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
  if (page == MAP_FAILED) return 2;
  Shared& shared = *static_cast<Shared*>(page);
  const std::int64_t end = base::monotonic_ns() + static_cast<std::int64_t>(options.seconds * 1e9);
  for (std::uint64_t child_number = 0; report.failed() < 5 && base::monotonic_ns() < end; ++child_number) {
    shared.started_ns.store(base::monotonic_ns());
    const pid_t child = start_child([&] {
      Random random(options.seed * 7919 + child_number);
      for (std::uint64_t i = 0; base::monotonic_ns() < end; ++i) {
        const std::string input = child_number == 0 && i < seeds.size() ? seeds[i] : mutate(seeds, random);
        shared.size = input.size();
        std::memcpy(shared.input, input.data(), input.size());
        shared.started_ns.store(base::monotonic_ns());
        LLVMFuzzerTestOneInput(reinterpret_cast<const std::uint8_t*>(input.data()), input.size());
        shared.runs.fetch_add(1, std::memory_order_relaxed);
      }
      return 0;
    });
    int status = 0;
    while (waitpid(child, &status, WNOHANG) == 0) {
      if (static_cast<double>(base::monotonic_ns() - shared.started_ns.load()) > kLongestInputSeconds * 1e9) {
        kill(child, SIGKILL);
        waitpid(child, &status, 0);
        status = -1;
        break;
      }
      sleep_ns(2'000'000);
    }
    if (status == 0) continue;
    std::string hex;
    for (std::size_t i = 0; i < shared.size; ++i) {
      char digits[3];
      std::snprintf(digits, sizeof digits, "%02x", shared.input[i]);
      hex += digits;
    }
    report.fail(describe_status(status) + " with the input " + hex);
  }
  report["inputs"] = shared.runs;
  report.expect_at_least("inputs", 1000);
  report.expect_at_least("seeds", 2);
  return report.finish();
}

}  // namespace
}  // namespace dsline::robust

int main(int argc, char** argv) {
  using namespace dsline::robust;
  Options options = parse_options(argc, argv, 15);
  if (options.is_long && options.seconds < 900) options.seconds = 900;
  if (options.others.count("write-seeds") != 0) {
    write_seeds(options.others["write-seeds"]);
    return 0;
  }
  if (options.others.count("input") != 0) return run_file(options.others["input"]);
  return run(argv[0], options);
}
