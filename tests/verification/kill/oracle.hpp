#pragma once

#include <cstdint>
#include <functional>
#include <string>

#include "log.hpp"
#include "memory/region.hpp"
#include "plan.hpp"

/// Judges a round by what its processes have written down. See docs/verification for the promises.
namespace dsline::kill {

enum class Fault { Lost, Torn, Duplicated, Disordered, Leaked, Stuck, Other };

using Complain = std::function<void(Fault, const std::string&)>;

/// What has become of every message. `final_life` received what was left.
void judge_messages(const Plan& plan, const Log& log, std::uint64_t dropped_oldest, Tally& tally,
                    const Complain& complain);

/// After the last message has been released, and with `handles` handles open: nothing may be left in the region.
void judge_region(const memory::Region& region, std::uint32_t handles, const Complain& complain);

/// The state of a region, for people.
std::string dump_region(const memory::Region& region);

}  // namespace dsline::kill
