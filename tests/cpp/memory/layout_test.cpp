#include "memory/layout.hpp"

#include <gtest/gtest.h>
#include <unistd.h>

#include <cstring>
#include <string>

#include "dsline/error.hpp"
#include "memory/region.hpp"

namespace dsline::memory {
namespace {

std::string refusal(std::uint32_t slots, std::uint64_t slot_bytes, std::uint64_t most,
                    std::uint32_t handles) {
  try {
    plan_geometry(slots, slot_bytes, most, handles, 8);
  } catch (const Error& error) {
    EXPECT_EQ(error.code(), ErrorCode::InvalidArgument);
    return error.what();
  }
  return "";
}

TEST(Layout, SectionsAreDisjointAndInOrder) {
  Geometry g = plan_geometry(100, 5000, 0, 64, 8);
  EXPECT_GE(g.participants_offset, sizeof(RegionHeader));
  EXPECT_GE(g.groups_offset, g.participants_offset + 64 * sizeof(ParticipantState));
  EXPECT_GE(g.order_offset, g.groups_offset + 8 * sizeof(GroupState));
  EXPECT_GE(g.free_map_offset, g.order_offset + sizeof(OrderState) + g.order_cells * 8);
  EXPECT_GE(g.slots_offset, g.free_map_offset + 16);
  EXPECT_GE(g.claims_offset, g.slots_offset + 100 * sizeof(SlotState));
  EXPECT_GE(g.arena_offset, g.claims_offset + 100 * 7 * 8);
  EXPECT_EQ(g.arena_offset % kPageBytes, 0u);
  EXPECT_EQ(g.total_bytes, g.arena_offset + 100 * g.stride_bytes);
}

TEST(Layout, TheOrderHasAtLeastTwiceAsManyCellsAsThereAreSlots) {
  for (std::uint32_t slots : {1u, 2u, 3u, 4u, 5u, 63u, 64u, 65u, 1000u, kMaxSlots}) {
    Geometry g = plan_geometry(slots, 64, 64, 64, 8);
    EXPECT_GE(g.order_cells, kCellsPerSlot * slots);
    EXPECT_EQ(g.order_cells & (g.order_cells - 1), 0u);
  }
}

TEST(Layout, SlotsOfAPageAndMoreAreWholePages) {
  for (std::uint64_t bytes : {1ull, 64ull, 4096ull, 65536ull, 1000001ull}) {
    Geometry g = plan_geometry(8, bytes, 0, 64, 8);
    EXPECT_EQ(g.stride_bytes % kPageBytes, 0u);
    EXPECT_EQ(g.room_bytes % kPageBytes, 0u);
    EXPECT_GE(g.room_bytes, kMaxFrameShift + kFrameRoomBytes + bytes);
  }
}

TEST(Layout, SmallSlotsThatCannotGrowArePacked) {
  Geometry g = plan_geometry(8, 64, 64, 64, 8);
  EXPECT_LT(g.stride_bytes, kPageBytes);
  EXPECT_EQ(g.stride_bytes % base::kCacheLine, 0u);
  EXPECT_EQ(g.stride_bytes, g.room_bytes);
}

TEST(Layout, FramesOfNeighboursStartInDifferentCacheSets) {
  Geometry g = plan_geometry(16, 65536, 0, 64, 8);
  std::uint64_t seen = 0;
  for (std::uint32_t s = 0; s < 16; ++s) {
    ASSERT_LE(frame_shift(g, s), kMaxFrameShift);
    seen |= 1ull << (frame_shift(g, s) / 64);
  }
  EXPECT_EQ(seen, 0xFFFFull);
}

TEST(Layout, RefusalsNameTheValueAndTheLimit) {
  EXPECT_NE(refusal(0, 64, 0, 64).find("capacity is 0, must be 1 to 1048576"), std::string::npos);
  EXPECT_NE(refusal(kMaxSlots + 1, 64, 0, 64).find("1048577"), std::string::npos);
  EXPECT_NE(refusal(4, 0, 0, 64).find("slot_size is 0"), std::string::npos);
  EXPECT_NE(refusal(4, 64, 63, 64).find("max_message_size is 63"), std::string::npos);
  EXPECT_NE(refusal(4, 64, 0, 257).find("max_handles is 257, must be 1 to 256"), std::string::npos);
  std::string both = refusal(kMaxSlots, 64, 1ull << 30, 64);
  EXPECT_NE(both.find("capacity=1048576"), std::string::npos) << both;
  EXPECT_NE(both.find("max_message_size=1073741824"), std::string::npos) << both;
}

TEST(Layout, TheDefaultOfTheLargestMessageFitsAnyCapacity) {
  for (std::uint32_t slots = 1; slots <= kMaxSlots; slots *= 4) {
    EXPECT_GE(plan_geometry(slots, 64, 0, 64, 8).max_message_bytes, 64u) << slots;
  }
  EXPECT_EQ(plan_geometry(64, 65536, 0, 64, 8).max_message_bytes, 1ull << 30);
}

TEST(Layout, AGeometryThatNoCreatorWouldPlanIsInvalid) {
  Geometry good = plan_geometry(8, 4096, 0, 64, 8);
  EXPECT_TRUE(is_valid(good));
  for (std::size_t i = 0; i < sizeof good; ++i) {
    if (i == offsetof(Geometry, slot_bytes))
      continue;  // a few bytes more round up to the same pages: a good geometry
    Geometry bad = good;
    reinterpret_cast<unsigned char*>(&bad)[i] ^= 0x40;
    EXPECT_FALSE(is_valid(bad)) << "byte " << i;
  }
}

Rules rules(Checksum checksum) { return {static_cast<std::uint32_t>(checksum), 0, 3, 16, 1, 0}; }

TEST(Region, InspectionTellsWhatAFileIs) {
  auto storage = make_memfd_storage();
  int fd = dup(storage->descriptor());
  auto region =
      Region::create(std::move(storage), plan_geometry(4, 64, 64, 4, 1), rules(Checksum::Header), 0);
  auto again = make_file_storage(fd, StorageKind::File, "copy");
  EXPECT_EQ(inspect(*again).found, Found::Channel);
  region->header().layout_version = 99;
  EXPECT_EQ(inspect(*again).found, Found::Older);
  EXPECT_NE(inspect(*again).reason.find("99"), std::string::npos);
  region->header().layout_version = kLayoutVersion;
  region->header().uuid[3] ^= 1;
  EXPECT_EQ(inspect(*again).found, Found::Damaged);
  region->header().uuid[3] ^= 1;
  EXPECT_EQ(inspect(*again).found, Found::Channel);
  region->header().magic = 0;
  EXPECT_EQ(inspect(*again).found, Found::Foreign);
}

TEST(Layout, ASchemaLiesBehindTheHeaderAndCostsNothingWhereThereIsNone) {
  const Geometry none = plan_geometry(8, 64, 64, 64, 8);
  EXPECT_EQ(none.participants_offset, kPageBytes);
  for (std::uint32_t bytes : {1u, 128u, 129u, kMaxSchemaBytes}) {
    const Geometry g = plan_geometry(8, 64, 64, 64, 8, bytes);
    EXPECT_EQ(g.schema_bytes, bytes);
    EXPECT_GE(g.participants_offset, kSchemaOffset + bytes);
    EXPECT_TRUE(is_valid(g));
    Geometry other = g;
    other.schema_bytes = 0;
    EXPECT_FALSE(is_valid(other));
  }
  EXPECT_THROW(plan_geometry(8, 64, 64, 64, 8, std::uint64_t{kMaxSchemaBytes} + 1), Error);
  EXPECT_THROW(plan_geometry(8, 64, 64, 64, 8, std::uint64_t{1} << 32), Error);
}

TEST(Region, TheSchemaIsReadOnceAndCheckedByItsChecksum) {
  for (std::size_t bytes : {1u, 40u, 5000u, kMaxSchemaBytes}) {
    std::string schema(bytes, 's');
    schema.back() = 'e';
    auto storage = make_memfd_storage();
    const int fd = dup(storage->descriptor());
    auto region = Region::create(std::move(storage), plan_geometry(4, 64, 64, 4, 1, bytes),
                                 rules(Checksum::Header), 0, schema);
    EXPECT_EQ(region->schema(), schema);
    auto other = Region::attach(make_file_storage(fd, StorageKind::File, "copy"));
    EXPECT_EQ(other->schema(), schema);
    EXPECT_EQ(inspect(other->storage()).found, Found::Channel);
    for (std::size_t at : {std::size_t{0}, bytes / 2, bytes - 1}) {
      char* byte = reinterpret_cast<char*>(&region->header()) + kSchemaOffset + at;
      *byte ^= 1;
      EXPECT_EQ(inspect(other->storage()).found, Found::Damaged);
      EXPECT_NE(inspect(other->storage()).reason.find("spec"), std::string::npos);
      EXPECT_EQ(other->schema(), schema) << "a private copy";
      EXPECT_THROW(Region::attach(other->storage().again()), Error);
      *byte ^= 1;
    }
    region->header().schema_crc ^= 1;
    EXPECT_EQ(inspect(other->storage()).found, Found::Damaged) << "the description covers the checksum";
  }
}

TEST(Region, AttachingShowsTheSameStateAndKeepsThePayloadReadOnlyUntilItIsWritten) {
  auto storage = make_memfd_storage();
  int fd = dup(storage->descriptor());
  auto region = Region::create(std::move(storage), plan_geometry(4, 4096, 0, 4, 2), rules(Checksum::Full), 0);
  auto other = Region::attach(make_file_storage(fd, StorageKind::File, "copy"));
  EXPECT_EQ(other->checksum(), Checksum::Full);
  EXPECT_EQ(std::memcmp(&other->geometry(), &region->geometry(), sizeof(Geometry)), 0);
  region->write_frame(2)[100] = std::byte{5};
  EXPECT_EQ(other->read_frame(2)[100], std::byte{5});
  EXPECT_EQ(region->read_frame(2)[100], std::byte{5});
  EXPECT_NE(region->read_frame(2), region->write_frame(2)) << "one mapping serves both";
  region->claim(3, 1).store(77);
  EXPECT_EQ(other->claim(3, 1).load(), 77u);
}

TEST(Region, ASlotGrowsAndShrinks) {
  auto region =
      Region::create(make_memfd_storage(), plan_geometry(4, 4096, 0, 4, 1), rules(Checksum::Header), 0);
  std::uint64_t room = region->slot(1).room_bytes.load();
  region->reserve_slot(1, room + 100000);
  EXPECT_GE(region->slot(1).room_bytes.load(), room + 100000);
  region->write_frame(1)[room + 50000] = std::byte{1};
  region->shrink_slot(1, 10);
  EXPECT_EQ(region->slot(1).room_bytes.load(), room);
  region->reserve_slot(1, room + 100000);
  EXPECT_EQ(region->read_frame(1)[room + 50000], std::byte{0}) << "the pages were not given back";
}

}  // namespace
}  // namespace dsline::memory
