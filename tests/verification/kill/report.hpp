#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "log.hpp"

namespace dsline::kill {

struct Options {
  std::uint64_t kills = 10'000;
  std::uint64_t seed = 1;
  std::uint32_t lanes = 3;
  std::uint32_t shape = ~0u;    ///< only this one
  std::uint64_t round = ~0ull;  ///< only this one
  double most_seconds = 0;      ///< 0: no limit but the number of kills
  std::string json;
};

/// Prints the table; true when nothing is wrong.
bool report(const Options& options, const std::vector<const Tally*>& lanes, double seconds);

}  // namespace dsline::kill
