#pragma once

#include <cstdint>
#include <functional>
#include <string>
#include <vector>

#include "log.hpp"
#include "memory/region.hpp"
#include "plan.hpp"

/// Judges a round by what its processes have written down. See docs/verification for the promises.
namespace dsline::kill {

enum class Fault { Lost, Torn, Duplicated, Disordered, Leaked, Stuck, Other };

using Complain = std::function<void(Fault, const std::string&)>;

/// What the channel says it has dropped.
struct Counts {
  std::vector<std::uint64_t>
      dropped_oldest;  ///< of the groups that were there from the start, in their order
  std::uint64_t letters_dropped = 0;
};

/// What has become of every message. The last life received what was left.
void judge_messages(const Plan& plan, const Log& log, const Counts& counts, Tally& tally,
                    const Complain& complain);

/// After the last message has been released, with `handles` handles open and `durable` named groups: nothing but the
/// history may be left in the region, and `history` messages of it at most.
void judge_region(const memory::Region& region, std::uint32_t handles, std::uint32_t durable,
                  std::uint32_t history, const Complain& complain);

/// Messages that only the history keeps.
std::uint32_t kept_messages(const memory::Region& region);

/// The state of a region, for people.
std::string dump_region(const memory::Region& region);

}  // namespace dsline::kill
