#pragma once

#include <dirent.h>
#include <signal.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include <cerrno>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <map>
#include <string>
#include <vector>

#include "base/clock.hpp"
#include "base/crc32c.hpp"

/// What the robustness programs share: options, a report, random numbers, children that end with their parent.
namespace dsline::robust {

/// Deterministic by its seed (splitmix64).
class Random {
 public:
  explicit Random(std::uint64_t seed) noexcept : state_(seed) {}
  std::uint64_t next() noexcept {
    std::uint64_t z = (state_ += 0x9E3779B97F4A7C15);
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9;
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB;
    return z ^ (z >> 31);
  }
  /// 0 … bound - 1. Requires: bound > 0.
  std::uint64_t below(std::uint64_t bound) noexcept { return next() % bound; }

 private:
  std::uint64_t state_;
};

struct Options {
  double seconds = 0;  ///< bound of programs that run for a time
  bool is_long = false;
  std::uint64_t seed = 1;
  std::string json;
  std::string only;  ///< part of the name of what is to run
  std::map<std::string, std::string> others;

  bool wants(const std::string& name) const { return only.empty() || name.find(only) != std::string::npos; }
  std::uint64_t number(const std::string& key, std::uint64_t otherwise) const {
    auto found = others.find(key);
    return found == others.end() ? otherwise : std::strtoull(found->second.c_str(), nullptr, 10);
  }
};

/// --seconds S --long --seed N --json FILE --only PART, and --KEY VALUE for what one program has beside.
inline Options parse_options(int argc, char** argv, double seconds) {
  Options options;
  options.seconds = seconds;
  for (int i = 1; i < argc; ++i) {
    const std::string word = argv[i];
    if (word == "--long") {
      options.is_long = true;
      continue;
    }
    if (word.rfind("--", 0) != 0 || i + 1 >= argc) {
      std::fprintf(stderr, "usage: %s [--seconds S] [--long] [--seed N] [--only PART] [--json FILE]\n",
                   argv[0]);
      std::exit(2);
    }
    const std::string value = argv[++i];
    if (word == "--seconds") {
      options.seconds = std::strtod(value.c_str(), nullptr);
    } else if (word == "--seed") {
      options.seed = std::strtoull(value.c_str(), nullptr, 10);
    } else if (word == "--json") {
      options.json = value;
    } else if (word == "--only") {
      options.only = value;
    } else {
      options.others[word.substr(2)] = value;
    }
  }
  return options;
}

/// Counts and failures of one program, printed and written as JSON.
class Report {
 public:
  Report(std::string program, const Options& options)
      : program_(std::move(program)), options_(options), started_ns_(base::monotonic_ns()) {}

  std::uint64_t& operator[](const std::string& count) { return counts_[count]; }
  void fail(const std::string& text) {
    ++failed_;
    if (failures_.size() < kMostShown) failures_.push_back(text);
    std::fprintf(stderr, "FAILED %s: %s\n", program_.c_str(), text.c_str());
  }
  /// A count that stayed below `least` shows that the program did not do its work.
  void expect_at_least(const std::string& count, std::uint64_t least) {
    if (counts_[count] < least) {
      fail("only " + std::to_string(counts_[count]) + " of '" + count + "', at least " +
           std::to_string(least) + " are needed");
    }
  }
  std::uint64_t failed() const noexcept { return failed_; }

  /// Exit code of the program.
  int finish() {
    const double seconds = static_cast<double>(base::monotonic_ns() - started_ns_) / 1e9;
    std::printf("%s: %s after %.1f s, seed %llu\n", program_.c_str(), failed_ == 0 ? "passed" : "FAILED",
                seconds, static_cast<unsigned long long>(options_.seed));
    for (const auto& [name, value] : counts_) {
      std::printf("  %-36s %llu\n", name.c_str(), static_cast<unsigned long long>(value));
    }
    std::fflush(stdout);
    if (!options_.json.empty()) write_json(seconds);
    return failed_ == 0 ? 0 : 1;
  }

 private:
  static constexpr std::size_t kMostShown = 200;

  static std::string quoted(const std::string& text) {
    std::string out = "\"";
    for (char c : text) {
      if (c == '"' || c == '\\') out += '\\';
      out += static_cast<unsigned char>(c) < ' ' ? ' ' : c;
    }
    return out + "\"";
  }

  void write_json(double seconds) const {
    std::ofstream file(options_.json);
    file << "{\"program\": " << quoted(program_) << ", \"seed\": " << options_.seed
         << ", \"long\": " << (options_.is_long ? "true" : "false") << ", \"seconds\": " << seconds
         << ", \"failures\": " << failed_;
    for (const auto& [name, value] : counts_) file << ", " << quoted(name) << ": " << value;
    file << ", \"what_failed\": [";
    const char* comma = "";
    for (const std::string& text : failures_) {
      file << comma << quoted(text);
      comma = ", ";
    }
    file << "]}\n";
  }

