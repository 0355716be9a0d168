#pragma once

#include <cstdint>
#include <string>
#include <string_view>

#include "memory/region.hpp"
#include "slots/slot_pool.hpp"

namespace dsline::liveness {

/// Where a new group begins: with the next message, the oldest one that is still there, or the newest one.
enum class JoinAt { Next, Oldest, Latest };

/// Named groups: joining, leaving, and releasing what waits for a group that is gone.
///
/// Threads: every call but anything_stale() requires the control lock, and inside a process the handle's recovery mutex.
/// Invariants: 1. A number is given to a new group only while it is not active and no slot's word has its bit, looked at
///   after the new cursor was set. A sender that had loaded `active` before the old group left may still commit a message
///   with the bit; it enters at or behind the tail that the cursor was set from, so it is simply the new group's.
///   2. A bit is cleared only by the owner of the claim, or by the recoverer of a dead one. 3. A claim is written for a
///   late joiner by CAS from the value that was read before the word, and its bit is added by CAS of that word: a slot
///   that was reused in between changes the word, and an entering sender writes the claim after it.
/// Death: a member's entry names its group before the group is active, so whoever recovers it finds the group; leaving
///   and sweeping are idempotent and are done again by whoever joins, recovers, or finds the channel full.
class Membership {
 public:
  static constexpr std::uint32_t kNoGroup = ~std::uint32_t{0};

  Membership(memory::Region& region, slots::SlotPool& pool) noexcept : region_(&region), pool_(&pool) {}

  /// Number of the active group of that name; kNoGroup when there is none.
  std::uint32_t find(std::string_view name) const noexcept;
  std::string name(std::uint32_t group) const;
  /// kGroupDurable and kGroupDrops of an active group.
  std::uint32_t rules(std::uint32_t group) const noexcept;

  /// Makes `me` a member of an active group.
  void enter(std::uint32_t group, std::uint32_t me) noexcept;
  /// Makes a new group with `me` as its first member: its number; kNoGroup when all are taken.
  std::uint32_t make(std::string_view name, std::uint32_t rules, JoinAt start, std::uint32_t me) noexcept;
  /// `me` is no member any more; a group that is not durable goes with its last one.
  void leave(std::uint32_t me) noexcept;
  /// Its first member is done with what was there before it; also for a member that died over it.
  void end_joining(std::uint32_t group) noexcept;
  /// Ends a group, whoever is in it.
  void remove(std::uint32_t group, std::uint32_t me) noexcept;
  /// Ends groups that are not durable and have no members but `except` (a participant that is being recovered;
  /// kNoGroup: nobody).
  void remove_abandoned(std::uint32_t except, std::uint32_t me) noexcept;
  /// Releases what waits for groups that are gone.
  void sweep(std::uint32_t me) noexcept;

  /// True when sweep() or remove_abandoned() would find something. Needs no lock.
  bool anything_stale() const noexcept;

 private:
  bool is_named(std::uint32_t group) const noexcept;
  bool has_members(std::uint32_t group, std::uint32_t except) const noexcept;
  std::uint32_t active() const noexcept;
  bool is_in_use(std::uint32_t group) const noexcept;
  void forget_claims(std::uint32_t group) noexcept;
  void offer_old(std::uint32_t group, std::uint64_t from) noexcept;
  std::uint64_t offered_position(std::uint32_t s, slots::SlotWord word, std::uint32_t group,
                                 std::uint64_t tail) const noexcept;
  std::uint64_t first_position(JoinAt start, std::uint32_t group, std::uint64_t tail) const noexcept;
  void wait_for_senders(std::uint32_t group) const noexcept;

  memory::Region* region_;
  slots::SlotPool* pool_;
};

}  // namespace dsline::liveness
