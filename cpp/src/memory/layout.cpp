#include "memory/layout.hpp"

#include <algorithm>
#include <bit>
#include <cstring>
#include <string>

#include "dsline/error.hpp"

namespace dsline::memory {
namespace {

constexpr std::uint64_t kDefaultMaxMessage = std::uint64_t{1} << 30;
constexpr std::uint64_t kDefaultArena = std::uint64_t{1} << 40;
// Header and metadata at their largest, the shift, and rounding.
constexpr std::uint64_t kLargestFrameOverhead = (std::uint64_t{64} << 10) + 2 * kPageBytes;

[[noreturn]] void invalid(const std::string& message) { throw Error(ErrorCode::InvalidArgument, message); }

std::string out_of_range(const char* what, std::uint64_t value, std::uint64_t least, std::uint64_t most) {
  return std::string(what) + " is " + std::to_string(value) + ", must be " + std::to_string(least) + " to " +
         std::to_string(most);
}

}  // namespace

Geometry plan_geometry(std::uint32_t slots, std::uint64_t slot_bytes, std::uint64_t max_message_bytes,
                       std::uint32_t participants, std::uint32_t groups, std::uint64_t schema_bytes) {
  if (slots < 1 || slots > kMaxSlots) invalid(out_of_range("capacity", slots, 1, kMaxSlots));
  if (participants < 1 || participants > kMaxParticipants) {
    invalid(out_of_range("max_handles", participants, 1, kMaxParticipants));
  }
  if (groups < 1 || groups > kMaxGroups)
    invalid(out_of_range("max_groups with the default group and the history's", groups, 1, kMaxGroups));
  if (slot_bytes < 1 || slot_bytes > kMaxRegionBytes)
    invalid(out_of_range("slot_size", slot_bytes, 1, kMaxRegionBytes));
  if (schema_bytes > kMaxSchemaBytes)
    invalid("the spec needs " + std::to_string(schema_bytes) + " bytes, must have at most " +
            std::to_string(kMaxSchemaBytes));
  if (max_message_bytes == 0) {
    std::uint64_t share = kDefaultArena / slots;
    share = share > kLargestFrameOverhead ? share - kLargestFrameOverhead : 0;
    max_message_bytes = std::max(slot_bytes, std::min(kDefaultMaxMessage, share));
  }
  if (max_message_bytes < slot_bytes || max_message_bytes > kMaxRegionBytes) {
    invalid(out_of_range("max_message_size", max_message_bytes, slot_bytes, kMaxRegionBytes) +
            " (not below slot_size)");
  }

  Geometry g{};
  g.slots = slots;
  g.slot_bytes = slot_bytes;
  g.max_message_bytes = max_message_bytes;
  g.participants = participants;
  g.groups = groups;
  g.order_cells = std::bit_ceil(kCellsPerSlot * slots);
  g.schema_bytes = static_cast<std::uint32_t>(schema_bytes);

  std::uint64_t packed = base::round_up(kFrameRoomBytes + max_message_bytes, base::kCacheLine);
  if (packed < kPageBytes) {
    g.stride_bytes = g.room_bytes = packed;
  } else {
    g.room_bytes = base::round_up(kMaxFrameShift + kFrameRoomBytes + slot_bytes, kPageBytes);
    g.stride_bytes = base::round_up(kLargestFrameOverhead + max_message_bytes, kPageBytes);
    g.stride_bytes = std::max(g.stride_bytes, g.room_bytes);
  }

  std::uint64_t at = base::round_up(kSchemaOffset + schema_bytes, 2 * base::kCacheLine);
  auto place = [&at](std::uint64_t bytes) {
    std::uint64_t offset = at;
    at = base::round_up(at + bytes, 2 * base::kCacheLine);
    return offset;
  };
  g.participants_offset = place(std::uint64_t{participants} * sizeof(ParticipantState));
  g.groups_offset = place(std::uint64_t{groups} * sizeof(GroupState));
  g.order_offset = place(sizeof(OrderState) + std::uint64_t{g.order_cells} * 8);
  g.free_map_offset = place(base::round_up(slots, 64) / 8);
  g.slots_offset = place(std::uint64_t{slots} * sizeof(SlotState));
  g.claims_offset = place(std::uint64_t{slots} * (groups - 1) * 8);
  g.notes_offset = place(std::uint64_t{slots} * (groups - 1) * sizeof(ClaimNotes));
  g.arena_offset = base::round_up(at, kPageBytes);

  std::uint64_t arena = 0;
  if (!base::checked_mul(g.stride_bytes, slots, arena) ||
      !base::checked_add(arena, g.arena_offset, g.total_bytes) || g.total_bytes > kMaxRegionBytes) {
    invalid("capacity=" + std::to_string(slots) + " slots of max_message_size=" +
            std::to_string(max_message_bytes) + " bytes need more address space than the " +
            std::to_string(kMaxRegionBytes) + " bytes of a channel; lower one of the two");
  }
  g.total_bytes = base::round_up(g.total_bytes, kPageBytes);
  return g;
}

bool is_valid(const Geometry& geometry) noexcept {
  try {
    if (geometry.max_message_bytes == 0) return false;
    Geometry planned = plan_geometry(geometry.slots, geometry.slot_bytes, geometry.max_message_bytes,
                                     geometry.participants, geometry.groups, geometry.schema_bytes);
    return std::memcmp(&planned, &geometry, sizeof planned) == 0;
  } catch (const Error&) {
    return false;
  }
}

bool is_valid(const Rules& rules) noexcept {
  return rules.checksum <= 2 && rules.max_deliveries >= 1 && rules.max_deliveries <= 15 &&
         rules.default_group <= 1 && rules.sync <= 1;
}

}  // namespace dsline::memory
