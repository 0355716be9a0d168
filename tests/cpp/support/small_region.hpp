#pragma once

#include <unistd.h>

#include <cstdint>
#include <memory>

#include "liveness/participants.hpp"
#include "memory/region.hpp"
#include "order/order_ring.hpp"
#include "slots/slot_pool.hpp"

namespace dsline::support {

struct Shape {
  std::uint32_t slots = 4;
  std::uint32_t groups = 1;
  std::uint32_t participants = 4;
  std::uint64_t first_position = 0;
  memory::Rules rules = {1, 0, 3, 16, 1, 0};  // as ChannelOptions has them by default
  std::uint32_t active = ~0u;  // groups that are there from the start, of those that there can be
};

/// A new region over a memfd in the state in which a channel is created, with the groups of `shape` active.
inline std::unique_ptr<memory::Region> make_region(const Shape& shape) {
  auto region =
      memory::Region::create(memory::make_memfd_storage(),
                             memory::plan_geometry(shape.slots, 64, 64, shape.participants, shape.groups),
                             shape.rules, shape.first_position);
  slots::SlotPool::initialise(*region);
  order::OrderRing::initialise(*region, shape.first_position);
  for (std::uint32_t g = 0; g < shape.groups; ++g) {
    region->group(g).cursor.store(shape.first_position);
    if ((shape.active >> g & 1) != 0)
      region->group(g).state.store(memory::kGroupNamed | memory::kGroupDurable);
  }
  region->header().active.store(((1u << shape.groups) - 1) & shape.active);
  return region;
}

/// The same bytes through another handle, with locks of its own.
inline std::unique_ptr<memory::Region> open_again(const memory::Region& region) {
  return memory::Region::attach(memory::adopt_memfd_storage(dup(region.storage().descriptor())));
}

/// A participant with a handle of its own, which may die: its kernel locks go, its entry stays.
struct Peer {
  explicit Peer(const memory::Region& of)
      : region(open_again(of)), number(liveness::Participants(*region).try_join()) {}
  void die() { region.reset(); }

  std::unique_ptr<memory::Region> region;
  std::uint32_t number;
};

/// Takes a slot, commits it and enters it for `groups`, as a publisher does.
inline order::OrderRing::Entered publish(memory::Region& region, std::uint32_t s, std::uint32_t,
                                         std::uint32_t groups = 1) {
  slots::SlotPool pool(region);
  order::OrderRing ring(region);
  pool.commit(s, pool.word(s), groups);
  order::OrderRing::Entered entered = ring.enter(s, groups);
  pool.clear_pending(s, slots::kEnqueueing);
  ring.advance_tail(entered);
  return entered;
}

inline std::uint32_t send(memory::Region& region, std::uint32_t me = 0, std::uint32_t groups = 1) {
  std::uint32_t s = slots::SlotPool(region).try_alloc(me);
  if (s != slots::kNoSlot) publish(region, s, me, groups);
  return s;
}

inline slots::SlotWord word(const memory::Region& region, std::uint32_t s) {
  return {region.slot(s).word.load()};
}
inline slots::Claim claim(const memory::Region& region, std::uint32_t s, std::uint32_t g = 0) {
  return {region.claim(s, g).load()};
}

inline std::uint32_t free_slots(const memory::Region& region) {
  std::uint32_t free = 0;
  for (std::uint32_t s = 0; s < region.geometry().slots; ++s) free += word(region, s).is_free();
  return free;
}

/// Entries of participants that are in use, those of the dead included.
inline std::uint32_t used_entries(const memory::Region& region) {
  std::uint32_t used = 0;
  for (std::uint32_t i = 0; i < region.geometry().participants; ++i)
    used += region.participant(i).word.load() & 1;
  return used;
}

}  // namespace dsline::support
