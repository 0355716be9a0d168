#include "channel/report.hpp"

#include <algorithm>
#include <array>
#include <cstring>

#include "base/clock.hpp"
#include "base/process.hpp"
#include "channel/attach.hpp"
#include "channel/directory.hpp"
#include "channel/impl.hpp"
#include "liveness/participants.hpp"

namespace dsline {

using liveness::Participants;
using slots::Claim;
using slots::SlotPhase;
using slots::SlotWord;

namespace channel {
namespace {

const char* state_name(SlotWord word, bool pinned) noexcept {
  if (word.is_free()) return "FREE";
  if (word.is(SlotPhase::Writing)) return "WRITING";
  if (word.is_kept() && (word.pending() & slots::kGroupBits) == 0) return "KEPT";
  if (word.is(SlotPhase::Committed)) return pinned ? "PINNED" : "COMMITTED";
  return "CORRUPTED";
}

bool is_retention(const memory::Region& region, std::uint32_t g) noexcept {
  return region.keeps_history() && g == region.retention_group();
}

std::string uuid_of(const memory::Region& region) {
  std::array<unsigned char, 16> id{};
  std::memcpy(id.data(), region.header().uuid, id.size());
  return base::to_hex(id);
}

std::vector<Report::Participant> participants_of(memory::Region& region, std::uint32_t me) {
  std::vector<Report::Participant> out;
  const Participants participants(region);
  for (std::uint32_t i = 0; i < region.geometry().participants; ++i) {
    if (participants.entry(i).state() != liveness::EntryState::Used) continue;
    const memory::ParticipantState& entry = region.participant(i);
    Report::Participant one;
    one.number = i;
    one.pid = entry.pid.load(std::memory_order_relaxed);
    one.start_time = entry.start_time.load(std::memory_order_relaxed);
    one.joined_ns = entry.joined_ns.load(std::memory_order_relaxed);
    one.waiting_on = static_cast<std::uint32_t>(entry.waiting_on.load(std::memory_order_relaxed));
    one.group = entry.group.load(std::memory_order_relaxed) - 1;  // 0 becomes kNoGroup
    one.alive = i == me || region.storage().is_locked(memory::participant_lock(i));
    out.push_back(one);
  }
  return out;
}

}  // namespace

ChannelStats count(memory::Region& region, std::uint32_t number, std::uint32_t me) noexcept {
  ChannelStats out;
  const memory::Geometry& g = region.geometry();
  const memory::RegionHeader& header = region.header();
  slots::SlotPool pool(region);
  const order::Group group(region, number);
  out.depth = group.depth();
  out.next_sequence = order::OrderRing(region).tail_guess();
  out.head_sequence = group.state().cursor.load(std::memory_order_relaxed);
  out.dropped_newest = header.dropped_newest.load(std::memory_order_relaxed);
  out.unheard = header.unheard.load(std::memory_order_relaxed);
  out.corrupted = header.corrupted.load(std::memory_order_relaxed);
  out.deaths = header.deaths.load(std::memory_order_relaxed);
  out.buried = header.buried.load(std::memory_order_relaxed);
  out.letters_dropped = header.letters_dropped.load(std::memory_order_relaxed);
  out.dropped_oldest = group.state().dropped_oldest.load(std::memory_order_relaxed);
  out.redelivered = group.state().redelivered.load(std::memory_order_relaxed);
  out.reserved_bytes = g.arena_offset;
  out.participants = Participants(region).alive_guess(me);
  for (std::uint32_t s = 0; s < g.slots; ++s) {
    out.reserved_bytes += region.slot(s).room_bytes.load(std::memory_order_relaxed);
    const SlotWord word = pool.word(s);
    if (word.is_free()) {
      ++out.free_slots;
    } else if (word.is(SlotPhase::Writing)) {
      ++out.writing_slots;
    } else if (word.is(SlotPhase::Corrupted)) {
      ++out.corrupted_slots;
    } else {
      ++out.committed_slots;
      bool pinned = false, mine = false, dead = false;
      for (std::uint32_t i = 0; i < g.groups; ++i) {
        if ((word.pending() >> i & 1) == 0) continue;
        const Claim claim{region.claim(s, i).load(std::memory_order_acquire)};
        pinned = pinned || claim.is_held();
        mine = mine || (me != Participants::kNobody && claim.who() == Claim::holder(me));
        dead = dead || claim.who() == Claim::kDead;
      }
      out.pinned_slots += pinned;
      out.pinned_by_me += mine;
      out.dead_letters += dead;
      out.kept_slots += word.is_kept();
    }
  }
  return out;
}

Report report(memory::Region& region, const std::string& path, std::uint32_t me) {
  Report out;
  const memory::Geometry& geometry = region.geometry();
  const memory::RegionHeader& header = region.header();
  const std::uint64_t active = header.active.load(std::memory_order_acquire);
  slots::SlotPool pool(region);
  liveness::Membership membership(region, pool);
  out.path = path;
  out.storage = memory::storage_name(static_cast<memory::StorageKind>(header.storage));
  out.uuid = uuid_of(region);
  out.created_ns = header.created_ns;
  out.creator_pid = header.creator_pid;
  out.slot_size = geometry.slot_bytes;
  out.max_message_size = geometry.max_message_bytes;
  out.next_sequence = order::OrderRing(region).tail_guess();
  out.max_handles = geometry.participants;
  out.history = region.rules().history;
  out.max_deliveries = region.rules().max_deliveries;
  out.default_group = region.rules().default_group != 0;
  out.sync = region.rules().sync != 0;
  out.shut_down = (active & memory::kShutDown) != 0;
  const auto boot = base::boot_id();
  out.other_boot = std::memcmp(header.boot_id, boot.data(), boot.size()) != 0;
  out.stats = count(region, 0, me);
  out.participants = participants_of(region, me);

  for (std::uint32_t g = 0; g < geometry.groups; ++g) {
    if ((active >> g & 1) == 0) continue;
    const order::Group group(region, g);
    Report::Group one;
    one.number = g;
    one.name = g == 0 || is_retention(region, g) ? std::string() : membership.name(g);
    one.active = true;
    one.durable = g == 0 || (membership.rules(g) & memory::kGroupDurable) != 0;
    one.retention = is_retention(region, g);
    one.on_death = (membership.rules(g) & memory::kGroupDrops) != 0 ? OnDeath::Drop : OnDeath::Redeliver;
    for (const Report::Participant& participant : out.participants) one.members += participant.group == g;
    one.cursor = group.state().cursor.load(std::memory_order_relaxed);
    one.lag = group.depth();
    one.dropped_oldest = group.state().dropped_oldest.load(std::memory_order_relaxed);
    one.redelivered = group.state().redelivered.load(std::memory_order_relaxed);
    out.groups.push_back(one);
  }

  const std::int64_t now = base::coarse_ns();
  auto participant = [&out](std::uint32_t number) -> Report::Participant* {
    for (Report::Participant& one : out.participants) {
      if (one.number == number) return &one;
    }
    return nullptr;
  };
  for (std::uint32_t s = 0; s < geometry.slots; ++s) {
    const SlotWord word = pool.word(s);
    if (word.is_free()) continue;
    Report::Slot one;
    one.number = s;
    one.owner = word.owner() == slots::kNoOwner ? Report::kNoGroup : word.owner();
    one.pending = word.is(SlotPhase::Committed) ? word.pending() & slots::kGroupBits : 0;
    one.sequence = region.slot(s).position.load(std::memory_order_relaxed);
    one.reserved_bytes = region.slot(s).room_bytes.load(std::memory_order_relaxed);
    if (word.is(SlotPhase::Writing)) {
      if (Report::Participant* owner = participant(word.owner())) ++owner->writing;
    }
    if (word.is_kept()) {
      if (Report::Participant* owner = participant(word.owner())) ++owner->kept;
    }
    for (std::uint32_t g = 0; g < geometry.groups; ++g) {
      if ((one.pending >> g & 1) == 0) continue;
      const Claim claim{region.claim(s, g).load(std::memory_order_acquire)};
      for (Report::Group& group : out.groups) {
        if (group.number != g) continue;
        group.held += claim.is_held();
        group.dead_letters += claim.who() == Claim::kDead;
      }
      if (!claim.is_held()) continue;
      Report::Holder holder;
      holder.group = g;
      holder.participant = claim.who() - 1;
      holder.attempts = claim.attempts();
      const std::uint64_t taken = region.notes(s, g).taken_ns.load(std::memory_order_relaxed);
      holder.for_ns = std::max<std::int64_t>(0, now - static_cast<std::int64_t>(taken));
      if (Report::Participant* member = participant(holder.participant)) {
        ++member->held;
        member->held_for_ns = std::max(member->held_for_ns, holder.for_ns);
      }
      one.holders.push_back(holder);
    }
    one.state = state_name(word, !one.holders.empty());
    out.slots.push_back(std::move(one));
  }
  return out;
}

}  // namespace channel

ChannelStats Channel::Impl::stats() const noexcept {
  ChannelStats out =
      channel::count(*region, group.number(), is_inherited() || left ? Participants::kNobody : me);
  out.lost = out.dropped_oldest - dropped_before;
  if (group_number != 0 &&
      (group_number == kNoGroup || group.state().joined.load(std::memory_order_relaxed) != joined)) {
    out.depth = out.dropped_oldest = out.lost = out.redelivered = 0;
    out.head_sequence = out.next_sequence;
  }
  out.send_waits = send_waits.load(std::memory_order_relaxed);
  out.recv_waits = recv_waits.load(std::memory_order_relaxed);
  return out;
}

std::vector<Death> Channel::Impl::deaths_since(std::uint64_t first) const {
  std::vector<Death> out;
  const std::uint64_t end = region->header().deaths.load(std::memory_order_acquire);
  if (end > memory::kDeathsKept) first = std::max(first, end - memory::kDeathsKept);
  for (std::uint64_t number = first; number < end; ++number) {
    const memory::DeathState& record = region->header().death[number % memory::kDeathsKept];
    // SYNC death: pairs with the release store that finishes the record.
    if (record.sequence.load(std::memory_order_acquire) != number + 1) continue;
    Death death;
    death.number = number;
    death.noticed_ns = record.noticed_ns.load(std::memory_order_relaxed);
    death.joined_ns = record.joined_ns.load(std::memory_order_relaxed);
    death.start_time = record.start_time.load(std::memory_order_relaxed);
    death.pid = record.pid.load(std::memory_order_relaxed);
    death.participant = record.participant.load(std::memory_order_relaxed);
    death.writing = record.writing.load(std::memory_order_relaxed);
    death.held = record.held.load(std::memory_order_relaxed);
    const std::uint32_t group = record.group.load(std::memory_order_relaxed);
    if (group >= 2 && group <= region->geometry().groups &&
        region->group(group - 1).joined.load(std::memory_order_relaxed) ==
            record.group_joined.load(std::memory_order_relaxed)) {
      death.group = liveness::Membership(*region, const_cast<slots::SlotPool&>(pool)).name(group - 1);
    }
    base::fence_acquire();
    if (record.sequence.load(std::memory_order_relaxed) != number + 1) continue;
    // A recoverer that died after it had recorded the death leaves it to the next one, which records it again.
    const bool again = std::any_of(out.begin(), out.end(), [&death](const Death& other) {
      return other.participant == death.participant && other.joined_ns == death.joined_ns;
    });
    if (!again) out.push_back(std::move(death));
  }
  return out;
}

Report Channel::report() const {
  const Impl& impl = *impl_;
  return channel::report(*impl.region, impl.path,
                         impl.is_inherited() || impl.left ? Participants::kNobody : impl.me);
}

Report Channel::report_of(const std::string& path) {
  auto storage = channel::open_storage(path, memory::StorageKind::File);
  if (storage == nullptr) {
    throw Error(ErrorCode::ChannelNotFound, "no channel at " + path, ENOENT);
  }
  auto region = memory::Region::attach(std::move(storage));
  return channel::report(*region, path, Participants::kNobody);
}

Removal Channel::remove_channel(const std::string& path, std::int64_t age_ns, bool even_with_messages,
                                bool dry) {
  auto storage = channel::open_storage(path, memory::StorageKind::File);
  if (storage == nullptr) return Removal::Missing;
  const memory::Inspection inspection = memory::inspect(*storage);
  if (inspection.found == memory::Found::Foreign) {
    throw Error(ErrorCode::ChannelLayout,
                path + " is not a channel: " + inspection.reason + "; remove it by hand");
  }
  // Under the control lock nobody joins, and a participant that lives holds the lock of its number.
  if (!storage->try_lock(memory::kControlLock)) return Removal::InUse;
  for (std::uint32_t i = 0; i < memory::kMaxParticipants; ++i) {
    if (storage->is_locked(memory::participant_lock(i))) return Removal::InUse;
  }
  if (!channel::is_named(*storage, path)) return Removal::Missing;
  if (inspection.found == memory::Found::Channel) {
    auto region = memory::Region::attach(storage->again());
    std::uint64_t last = region->header().created_ns;
    for (std::uint32_t i = 0; i < region->geometry().participants; ++i) {
      last = std::max(last, region->participant(i).joined_ns.load(std::memory_order_relaxed));
    }
    if (base::realtime_ns() - static_cast<std::int64_t>(last) < age_ns) return Removal::TooYoung;
    if (!even_with_messages && channel::holds_messages(*region)) return Removal::HasMessages;
  }
  if (!dry) channel::remove_name(*storage, path);
  return Removal::Removed;
}

}  // namespace dsline
