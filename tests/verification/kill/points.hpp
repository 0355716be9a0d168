#pragma once

#include <atomic>
#include <cstdint>

#include "log.hpp"
#include "payload.hpp"

/// The labelled places of the core, by number.
namespace dsline::kill {

std::uint32_t point_count() noexcept;
const char* point_name(std::uint32_t point) noexcept;

/// What this process does from now on when it comes to a label.
struct Arming {
  Life* life;                        ///< nullptr: nothing at all
  std::atomic<std::uint64_t>* hits;  ///< by point
  std::uint32_t delay_one_in;        ///< 0: never waits at a label
  std::uint64_t seed;
};
void arm(const Arming& arming) noexcept;

}  // namespace dsline::kill
