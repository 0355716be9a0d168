#include "channel/impl.hpp"

#include <unistd.h>

#include <algorithm>
#include <cstring>

#include "frames/frame_header.hpp"

namespace dsline {

using frames::FrameHeader;
using slots::SlotPhase;
using slots::SlotWord;

namespace {

constexpr std::uint64_t kPollsPerSweep = 16;
// How often a look at the newest message is repeated when senders overtake it.
constexpr int kLooks = 16;

}  // namespace

Outcome Channel::Impl::try_recv(Received& message) {
  enter();
  if (closed.load(std::memory_order_relaxed) || !may_receive()) [[unlikely]] {
    if (group_number == kNoGroup && joined == 0) {
      throw Error(
          ErrorCode::InvalidArgument,
          "channel '" + label + "' is a broadcast, which only its subscribers receive from: use subscribe()");
    }
    return Outcome::Closed;
  }
  order::Held held{};
  if (!letters.try_take(group, me, held)) {
    // Whoever only polls looks after the dead as well, now and then.
    count(empties);
    const bool due = (empties.load(std::memory_order_relaxed) & (kPollsPerSweep - 1)) == 0;
    if (!due || !sweep(false) || !letters.try_take(group, me, held)) return empty_or_ended();
  }
  if (group_number != 0 && !may_receive()) [[unlikely]] {
    // The group ended, and its number may be another one's: whose the message is will have it.
    message.slot = held.slot;
    message.sequence = held.position;
    message.attempts = held.attempts;
    message.group = group_number;
    message.process = process.load(std::memory_order_relaxed);
    give_back(message, Undelivered::Yes);
    return Outcome::Closed;
  }
  if ((active() & memory::kShutDownAtOnce) != 0) [[unlikely]] {
    // Its sender had looked before the shutdown.
    pool.clear_pending(held.slot, group.bit());
    return empty_or_ended();
  }
  count(taken);
  return take_frame(held, group, message);
}

/// Fills in `message` for what was taken. A damaged one is released, and what there is no memory for is put back.
Outcome Channel::Impl::take_frame(const order::Held& held, order::Group& from, Received& message) {
  message.slot = held.slot;
  message.attempts = held.attempts;
  message.sequence = held.position;
  message.group = from.number();
  message.process = process.load(std::memory_order_relaxed);
  const char* fault = nullptr;
  try {
    fault = read_frame(held.slot, message);
  } catch (...) {  // no memory for long metadata
    give_back(message, Undelivered::Yes);
    throw;
  }
  if (fault == nullptr) [[likely]]
    return Outcome::Ok;
  message.fault = fault;
  region->header().corrupted.fetch_add(1, std::memory_order_relaxed);
  pool.clear_pending_corrupted(held.slot, from.bit());
  return Outcome::Corrupted;
}

/// Copies header and metadata to private memory, checks the copy, and never looks at the shared ones again.
const char* Channel::Impl::read_frame(std::uint32_t s, Received& message) {
  const std::byte* at = region->read_frame(s);
  FrameHeader header;
  std::memcpy(&header, at, sizeof header);
  const std::uint64_t reserved =
      std::min(region->slot(s).room_bytes.load(std::memory_order_relaxed), region->geometry().stride_bytes);
  const std::uint64_t shift = memory::frame_shift(region->geometry(), s);
  const std::uint64_t room = reserved > shift ? reserved - shift : 0;
  frames::FrameFault fault = frames::check_lengths(header, room);
  if (fault != frames::FrameFault::None) [[unlikely]]
    return frames::describe(fault);
  message.meta_bytes = header.meta_bytes;
  std::byte* meta = message.inline_meta;
  if (header.meta_bytes > sizeof message.inline_meta) [[unlikely]] {
    message.long_meta.resize(header.meta_bytes);
    meta = message.long_meta.data();
  }
  if (header.meta_bytes != 0) std::memcpy(meta, at + sizeof header, header.meta_bytes);
  message.payload = at + frames::payload_offset(header.meta_bytes);
  message.payload_bytes = header.payload_bytes;
  fault = frames::check_sums(header, region->checksum(), meta, message.payload);
  if (fault != frames::FrameFault::None) [[unlikely]]
    return frames::describe(fault);
  message.schema_hash = header.schema_hash;
  message.timestamp_ns = header.timestamp_ns;
  message.kind = static_cast<int>(header.kind);
  return nullptr;
}

Outcome Channel::Impl::empty_or_ended() noexcept {
  const std::uint64_t state = active();
  if ((state & memory::kShutDown) == 0) [[likely]]
    return may_receive() ? Outcome::Empty : Outcome::Closed;
  if ((state & memory::kShutDownAtOnce) == 0 && !is_drained()) return Outcome::Empty;
  if (group.messages().anyone()) group.messages().wake_all();
  return Outcome::Closed;
}

/// After a shutdown: nothing can be delivered any more. A slot that is WRITING may have passed its look at `active`
/// before the shutdown, so it is waited for. What another member holds counts as delivered.
bool Channel::Impl::is_drained() noexcept {
  for (std::uint32_t s = 0; s < region->geometry().slots; ++s) {
    SlotWord word = pool.word(s);
    if (word.is(SlotPhase::Writing)) return false;
    if (!word.is(SlotPhase::Committed) || (word.pending() & group.bit()) == 0) continue;
    if (word.is_entering()) return false;
    const std::uint32_t who = group.claim(s).who();
    if (who == slots::Claim::kNobody || who == slots::Claim::kRedeliver) return false;
  }
  return true;
}

void Channel::Impl::release(std::uint32_t slot, std::uint32_t holder, std::uint32_t from) noexcept {
  if (holder != base::fork_generation() || left.load(std::memory_order_relaxed)) [[unlikely]]
    return;
  // The word comes first: while the claim is mine, it is the word of my message.
  const SlotWord word = pool.word(slot);
  if (!claimed_by_me(slot, from)) [[unlikely]]
    return;
  DSLINE_POINT("release.before");
  pool.clear_pending_of(slot, word, 1u << from);
  DSLINE_POINT("release.after");
  if (closed.load(std::memory_order_relaxed)) [[unlikely]]
    leave_if_idle();
}

void Channel::Impl::give_back(const Received& message, Undelivered undelivered) noexcept {
  if (message.process != base::fork_generation() || left.load(std::memory_order_relaxed)) return;
  const std::uint64_t state = active();
  if ((state & memory::kShutDownAtOnce) != 0 || (state >> message.group & 1) == 0) {
    release(message.slot, message.process, message.group);  // nobody will take it again
    return;
  }
  order::Group from(*region, message.group);
  const order::Held held{message.slot, message.sequence, message.attempts};
  if (message.attempts >= region->rules().max_deliveries) {
    letters.put_back(from, held, me);
  } else if (undelivered == Undelivered::Yes) {
    from.put_back(held, me);
  } else {
    from.give_back(held, me, static_cast<std::uint32_t>(getpid()));
  }
  if ((active() >> message.group & 1) == 0) tidy();  // it ended meanwhile
  if (closed.load(std::memory_order_relaxed)) leave_if_idle();
}

// Correct because of the last message of the order: once it is taken nothing stands at the cursor, so whoever has taken it
// keeps it only while another slot is free or being written, and that one stays free when no message follows.
bool Channel::Impl::is_last_to_circulate() const noexcept {
  if (pool.shows_a_free_slot() || group.anything_at_cursor()) [[likely]]
    return false;
  return !pool.anything_circulates(region->keeps_history() ? 1u << region->retention_group() : 0);
}

Outcome Channel::Impl::try_take_dead_letter(Received& message, DeadLetter& why) {
  enter();
  if (closed.load(std::memory_order_relaxed)) return Outcome::Closed;
  order::Held held{};
  std::uint32_t number = 0;
  if (!letters.try_take_letter(me, held, number)) return Outcome::Empty;
  order::Group from(*region, number);
  try {
    why.group = number == 0 ? std::string() : liveness::Membership(*region, pool).name(number);
  } catch (...) {
    letters.put_back(from, held, me);
    throw;
  }
  const std::uint64_t last = region->notes(held.slot, number).last_holder.load(std::memory_order_relaxed);
  why.last_pid = static_cast<std::uint32_t>(last >> 32);
  why.last_holder_died = (last & 0xFFFFFFFF) == memory::kHolderDied;
  return take_frame(held, from, message);
}

void Channel::Impl::revive(const Received& message) noexcept {
  if (message.process != base::fork_generation() || left.load(std::memory_order_relaxed)) return;
  order::Group to(*region, message.group);
  letters.revive(to, order::Held{message.slot, message.sequence, message.attempts}, me);
  if (!to.is_active()) tidy();
  if (closed.load(std::memory_order_relaxed)) leave_if_idle();
}

/// The newest message of the order, if the history still has it and it is newer than `newer_than`.
bool Channel::Impl::find_latest(bool any, std::uint64_t newer_than, std::uint32_t& slot,
                                std::uint64_t& position, SlotWord& word) const noexcept {
  for (int look = 0; look < kLooks; ++look) {
    std::uint64_t tail = ring.tail_guess();
    for (std::uint32_t i = 0; i < region->geometry().order_cells && ring.cell(tail).ahead_of(tail) == 0;
         ++i) {
      tail = slots::next_position(tail);
    }
    position = tail - 1;
    if ((position & slots::kPositionMask) == slots::kNoPositionLow) --position;
    if (!any && slots::distance(position & slots::kPositionMask, newer_than) <= 0) return false;
    const order::Cell cell = ring.cell(position);
    slot = cell.slot();
    if (cell.ahead_of(position) != 0 || slot >= region->geometry().slots) {
      if (cell.ahead_of(position) < 0) return false;
      continue;  // overtaken
    }
    word = pool.word(slot);
    if (word.is(SlotPhase::Committed) && (word.pending() >> region->retention_group() & 1) != 0 &&
        region->slot(slot).position.load(std::memory_order_acquire) == position)
      return true;
    if (ring.tail_guess() == tail) return false;  // a full channel has dropped all of its history
  }
  return false;
}

Outcome Channel::Impl::try_read_latest(bool any, std::uint64_t newer_than, Received& message) {
  enter();
  if (closed.load(std::memory_order_relaxed)) return Outcome::Closed;
  if (!region->keeps_history()) {
    throw Error(ErrorCode::InvalidArgument,
                "channel '" + label + "' keeps no history to look at; create it with history=1 or more");
  }
  SlotWord word{};
  for (int look = 0; look < kLooks && find_latest(any, newer_than, message.slot, message.sequence, word);
       ++look) {
    message.word = word.bits;
    message.attempts = 0;
    message.group = kNoGroup;
    message.process = process.load(std::memory_order_relaxed);
    message.fault = read_frame(message.slot, message);
    if (!is_unchanged(message)) continue;
    if (message.fault == nullptr) return Outcome::Ok;
    region->header().corrupted.fetch_add(1, std::memory_order_relaxed);
    return Outcome::Corrupted;
  }
  return closed_or_shut_down() ? Outcome::Closed : Outcome::Empty;
}

bool Channel::Impl::is_unchanged(const Received& message) const noexcept {
  // SYNC latest: what was read before the fence was there before the word changed; pairs with the compare-and-swap that
  // takes a slot for writing, whose generation is a new one.
  base::fence_acquire();
  return pool.word(message.slot).generation() == SlotWord{message.word}.generation();
}

Outcome Channel::try_recv(Received& message) { return impl_->try_recv(message); }

Outcome Channel::recv(Received& message, std::int64_t deadline_ns) {
  impl_->enter();
  Impl::Busy guard(*impl_);
  for (bool spin = true, last = false;;) {
    Outcome outcome = impl_->try_recv(message);
    if (outcome != Outcome::Empty) return outcome;
    if (last) return Outcome::TimedOut;
    Outcome waited = impl_->wait_for_message(deadline_ns, spin);
    spin = waited == Outcome::Ok;
    last = waited == Outcome::TimedOut;
  }
}

void Channel::release(std::uint32_t slot, std::uint32_t process, std::uint32_t group) noexcept {
  impl_->release(slot, process, group);
}
void Channel::give_back(const Received& message) noexcept {
  impl_->give_back(message, Impl::Undelivered::No);
}
void Channel::put_back(const Received& message) noexcept {
  impl_->give_back(message, Impl::Undelivered::Yes);
}
bool Channel::is_last_to_circulate() const noexcept { return impl_->is_last_to_circulate(); }
Outcome Channel::try_take_dead_letter(Received& message, DeadLetter& why) {
  return impl_->try_take_dead_letter(message, why);
}
void Channel::revive(const Received& message) noexcept { impl_->revive(message); }
Outcome Channel::try_read_latest(bool any, std::uint64_t newer_than, Received& message) {
  return impl_->try_read_latest(any, newer_than, message);
}
std::uint64_t Channel::payload_offset(const Received& message) const noexcept {
  return impl_->region->storage_offset(message.payload);
}
bool Channel::is_unchanged(const Received& message) const noexcept { return impl_->is_unchanged(message); }

}  // namespace dsline
