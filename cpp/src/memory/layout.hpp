#pragma once

#include <cstddef>
#include <cstdint>
#include <type_traits>

#include "base/atomic.hpp"
#include "base/checked.hpp"
#include "base/checksum.hpp"
#include "waiting/wait_point.hpp"

/// Who sits at which offset of a region. Everything here is shared between processes: fixed-width integers and
/// lock-free atomics, offsets and never pointers. docs/design/memory-layout.md has the byte table.
namespace dsline::memory {

inline constexpr std::uint32_t kRegionMagic = 0x4E4C5344;  // "DSLN", little-endian
inline constexpr std::uint32_t kLayoutVersion = 3;
inline constexpr std::uint32_t kPageBytes = 4096;

inline constexpr std::uint32_t kMaxSlots = 1u << 20;
inline constexpr std::uint32_t kMaxParticipants = 256;
inline constexpr std::uint32_t kMaxGroups = 23;
inline constexpr std::uint64_t kMaxRegionBytes = std::uint64_t{1} << 44;

/// Bytes of a schema at most, and where it lies: directly behind the header.
inline constexpr std::uint32_t kMaxSchemaBytes = 65536;
inline constexpr std::uint64_t kSchemaOffset = kPageBytes;

/// Bytes of a group's name at most.
inline constexpr std::uint32_t kMaxGroupName = 100;

/// Room for a frame header and the usual metadata in front of `slot_size` bytes of payload.
inline constexpr std::uint64_t kFrameRoomBytes = 512;

/// What a creator chooses. Written once, before the region has a name; a peer copies it to private memory when
/// it attaches, checks it, and never reads it from the region again.
struct Geometry {
  std::uint64_t total_bytes;
  std::uint64_t slot_bytes;         // payload bytes reserved up front per slot
  std::uint64_t max_message_bytes;  // payload bytes at most
  std::uint64_t room_bytes;         // bytes of a slot that are reserved up front
  std::uint64_t stride_bytes;       // from slot to slot: address space
  std::uint32_t slots;
  std::uint32_t participants;
  std::uint32_t groups;
  std::uint32_t order_cells;
  std::uint32_t schema_bytes;  // 0: messages of any kind
  std::uint32_t reserved;      // 0
  std::uint64_t participants_offset;
  std::uint64_t groups_offset;
  std::uint64_t order_offset;
  std::uint64_t free_map_offset;
  std::uint64_t slots_offset;
  std::uint64_t claims_offset;
  std::uint64_t notes_offset;
  std::uint64_t arena_offset;
};
static_assert(sizeof(Geometry) == 128 && std::is_trivially_copyable_v<Geometry>);

/// Cells of the order per slot, at least: a message that a late joiner still gets may lie a pool of slots before the
/// tail that the joiner saw, and two pools of messages may enter behind that tail before the joiner has taken it (one of
/// senders that had not seen the joiner, one that waits for it).
inline constexpr std::uint32_t kCellsPerSlot = 4;

/// Fills in everything that follows from the six choices. Throws Error(InvalidArgument) that names the value
/// and the limit. `max_message_bytes` 0 asks for the default. `groups` counts the default group and, where the channel
/// keeps a history, the retention group.
Geometry plan_geometry(std::uint32_t slots, std::uint64_t slot_bytes, std::uint64_t max_message_bytes,
                       std::uint32_t participants, std::uint32_t groups, std::uint64_t schema_bytes = 0);

/// True iff plan_geometry() of its choices gives exactly `geometry`.
bool is_valid(const Geometry& geometry) noexcept;

using base::Checksum;

/// What a creator chooses beside the geometry: how messages are delivered. Written once, like it.
struct Rules {
  std::uint32_t checksum;        // base::Checksum
  std::uint32_t history;         // messages kept for late joiners; 0: none, and no retention group
  std::uint32_t max_deliveries;  // 1 to 15
  std::uint32_t dead_letters;    // kept at most
  std::uint32_t default_group;   // 1: group 0 is always active; 0: nobody gets what no named group gets
  std::uint32_t sync;            // 1: send returns when the message is on the disk
};
static_assert(sizeof(Rules) == 24 && std::is_trivially_copyable_v<Rules>);
bool is_valid(const Rules& rules) noexcept;

/// One participant that was found dead, for people and callbacks. Writer: its recoverer, under its lock; `sequence`
/// comes last, so a record whose sequence is not the expected one is not finished, or overwritten.
struct alignas(64) DeathState {
  base::Atomic<std::uint64_t> sequence;    // number of the death + 1
  base::Atomic<std::uint64_t> noticed_ns;  // CLOCK_REALTIME
  base::Atomic<std::uint64_t> start_time;
  base::Atomic<std::uint64_t> joined_ns;
  base::Atomic<std::uint32_t> pid;
  base::Atomic<std::uint32_t> participant;
  base::Atomic<std::uint32_t> group;    // number of its group + 1; 0: none
  base::Atomic<std::uint32_t> writing;  // slots that it had not published
  base::Atomic<std::uint32_t> held;     // messages that it had not released
  base::Atomic<std::uint32_t>
      group_joined;  // GroupState::joined of its group: the number may be another one's by now
};
static_assert(sizeof(DeathState) == 64 && std::is_standard_layout_v<DeathState>);
inline constexpr std::uint32_t kDeathsKept = 32;

/// The first page. The part up to `description_crc` is written once; the lines behind it change.
struct RegionHeader {
  std::uint32_t magic;
  std::uint32_t layout_version;
  Geometry geometry;
  std::uint8_t uuid[16];
  std::uint8_t
      boot_id[16];  // rewritten by whoever takes over a file from an earlier boot, under the control lock
  std::uint64_t created_ns;  // CLOCK_REALTIME, for people
  std::uint64_t first_position;
  Rules rules;
  std::uint32_t creator_pid;  // for people
  std::uint32_t storage;
  std::uint32_t schema_crc;       // CRC32C of the schema, which is written once too; 0 of none
  std::uint32_t description_crc;  // CRC32C of the bytes before it, less boot_id

