#include "memory/region.hpp"

#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <new>
#include <utility>

#include "base/clock.hpp"
#include "base/crc32c.hpp"
#include "base/process.hpp"
#include "dsline/error.hpp"

namespace dsline::memory {
namespace {

// The part of the header that is written once.
constexpr std::size_t kDescriptionBytes = offsetof(RegionHeader, description_crc);

std::uint32_t description_crc(const unsigned char* description) {
  std::uint32_t crc = base::crc32c(description, offsetof(RegionHeader, boot_id));
  constexpr std::size_t behind = offsetof(RegionHeader, created_ns);
  return base::crc32c(description + behind, kDescriptionBytes - behind, crc);
}

// That part and its checksum, and nothing of the lines behind it, which others change.
struct Description {
  unsigned char bytes[kDescriptionBytes + sizeof(std::uint32_t)];

  template <class T>
  T at(std::size_t offset) const noexcept {
    T value;
    std::memcpy(&value, bytes + offset, sizeof value);
    return value;
  }
};

// Reads the schema that a sound description announces; false when it is not the one that was written.
bool read_schema(const Storage& storage, const Description& description, std::string& out) {
  const auto geometry = description.at<Geometry>(offsetof(RegionHeader, geometry));
  out.clear();
  if (geometry.schema_bytes != 0) {
    std::string start(kSchemaOffset + geometry.schema_bytes, '\0');
    if (storage.read_start(start.data(), start.size()) != start.size()) return false;
    out = start.substr(kSchemaOffset);
  }
  return base::crc32c(out.data(), out.size()) ==
         description.at<std::uint32_t>(offsetof(RegionHeader, schema_crc));
}

Inspection inspect_description(const Storage& storage, Description& out) {
  std::uint64_t size = storage.size();
  const std::uint64_t got = storage.read_start(out.bytes, sizeof out.bytes);
  if (got < 8 || out.at<std::uint32_t>(0) != kRegionMagic) {
    return {Found::Foreign, "it does not start with the magic number of a channel", ""};
  }
  std::uint32_t version = out.at<std::uint32_t>(offsetof(RegionHeader, layout_version));
  if (version != kLayoutVersion) {
    return {Found::Older,
            "it has layout version " + std::to_string(version) + ", this dsline reads version " +
                std::to_string(kLayoutVersion),
            ""};
  }
  if (got < sizeof out.bytes) {
    return {Found::Damaged, "it ends inside its header, after " + std::to_string(got) + " bytes", ""};
  }
  if (description_crc(out.bytes) != out.at<std::uint32_t>(kDescriptionBytes)) {
    return {Found::Damaged, "the checksum of its header is wrong", ""};
  }
  Geometry geometry = out.at<Geometry>(offsetof(RegionHeader, geometry));
  if (!is_valid(geometry) || !is_valid(out.at<Rules>(offsetof(RegionHeader, rules)))) {
    return {Found::Damaged, "its geometry is impossible", ""};
  }
  if (geometry.total_bytes != size) {
    return {Found::Damaged,
            "it has " + std::to_string(size) + " bytes where its header says " +
                std::to_string(geometry.total_bytes),
            ""};
  }
  std::string schema;
  if (!read_schema(storage, out, schema)) {
    return {Found::Damaged, "the checksum of its spec is wrong", ""};
  }
  return {Found::Channel, "", std::move(schema)};
}

}  // namespace

Inspection inspect(const Storage& storage) {
  Description description{};
  return inspect_description(storage, description);
}

std::unique_ptr<Region> Region::create(std::unique_ptr<Storage> storage, const Geometry& geometry,
                                       const Rules& rules, std::uint64_t first_position,
                                       std::string_view schema) {
  std::unique_ptr<Region> region(new Region(std::move(storage)));
  Storage& bytes = *region->storage_;
  bytes.resize(geometry.total_bytes);
  const std::string purpose = "creating a channel with capacity=" + std::to_string(geometry.slots) +
                              " and slot_size=" + std::to_string(geometry.slot_bytes);
  if (geometry.room_bytes == geometry.stride_bytes) {
    bytes.reserve(0, geometry.total_bytes, purpose);
  } else {
    bytes.reserve(0, geometry.arena_offset, purpose);
    for (std::uint32_t s = 0; s < geometry.slots; ++s) {
      // The first slot asks for the room of all, so that a channel that cannot fit is refused before it takes any.
      if (s == 0) bytes.check_room(geometry.room_bytes * geometry.slots, purpose);
      bytes.reserve_checked(geometry.arena_offset + s * geometry.stride_bytes, geometry.room_bytes, purpose);
    }
  }
  region->map(geometry);
  region->rules_ = rules;
  region->schema_ = schema;
  if (!schema.empty()) std::memcpy(region->control_ + kSchemaOffset, schema.data(), schema.size());

  for (std::uint32_t s = 0; s < geometry.slots; ++s) {
    region->slot(s).room_bytes.store(geometry.room_bytes, std::memory_order_relaxed);
  }

  RegionHeader& header = region->header();
  header.magic = kRegionMagic;
  header.layout_version = kLayoutVersion;
  header.geometry = geometry;
  auto uuid = base::random_id();
  std::memcpy(header.uuid, uuid.data(), uuid.size());
  auto boot = base::boot_id();
  std::memcpy(header.boot_id, boot.data(), boot.size());
  header.created_ns = static_cast<std::uint64_t>(base::realtime_ns());
  header.first_position = first_position;
  header.creator_pid = static_cast<std::uint32_t>(getpid());
  header.rules = rules;
  header.storage = static_cast<std::uint32_t>(bytes.kind());
  header.schema_crc = base::crc32c(schema.data(), schema.size());
  header.description_crc = description_crc(reinterpret_cast<const unsigned char*>(&header));
  return region;
}

std::unique_ptr<Region> Region::attach(std::unique_ptr<Storage> storage) {
  std::unique_ptr<Region> region(new Region(std::move(storage)));
  Description description{};
  Inspection inspection = inspect_description(*region->storage_, description);
  if (inspection.found != Found::Channel) {
    throw Error(ErrorCode::ChannelLayout, region->storage_->describe() + " is not a usable channel: " +
                                              inspection.reason + "; remove it, or choose another name");
  }
  region->schema_ = std::move(inspection.schema);
  region->rules_ = description.at<Rules>(offsetof(RegionHeader, rules));
  region->map(description.at<Geometry>(offsetof(RegionHeader, geometry)));
  return region;
}

void Region::map(const Geometry& geometry) {
  geometry_ = geometry;
  control_ = storage_->map(0, geometry.arena_offset, Access::ReadWrite);
  arena_ =
      storage_->map(geometry.arena_offset, geometry.total_bytes - geometry.arena_offset, Access::ReadOnly);
  participants_ = reinterpret_cast<ParticipantState*>(control_ + geometry.participants_offset);
  groups_ = reinterpret_cast<GroupState*>(control_ + geometry.groups_offset);
  order_ = reinterpret_cast<OrderState*>(control_ + geometry.order_offset);
  cells_ =
      reinterpret_cast<base::Atomic<std::uint64_t>*>(control_ + geometry.order_offset + sizeof(OrderState));
  free_map_ = reinterpret_cast<base::Atomic<std::uint64_t>*>(control_ + geometry.free_map_offset);
  slots_ = reinterpret_cast<SlotState*>(control_ + geometry.slots_offset);
  claims_ = reinterpret_cast<base::Atomic<std::uint64_t>*>(control_ + geometry.claims_offset);
  notes_ = reinterpret_cast<ClaimNotes*>(control_ + geometry.notes_offset);
}

// Without a mutex, which a fork in another thread could leave locked in the child: who comes second unmaps its own.
std::byte* Region::map_writable_arena() {
  const std::uint64_t bytes = geometry_.total_bytes - geometry_.arena_offset;
  std::byte* mine = storage_->map(geometry_.arena_offset, bytes, Access::ReadWrite);
  std::byte* first = nullptr;
  // SYNC arena: pairs with the acquire load in writable_arena().
  if (writable_arena_.compare_exchange_strong(first, mine, std::memory_order_acq_rel)) return mine;
  storage_->unmap(mine, bytes);
  return first;
}

Region::~Region() {
  if (control_ == nullptr) return;
  std::uint64_t arena_bytes = geometry_.total_bytes - geometry_.arena_offset;
  storage_->unmap(control_, geometry_.arena_offset);
  if (arena_ != nullptr) storage_->unmap(const_cast<std::byte*>(arena_), arena_bytes);
  std::byte* writable = writable_arena_.load(std::memory_order_relaxed);
  if (writable != nullptr) storage_->unmap(writable, arena_bytes);
  for (std::byte* old : parted_) storage_->unmap(old, arena_bytes);
  delete[] sealed_.load(std::memory_order_relaxed);
}

bool Region::seal_slot(std::uint32_t s, std::uint64_t frame) noexcept {
  base::Atomic<std::uint64_t>* sealed = sealed_.load(std::memory_order_acquire);
  if (sealed == nullptr) {
    auto* mine = new (std::nothrow) base::Atomic<std::uint64_t>[(geometry_.slots + 63) / 64]();
    if (mine == nullptr) {
      errno = ENOMEM;
      return false;
    }
    // SYNC sealed: pairs with the acquire load in has_sealed().
    if (sealed_.compare_exchange_strong(sealed, mine, std::memory_order_acq_rel)) {
      sealed = mine;
    } else {
      delete[] mine;
    }
  }
  sealed[s / 64].fetch_or(std::uint64_t{1} << s % 64, std::memory_order_relaxed);
  const std::uint64_t bytes = base::round_up(frame_shift(geometry_, s) + frame, kPageBytes);
  return mprotect(writable_arena() + s * geometry_.stride_bytes, bytes, PROT_READ) == 0;
}

bool Region::unseal_slot(std::uint32_t s) noexcept {
  if (mprotect(writable_arena() + s * geometry_.stride_bytes, geometry_.stride_bytes,
               PROT_READ | PROT_WRITE) != 0)
    return false;
  sealed_.load(std::memory_order_acquire)[s / 64].fetch_and(~(std::uint64_t{1} << s % 64),
                                                            std::memory_order_relaxed);
  return true;
}

bool Region::part_with_writable() noexcept {
  std::byte* old = writable_arena_.load(std::memory_order_acquire);
  if (old == nullptr || storage_->kind() == StorageKind::Heap)
    return true;  // heap memory is the child's own already
  const std::uint64_t bytes = geometry_.total_bytes - geometry_.arena_offset;
  try {
    parted_.push_back(old);
  } catch (const std::bad_alloc&) {
    errno = ENOMEM;
    return false;
  }
  // In place, so that pointers into it stay good; a child has one thread here, so nobody writes in between.
  if (mmap(old, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_FIXED | MAP_NORESERVE,
           storage_->descriptor(), static_cast<off_t>(geometry_.arena_offset)) == MAP_FAILED) {
    parted_.pop_back();
    return false;
  }
  madvise(old, bytes, MADV_DONTDUMP);
  writable_arena_.store(nullptr, std::memory_order_release);
  if (base::Atomic<std::uint64_t>* sealed = sealed_.load(std::memory_order_acquire)) {
    for (std::uint32_t i = 0; i < (geometry_.slots + 63) / 64; ++i)
      sealed[i].store(0, std::memory_order_relaxed);
  }
  return true;
}

void Region::reserve_slot(std::uint32_t s, std::uint64_t bytes) {
  SlotState& state = slot(s);
  std::uint64_t room = std::clamp(state.room_bytes.load(std::memory_order_relaxed), geometry_.room_bytes,
                                  geometry_.stride_bytes);
  std::uint64_t need = base::round_up(bytes, kPageBytes);
  if (need <= room) {
    state.room_bytes.store(room, std::memory_order_relaxed);  // mends a value that cannot be
    return;
  }
  storage_->reserve(geometry_.arena_offset + s * geometry_.stride_bytes + room, need - room,
                    "a message of this size");
  state.room_bytes.store(need, std::memory_order_relaxed);
}

void Region::shrink_slot(std::uint32_t s, std::uint64_t bytes) noexcept {
  SlotState& state = slot(s);
  std::uint64_t room = std::min(state.room_bytes.load(std::memory_order_relaxed), geometry_.stride_bytes);
  std::uint64_t keep = std::max(base::round_up(bytes, kPageBytes), geometry_.room_bytes);
  if (room <= keep) return;
  // Forgotten first: pages that a death leaves behind are found again by the next reservation.
  state.room_bytes.store(keep, std::memory_order_relaxed);
  storage_->give_back(geometry_.arena_offset + s * geometry_.stride_bytes + keep, room - keep);
}

}  // namespace dsline::memory
