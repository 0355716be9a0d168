#pragma once

#include <cstdint>

#include "memory/region.hpp"

namespace dsline::liveness {

enum class EntryState : std::uint32_t { Free = 0, Used = 1 };

/// incarnation:56 | state:8 of a participant's entry.
struct EntryWord {
  std::uint64_t bits;
  static constexpr EntryWord make(std::uint64_t incarnation, EntryState state) noexcept {
    return {incarnation << 8 | static_cast<std::uint64_t>(state)};
  }
  constexpr std::uint64_t incarnation() const noexcept { return bits >> 8; }
  constexpr EntryState state() const noexcept { return static_cast<EntryState>(bits & 0xFF); }
};

/// The open handles of a region. A participant lives as long as the kernel lock of its number is held by its own open
/// file description; no pid and no clock takes part in the decision.
///
/// Threads: the caller holds the handle's recovery mutex (two locks through one open file description do not exclude
/// each other). Processes exclude each other by the locks.
/// Death: a number whose lock is free and whose entry is used belongs to a dead participant.
class Participants {
 public:
  static constexpr std::uint32_t kNobody = ~std::uint32_t{0};

  explicit Participants(memory::Region& region) noexcept : region_(&region) {}

  /// Takes a number for this process: its lock is held and its entry filled in. kNobody when all are taken by the
  /// living. Requires: the control lock, and that the dead have been recovered.
  std::uint32_t try_join() noexcept;

  /// Frees the entry and drops its lock. Requires: nothing in the region carries the number any more.
  void leave(std::uint32_t me) noexcept;

  EntryWord entry(std::uint32_t number) const noexcept {
    return {region_->participant(number).word.load(std::memory_order_acquire)};
  }
  /// True when a participant other than `me` holds its lock.
  bool anyone_else_alive(std::uint32_t me) const noexcept;
  /// Number of entries in use whose owners live, `me` included.
  std::uint32_t alive_guess(std::uint32_t me) const noexcept;

  /// Locks a used entry whose owner is dead, so that the caller alone may recover it. False when the owner lives, or
  /// somebody else is at it, or the entry has changed since it was looked at.
  bool try_lock_dead(std::uint32_t number) noexcept;
  /// Leaves a dead one that was locked to somebody else.
  void unlock_dead(std::uint32_t number) noexcept {
    region_->storage().unlock(memory::participant_lock(number));
  }
  /// Marks a recovered entry free and unlocks it.
  void bury(std::uint32_t number) noexcept { leave(number); }

 private:
  memory::Region* region_;
};

}  // namespace dsline::liveness
