#include <cstring>

#include "channel/impl.hpp"
#include "frames/frame_header.hpp"

namespace dsline {

using slots::Claim;
using slots::SlotPhase;
using slots::SlotWord;

bool Channel::Impl::anyone_entering() const noexcept {
  const bool is_member = !is_inherited() && !left.load(std::memory_order_relaxed);
  for (std::uint32_t s = 0; s < region->geometry().slots; ++s) {
    const SlotWord word = pool.word(s);
    if (word.is_entering() && !(is_member && word.owner() == me)) return true;
  }
  return false;
}

/// Whether a message of the order that `wanted(position, slot)` is still to be finished by the group of this handle.
///
/// A message keeps its slot, its position and its group bit from the cell's CAS until the group is done with it, so one look
/// at every slot finds it wherever its claim is moving to meanwhile. A slot that is entering may show the position of an
/// earlier message: "yes" for a moment too long, never "no" too early.
template <class Wanted>
bool Channel::Impl::any_outstanding(Wanted wanted) const noexcept {
  if (group_number == kNoGroup) return false;
  for (std::uint32_t s = 0; s < region->geometry().slots; ++s) {
    const SlotWord word = pool.word(s);
    if (!word.is(SlotPhase::Committed) || (word.pending() & group.bit()) == 0) continue;
    // After the word, and ordered by it: of the message that the word speaks of, or of a later one, and then the group is
    // done with that message.
    const std::uint64_t position = region->slot(s).position.load(std::memory_order_acquire);
    if (position != slots::kNoPosition && wanted(position, s) && group.claim(s).who() != Claim::kDead)
      return true;
  }
  return false;
}

bool Channel::Impl::is_outstanding(std::uint64_t sequence) const noexcept {
  // First: its acquire loads make position and word of everything before the end visible.
  if (sequence >= ring.end()) return true;
  return any_outstanding([sequence](std::uint64_t position, std::uint32_t) { return position == sequence; });
}

bool Channel::Impl::anything_before(std::uint64_t sequence, bool control) const noexcept {
  if (sequence > ring.end()) return true;
  return any_outstanding([this, sequence, control](std::uint64_t position, std::uint32_t s) {
    if (position >= sequence) return false;
    if (!control) return true;
    // The slot may be another message's already, which the caller asks about for a moment in vain.
    frames::FrameHeader header;
    std::memcpy(&header, region->read_frame(s), sizeof header);
    return static_cast<int>(header.kind) >= kEndMessage;
  });
}

std::uint64_t Channel::Impl::first_available() const noexcept {
  std::uint64_t first = ring.end();  // first: what enters later is behind it
  if (group_number == kNoGroup) return first;
  for (std::uint32_t s = 0; s < region->geometry().slots; ++s) {
    const SlotWord word = pool.word(s);
    if (!word.is(SlotPhase::Committed) || (word.pending() & group.bit()) == 0) continue;
    const std::uint64_t position = region->slot(s).position.load(std::memory_order_acquire);
    const std::uint32_t who = group.claim(s).who();
    if (position != slots::kNoPosition && position < first &&
        (who == Claim::kNobody || who == Claim::kRedeliver))
      first = position;
  }
  return first;
}

bool Channel::anyone_entering() const noexcept { return impl_->anyone_entering(); }
std::uint64_t Channel::end_of_order() const noexcept { return impl_->ring.end(); }
bool Channel::is_outstanding(std::uint64_t sequence) const noexcept {
  return impl_->is_outstanding(sequence);
}
bool Channel::anything_outstanding_before(std::uint64_t sequence) const noexcept {
  return impl_->anything_before(sequence, false);
}
bool Channel::any_control_before(std::uint64_t sequence) const noexcept {
  return impl_->anything_before(sequence, true);
}

std::uint64_t Channel::first_available() const noexcept { return impl_->first_available(); }

}  // namespace dsline