  // Bits 0…22: active groups. Bit 32: shut down. Bit 33: shut down at once. Writers: join, leave, shutdown
  // (read-modify-write); readers: every publish and every empty take.
  alignas(64) base::Atomic<std::uint64_t> active;
  base::Atomic<std::uint64_t> dropped_newest;  // messages discarded by DROP_NEWEST
  base::Atomic<std::uint64_t> unheard;         // messages that no group was there for
  base::Atomic<std::uint64_t> corrupted;       // frames that failed their check, control words that cannot be
  base::Atomic<std::uint64_t> deaths;  // participants found dead; the next record is deaths mod kDeathsKept
  base::Atomic<std::uint64_t> buried;  // messages that became dead letters
  base::Atomic<std::uint64_t> letters_dropped;  // dead letters that had to go for newer ones

  alignas(64) waiting::WaitState space;  // producers that wait for a free slot

  alignas(64) DeathState death[kDeathsKept];
};
static_assert(offsetof(RegionHeader, magic) == 0 && offsetof(RegionHeader, layout_version) == 4);
static_assert(offsetof(RegionHeader, geometry) == 8 && offsetof(RegionHeader, uuid) == 136);
static_assert(offsetof(RegionHeader, boot_id) == 152 && offsetof(RegionHeader, created_ns) == 168);
static_assert(offsetof(RegionHeader, first_position) == 176 && offsetof(RegionHeader, rules) == 184);
static_assert(offsetof(RegionHeader, creator_pid) == 208 && offsetof(RegionHeader, storage) == 212);
static_assert(offsetof(RegionHeader, schema_crc) == 216);
static_assert(offsetof(RegionHeader, description_crc) == 220 && offsetof(RegionHeader, active) == 256);
static_assert(offsetof(RegionHeader, dropped_newest) == 264 && offsetof(RegionHeader, unheard) == 272);
static_assert(offsetof(RegionHeader, corrupted) == 280 && offsetof(RegionHeader, deaths) == 288);
static_assert(offsetof(RegionHeader, buried) == 296 && offsetof(RegionHeader, letters_dropped) == 304);
static_assert(offsetof(RegionHeader, space) == 320 && offsetof(RegionHeader, death) == 384);
static_assert(sizeof(RegionHeader) == 384 + kDeathsKept * 64 && sizeof(RegionHeader) <= kPageBytes);
static_assert(std::is_standard_layout_v<RegionHeader>);

inline constexpr std::uint64_t kActiveGroupsMask = (std::uint64_t{1} << kMaxGroups) - 1;
inline constexpr std::uint64_t kShutDown = std::uint64_t{1} << 32;
inline constexpr std::uint64_t kShutDownAtOnce = std::uint64_t{1} << 33;

/// One open handle. The kernel lock of its number says whether it lives; the rest is for people and recovery.
struct alignas(64) ParticipantState {
  // incarnation << 8 | state. Writers: the owner of the number's lock.
  base::Atomic<std::uint64_t> word;
  base::Atomic<std::uint32_t> pid;
  base::Atomic<std::uint32_t> group;  // number of its group + 1; 0: none
  base::Atomic<std::uint64_t> start_time;
  base::Atomic<std::uint64_t> waiting_on;    // 0 nothing, 1 space, 2 a message
  base::Atomic<std::uint64_t> joined_ns;     // CLOCK_REALTIME
  base::Atomic<std::uint32_t> left_writing;  // what it was found dead with. Writer: its recoverer
  base::Atomic<std::uint32_t> left_held;
};
static_assert(offsetof(ParticipantState, word) == 0 && offsetof(ParticipantState, pid) == 8);
static_assert(offsetof(ParticipantState, group) == 12 && offsetof(ParticipantState, start_time) == 16);
static_assert(offsetof(ParticipantState, waiting_on) == 24 && offsetof(ParticipantState, joined_ns) == 32);
static_assert(offsetof(ParticipantState, left_writing) == 40 && offsetof(ParticipantState, left_held) == 44);
static_assert(sizeof(ParticipantState) == 64 && std::is_standard_layout_v<ParticipantState>);

/// One subscriber group: members compete, every group sees every message.
struct GroupState {
  // Position before which no message is unclaimed. Writers: the group's members (CAS); a hint.
  alignas(64) base::Atomic<std::uint64_t> cursor;

