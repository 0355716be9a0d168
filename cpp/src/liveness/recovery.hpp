#pragma once

#include <cstdint>

#include "memory/region.hpp"

namespace dsline::liveness {

/// Recovers every dead participant but `me` (protocol.md, V0 to V9): frees what it was writing, enters into the order
/// what it had committed, gives what it held to another member of the group. Returns how many were recovered.
///
/// Requires: one thread of this handle at a time, and `me` is a participant of this handle, or Participants::kNobody
/// while it joins. `has_control`: the caller holds the control lock. Without it the lock is tried where the dead one
/// was a member of a named group, and if somebody else has it, that participant is left for the next time.
/// Death: every step is idempotent and done under the dead participant's lock; if the recoverer dies, the kernel drops
///   the lock and the next one starts over.
std::uint32_t recover_the_dead(memory::Region& region, std::uint32_t me, bool has_control) noexcept;

/// Frees what still carries a number that nobody had: for the participant that has just got it, before it does anything.
void recover_leftovers(memory::Region& region, std::uint32_t me) noexcept;

/// Rebuilds order, tail and cursors from the committed slots, by position, and forgets every participant. For a file
/// from an earlier boot, whose pages may have reached the disk in any order.
/// Requires: the control lock, and nobody is attached.
void rebuild(memory::Region& region);

}  // namespace dsline::liveness
