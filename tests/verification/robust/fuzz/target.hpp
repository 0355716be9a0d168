#pragma once

#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <string>
#include <vector>

/// A fuzz target: LLVMFuzzerTestOneInput() for libFuzzer, and for driver.cpp where there is no clang. Its seeds are made
/// by code. A rule that does not hold ends the process.
extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size);

namespace dsline::robust {

std::vector<std::string> fuzz_seeds();

/// Requires: `folder` exists.
inline void write_seeds(const std::string& folder) {
  std::size_t number = 0;
  for (const std::string& seed : fuzz_seeds()) {
    std::ofstream file(folder + "/seed-" + std::to_string(number++), std::ios::binary);
    file.write(seed.data(), static_cast<std::streamsize>(seed.size()));
  }
}

inline void require(bool rule, const char* text) {
  if (rule) return;
  std::fprintf(stderr, "does not hold: %s\n", text);
  std::abort();
}

/// Reads an input piece by piece; zeros behind its end.
class Input {
 public:
  Input(const std::uint8_t* data, std::size_t size) noexcept : at_(data), end_(data + size) {}
  std::size_t left() const noexcept { return static_cast<std::size_t>(end_ - at_); }
  const std::uint8_t* rest() const noexcept { return at_; }
  template <class T>
  T take() noexcept {
    T value{};
    auto* to = reinterpret_cast<unsigned char*>(&value);
    for (std::size_t i = 0; i < sizeof value && at_ != end_; ++i) to[i] = *at_++;
    return value;
  }

 private:
  const std::uint8_t* at_;
  const std::uint8_t* end_;
};

}  // namespace dsline::robust