  // sequence << 1 | raised. Raised by whoever gives a message back, lowered by a member that scanned and found nothing.
  alignas(64) base::Atomic<std::uint64_t> redeliver;
  base::Atomic<std::uint32_t>
      state;  // kGroupDurable and other bits below. Writers: join, leave (control lock)
  base::Atomic<std::uint32_t> joined;          // how often the number was given to a group; same writers
  base::Atomic<std::uint64_t> dropped_oldest;  // by DROP_OLDEST: senders
  base::Atomic<std::uint64_t> redelivered;
  base::Atomic<std::uint64_t> reserved[3];

  // Characters of the name, zero behind it. Writer: join (control lock), before the group is active.
  alignas(64) base::Atomic<std::uint64_t> name[16];

  alignas(64) waiting::WaitState messages;  // members that wait for a message
};
static_assert(offsetof(GroupState, cursor) == 0 && offsetof(GroupState, redeliver) == 64);
static_assert(offsetof(GroupState, state) == 72 && offsetof(GroupState, joined) == 76);
static_assert(offsetof(GroupState, dropped_oldest) == 80 && offsetof(GroupState, redelivered) == 88);
static_assert(offsetof(GroupState, name) == 128 && offsetof(GroupState, messages) == 256);
static_assert(sizeof(GroupState) == 320 && std::is_standard_layout_v<GroupState>);

inline constexpr std::uint32_t kGroupNamed = 1;    // has its number; active follows, or is past
inline constexpr std::uint32_t kGroupDurable = 2;  // stays without members
inline constexpr std::uint32_t kGroupDrops = 4;    // what a dead member held is released, not delivered again
inline constexpr std::uint32_t kGroupJoining = 8;  // its first member still adds old messages

/// The order: its tail, and behind it `order_cells` cells of 64 bits.
struct OrderState {
  // Never beyond the true tail. Writers: producers (CAS); a hint.
  alignas(64) base::Atomic<std::uint64_t> tail;
};
static_assert(sizeof(OrderState) == 64 && std::is_standard_layout_v<OrderState>);

/// Who had a message of one slot, for people and dead letters. Writers: the claim's holder, or its recoverer.
struct ClaimNotes {
  base::Atomic<std::uint64_t> taken_ns;     // CLOCK_MONOTONIC, coarse
  base::Atomic<std::uint64_t> last_holder;  // pid << 32 | 1 it died, 2 it gave the message back
};
static_assert(sizeof(ClaimNotes) == 16 && std::is_standard_layout_v<ClaimNotes>);
inline constexpr std::uint32_t kHolderDied = 1;
inline constexpr std::uint32_t kHolderGaveBack = 2;

/// What the protocol changes of one slot.
struct alignas(64) SlotState {
  base::Atomic<std::uint64_t> word;  // see slots/slot_word.hpp: the truth about the slot
  base::Atomic<std::uint64_t>
      position;  // intended or actual position in the order; written while nobody else may
  base::Atomic<std::uint64_t> claim;  // of group 0; see slots/claim.hpp
  ClaimNotes notes;                   // of group 0
  // Reserved bytes of this slot. Writer: the owner of a WRITING slot, after the reservation succeeded, so a death
  // in between only forgets pages that the next reservation finds again.
  base::Atomic<std::uint64_t> room_bytes;
  base::Atomic<std::uint64_t> small_uses;  // messages in a row that did not need the extra room; same writer
};
static_assert(offsetof(SlotState, word) == 0 && offsetof(SlotState, position) == 8);
static_assert(offsetof(SlotState, claim) == 16 && offsetof(SlotState, notes) == 24);
static_assert(offsetof(SlotState, room_bytes) == 40 && offsetof(SlotState, small_uses) == 48);
static_assert(sizeof(SlotState) == 64 && std::is_standard_layout_v<SlotState>);

/// Start of a slot's frame inside its stride: slots of a page and more are shifted by some cache lines, so that the
/// headers of equal slots do not all fall into one set of the first-level cache.
constexpr std::uint64_t frame_shift(const Geometry& geometry, std::uint32_t slot) noexcept {
  return geometry.stride_bytes < kPageBytes ? 0 : std::uint64_t{slot * 5 % 16} * base::kCacheLine;
}
inline constexpr std::uint64_t kMaxFrameShift = 15 * base::kCacheLine;

/// Kernel-lock bytes.
inline constexpr std::uint32_t kControlLock = 0;
constexpr std::uint32_t participant_lock(std::uint32_t participant) noexcept { return 1 + participant; }

}  // namespace dsline::memory