  std::string program_;
  Options options_;
  std::int64_t started_ns_;
  std::map<std::string, std::uint64_t> counts_;
  std::vector<std::string> failures_;
  std::uint64_t failed_ = 0;
};

/// Runs `work` in a forked child that ends with its parent; the child exits with what `work` returns.
template <class Work>
pid_t start_child(Work&& work) {
  std::fflush(nullptr);
  const pid_t parent = getpid();
  const pid_t child = fork();
  if (child != 0) return child;
  prctl(PR_SET_PDEATHSIG, SIGKILL);
  if (getppid() != parent) _exit(99);
  int code = 98;
  try {
    code = work();
  } catch (const std::exception& error) {
    std::fprintf(stderr, "child %d: %s\n", getpid(), error.what());
  }
  std::fflush(nullptr);
  _exit(code);
}

inline void sleep_ns(std::int64_t ns) noexcept {
  timespec pause{ns / 1'000'000'000, ns % 1'000'000'000};
  nanosleep(&pause, nullptr);
}

/// Its wait status; -1 when it still ran after `seconds`, and is killed then.
inline int wait_child(pid_t child, double seconds) {
  const std::int64_t deadline = base::monotonic_ns() + static_cast<std::int64_t>(seconds * 1e9);
  int status = 0;
  for (std::int64_t pause = 50'000;; pause = pause < 2'000'000 ? pause * 2 : pause) {
    const pid_t got = waitpid(child, &status, WNOHANG);
    if (got == child) return status;
    if (got < 0 && errno != EINTR) return -1;
    if (base::monotonic_ns() > deadline) break;
    sleep_ns(pause);
  }
  kill(child, SIGKILL);
  waitpid(child, &status, 0);
  return -1;
}

inline std::string describe_status(int status) {
  if (status == -1) return "did not end in time";
  if (WIFSIGNALED(status)) return std::string("died by ") + strsignal(WTERMSIG(status));
  return "exit code " + std::to_string(WEXITSTATUS(status));
}

/// Open descriptors of a process.
inline std::size_t count_descriptors(pid_t process) {
  const std::string path = "/proc/" + std::to_string(process) + "/fd";
  DIR* folder = opendir(path.c_str());
  if (folder == nullptr) return 0;
  std::size_t count = 0;
  while (const dirent* entry = readdir(folder)) count += entry->d_name[0] != '.';
  closedir(folder);
  return process == getpid() ? count - 1 : count;  // less the one that lists them
}

/// Lines of a process's memory map that contain `text`.
inline std::size_t count_mappings(pid_t process, const std::string& text) {
  std::ifstream maps("/proc/" + std::to_string(process) + "/maps");
  std::size_t count = 0;
  for (std::string line; std::getline(maps, line);) count += line.find(text) != std::string::npos;
  return count;
}

/// Resident bytes of a process, without what it shares.
inline std::uint64_t private_bytes(pid_t process) {
  std::ifstream file("/proc/" + std::to_string(process) + "/statm");
  std::uint64_t size = 0, resident = 0, shared = 0;
  file >> size >> resident >> shared;
  return (resident - shared) * 4096;
}

/// A payload that proves itself: {writer, number, length, CRC of the rest}, then bytes that follow from the number.
inline constexpr std::size_t kProofBytes = 24;
inline void make_proof(std::byte* at, std::size_t size, std::uint32_t writer, std::uint64_t number) noexcept {
  for (std::size_t i = kProofBytes; i < size; ++i) {
    at[i] = static_cast<std::byte>((number * 131 + writer * 17 + i * 7) & 0xFF);
  }
  const std::uint64_t length = size;
  std::memcpy(at, &writer, 4);
  std::memcpy(at + 8, &number, 8);
  std::memcpy(at + 16, &length, 8);
  std::uint32_t crc = base::crc32c(at + 8, size - 8, writer);
  std::memcpy(at + 4, &crc, 4);
}
struct Proof {
  bool is_good = false;
  std::uint32_t writer = 0;
  std::uint64_t number = 0;
};
inline Proof read_proof(const std::byte* at, std::size_t size) noexcept {
  Proof proof;
  if (size < kProofBytes) return proof;
  std::uint64_t length = 0;
  std::uint32_t crc = 0;
  std::memcpy(&proof.writer, at, 4);
  std::memcpy(&crc, at + 4, 4);
  std::memcpy(&proof.number, at + 8, 8);
  std::memcpy(&length, at + 16, 8);
  proof.is_good = length == size && crc == base::crc32c(at + 8, size - 8, proof.writer);
  return proof;
}

}  // namespace dsline::robust
