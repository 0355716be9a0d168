#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "memory/layout.hpp"
#include "memory/storage.hpp"

namespace dsline::memory {

/// The mapped bytes of one channel: a process-local handle over the shared state.
///
/// The control part is mapped for reading and writing. The arena is mapped read-only, and a second time writable at
/// the first request; whoever only receives cannot change a payload. A region stays mapped until the last lease
/// that points into it is gone.
///
/// Threads: any number.
class Region {
 public:
  /// Lays out a new region in an empty storage and reserves it, with a schema of
  /// geometry.schema_bytes; slots, order and groups are still zero. Nobody else
  /// can reach it yet.
  static std::unique_ptr<Region> create(std::unique_ptr<Storage> storage, const Geometry& geometry,
                                        const Rules& rules, std::uint64_t first_position,
                                        std::string_view schema = {});
  /// Maps a region that exists. Throws Error(ChannelLayout) when the bytes are not one of this version.
  static std::unique_ptr<Region> attach(std::unique_ptr<Storage> storage);
  ~Region();

  const Geometry& geometry() const noexcept { return geometry_; }
  Storage& storage() const noexcept { return *storage_; }
  const Rules& rules() const noexcept { return rules_; }
  /// What every message has to be, as the creator wrote it (a private copy); empty: anything.
  const std::string& schema() const noexcept { return schema_; }
  Checksum checksum() const noexcept { return static_cast<Checksum>(rules_.checksum); }
  bool keeps_history() const noexcept { return rules_.history != 0; }
  /// Number of the retention group. Requires: keeps_history().
  std::uint32_t retention_group() const noexcept { return geometry_.groups - 1; }
  /// Bits of all groups that this region has.
  std::uint32_t group_bits() const noexcept { return (1u << geometry_.groups) - 1; }

  RegionHeader& header() const noexcept { return *reinterpret_cast<RegionHeader*>(control_); }
  ParticipantState& participant(std::uint32_t i) const noexcept { return participants_[i]; }
  GroupState& group(std::uint32_t g) const noexcept { return groups_[g]; }
  OrderState& order() const noexcept { return *order_; }
  base::Atomic<std::uint64_t>& cell(std::uint64_t position) const noexcept {
    return cells_[position & (geometry_.order_cells - 1)];
  }
  base::Atomic<std::uint64_t>& free_map(std::uint32_t word) const noexcept { return free_map_[word]; }
  SlotState& slot(std::uint32_t s) const noexcept { return slots_[s]; }
  base::Atomic<std::uint64_t>& claim(std::uint32_t s, std::uint32_t g) const noexcept {
    return g == 0 ? slots_[s].claim : claims_[std::uint64_t{s} * (geometry_.groups - 1) + g - 1];
  }
  ClaimNotes& notes(std::uint32_t s, std::uint32_t g) const noexcept {
    return g == 0 ? slots_[s].notes : notes_[std::uint64_t{s} * (geometry_.groups - 1) + g - 1];
  }

  /// Offset of a slot's frame inside the arena.
  std::uint64_t frame_offset(std::uint32_t s) const noexcept {
    return s * geometry_.stride_bytes + frame_shift(geometry_, s);
  }
  const std::byte* read_frame(std::uint32_t s) const noexcept { return arena_ + frame_offset(s); }
  /// Where a byte of the read-only arena lies in the storage.
  std::uint64_t storage_offset(const std::byte* at) const noexcept {
    return geometry_.arena_offset + static_cast<std::uint64_t>(at - arena_);
  }
  /// Where the frame will be written, if anything has been written through this handle yet.
  const std::byte* frame_to_prefetch(std::uint32_t s) const noexcept {
    const std::byte* arena = writable_arena_.load(std::memory_order_relaxed);
    return (arena != nullptr ? arena : arena_) + frame_offset(s);
  }
  /// Maps what write_frame() needs. Throws where there is no address space.
  void prepare_writing() { writable_arena(); }
  std::byte* write_frame(std::uint32_t s) { return writable_arena() + frame_offset(s); }

  /// Reserves the first `bytes` of a slot's stride, or gives back what lies behind them. Requires: the caller owns
  /// the slot in state WRITING.
  void reserve_slot(std::uint32_t s, std::uint64_t bytes);
  void shrink_slot(std::uint32_t s, std::uint64_t bytes) noexcept;

  /// Makes the pages under the first `frame` bytes of a slot's frame read-only in the writable mapping of this object, and
  /// back; false with errno when the kernel refuses. Requires: slots have pages of their own, and the caller owns this one
  /// in state WRITING.
  bool seal_slot(std::uint32_t s, std::uint64_t frame) noexcept;
  bool unseal_slot(std::uint32_t s) noexcept;
  bool has_sealed(std::uint32_t s) const noexcept {
    const base::Atomic<std::uint64_t>* sealed = sealed_.load(std::memory_order_acquire);
    return sealed != nullptr && (sealed[s / 64].load(std::memory_order_relaxed) >> s % 64 & 1) != 0;
  }
  /// In a forked child, before it writes: what was written through the old mapping from here on is seen by this process
  /// alone. The next writer maps another. False with errno when the kernel refuses.
  bool part_with_writable() noexcept;

 private:
  explicit Region(std::unique_ptr<Storage> storage) : storage_(std::move(storage)) {}
  void map(const Geometry& geometry);
  std::byte* writable_arena() {
    std::byte* arena = writable_arena_.load(std::memory_order_acquire);
    return arena != nullptr ? arena : map_writable_arena();
  }
  std::byte* map_writable_arena();

  std::unique_ptr<Storage> storage_;
  Geometry geometry_{};
  Rules rules_{};
  std::string schema_;
  std::byte* control_ = nullptr;
  const std::byte* arena_ = nullptr;
  base::Atomic<std::byte*> writable_arena_{nullptr};
  // Bit per slot: its pages may be read-only in the writable mapping. Set before they are, cleared after they are not.
  base::Atomic<base::Atomic<std::uint64_t>*> sealed_{nullptr};
  // Mappings that were parted with; views of dead loans may still show them.
  std::vector<std::byte*> parted_;
  ParticipantState* participants_ = nullptr;
  GroupState* groups_ = nullptr;
  OrderState* order_ = nullptr;
  base::Atomic<std::uint64_t>* cells_ = nullptr;
  base::Atomic<std::uint64_t>* free_map_ = nullptr;
  SlotState* slots_ = nullptr;
  base::Atomic<std::uint64_t>* claims_ = nullptr;
  ClaimNotes* notes_ = nullptr;
};

/// What the first bytes of a storage say it is.
enum class Found {
  Channel,  ///< a whole region of this layout
  Older,    ///< a region of another layout version
  Damaged,  ///< carries the magic, but cannot be what it says
  Foreign,  ///< not ours
};
struct Inspection {
  Found found;
  std::string reason;  ///< for people, empty for Channel
  std::string schema;  ///< of a Channel
};
Inspection inspect(const Storage& storage);

}  // namespace dsline::memory
