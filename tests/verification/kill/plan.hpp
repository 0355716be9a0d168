#pragma once

#include <cstdint>
#include <string>

#include "dsline/channel.hpp"
#include "log.hpp"

/// Which processes a round has, on which channel, and how they behave. All of it follows from the seed.
namespace dsline::kill {

enum class Shape : std::uint32_t {
  OneToOne,
  WorkQueue,
  DropOldest,
  DropNewest,
  Reattach,
  Steady,
  Broadcast,
  SlowViewers,
  History,
  DeadLetters,
  DropOnDeath,
  Creators,
};
inline constexpr std::uint32_t kShapes = 12;
static_assert(kShapes <= kMostShapes);
const char* shape_name(std::uint32_t shape) noexcept;

enum class Place : std::uint32_t { Memfd, Shm, File };
const char* place_name(Place place) noexcept;

struct Plan {
  std::uint64_t seed;
  std::uint64_t round;
  Shape shape;
  Place place;
  ChannelOptions options;
  Backpressure policy;
  std::uint32_t wanted[kRoles];    ///< processes of each role
  std::uint32_t durable;           ///< groups that are there from the start, beside the default group
  bool drops;                      ///< on_death of the durable groups: drop
  Start start;                     ///< of viewers
  std::uint32_t most_held;         ///< messages that a consumer holds at once
  std::uint32_t largest;           ///< payload bytes
  std::uint32_t send_pause_us;     ///< at most, after a message; 0: none
  std::uint32_t hold_pause_us;     ///< at most, while holding
  std::uint32_t give_back_one_in;  ///< 0: never
  std::uint32_t leave_one_in;      ///< messages; 0: stays
  std::uint32_t delay_one_in;      ///< labels at which a process lingers; 0: none
  std::uint32_t kills;             ///< until the round ends
  std::uint32_t life_us;           ///< a process is killed at the latest after about this time
  std::uint32_t respawn_delay_us;  ///< at most, for some of the successors
  std::uint32_t respawn_least_us;  ///< at least, for all
  bool has_keeper;                 ///< the supervisor keeps a handle open
  bool inherits;                   ///< children go on with the supervisor's handle
  bool stops;                      ///< some are stopped for a while
  bool ends_by_kill;               ///< all are killed at the end; else they leave in order
};

/// `only` < kShapes: that shape.
Plan make_plan(std::uint64_t seed, std::uint64_t round, std::uint32_t only);

}  // namespace dsline::kill
