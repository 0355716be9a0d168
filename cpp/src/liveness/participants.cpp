#include "liveness/participants.hpp"

#include <unistd.h>

#include "base/clock.hpp"
#include "base/points.hpp"
#include "base/process.hpp"

namespace dsline::liveness {

std::uint32_t Participants::try_join() noexcept {
  const std::uint32_t count = region_->geometry().participants;
  for (std::uint32_t i = 0; i < count; ++i) {
    if (entry(i).state() != EntryState::Free) continue;
    if (!region_->storage().try_lock(memory::participant_lock(i)))
      continue;  // its last owner is just leaving
    memory::ParticipantState& mine = region_->participant(i);
    EntryWord seen = entry(i);
    if (seen.state() != EntryState::Free) {
      region_->storage().unlock(memory::participant_lock(i));
      continue;
    }
    const std::uint32_t pid = static_cast<std::uint32_t>(getpid());
    mine.pid.store(pid, std::memory_order_relaxed);
    mine.group.store(0, std::memory_order_relaxed);
    mine.start_time.store(base::process_start_time(pid), std::memory_order_relaxed);
    mine.waiting_on.store(0, std::memory_order_relaxed);
    mine.left_writing.store(0, std::memory_order_relaxed);
    mine.left_held.store(0, std::memory_order_relaxed);
    mine.joined_ns.store(static_cast<std::uint64_t>(base::realtime_ns()), std::memory_order_relaxed);
    DSLINE_POINT("entry.before_used");
    mine.word.store(EntryWord::make(seen.incarnation() + 1, EntryState::Used).bits,
                    std::memory_order_release);
    DSLINE_POINT("entry.used");
    return i;
  }
  return kNobody;
}

void Participants::leave(std::uint32_t me) noexcept {
  memory::ParticipantState& mine = region_->participant(me);
  mine.word.store(EntryWord::make(entry(me).incarnation(), EntryState::Free).bits, std::memory_order_release);
  DSLINE_POINT("entry.before_unlock");
  region_->storage().unlock(memory::participant_lock(me));
}

std::uint32_t Participants::alive_guess(std::uint32_t me) const noexcept {
  std::uint32_t alive = 0;
  for (std::uint32_t i = 0; i < region_->geometry().participants; ++i) {
    if (entry(i).state() != EntryState::Used) continue;
    if (i == me || region_->storage().is_locked(memory::participant_lock(i))) ++alive;
  }
  return alive;
}

bool Participants::anyone_else_alive(std::uint32_t me) const noexcept {
  for (std::uint32_t i = 0; i < region_->geometry().participants; ++i) {
    if (i != me && region_->storage().is_locked(memory::participant_lock(i))) return true;
  }
  return false;
}

bool Participants::try_lock_dead(std::uint32_t number) noexcept {
  EntryWord seen = entry(number);
  if (seen.state() != EntryState::Used) return false;
  if (!region_->storage().try_lock(memory::participant_lock(number))) return false;
  // The kernel's hand-over of the lock orders every store of the dead owner before this load.
  if (entry(number).bits == seen.bits) return true;
  region_->storage().unlock(memory::participant_lock(number));
  return false;
}

}  // namespace dsline::liveness
