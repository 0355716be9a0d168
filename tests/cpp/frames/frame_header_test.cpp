#include "frames/frame_header.hpp"

#include <gtest/gtest.h>

#include <algorithm>
#include <cstring>
#include <limits>
#include <set>
#include <string>
#include <vector>

#include "dsline/metadata.hpp"

namespace dsline::frames {
namespace {

using base::Checksum;

constexpr std::uint64_t kMax = std::numeric_limits<std::uint64_t>::max();

/// A frame in a slot of its own, laid out as a producer does it.
class Frame {
 public:
  Frame(std::uint32_t meta_bytes, std::uint64_t payload_bytes, Checksum checksum)
      : slot_(payload_offset(meta_bytes) + payload_bytes) {
    for (std::size_t i = 0; i < slot_.size(); ++i) slot_[i] = static_cast<std::byte>(i * 7 + 1);
    FrameHeader header{};
    header.magic = kFrameMagic;
    header.version = kFrameVersion;
    header.kind = FrameKind::Array;
    header.payload_bytes = payload_bytes;
    header.timestamp_ns = -5;
    header.schema_hash = 0x1122334455667788;
    header.meta_bytes = meta_bytes;
    seal(header, checksum, meta(), payload(meta_bytes));
    std::memcpy(slot_.data(), &header, sizeof header);
  }

  FrameFault read(Checksum checksum) const { return read(checksum, slot_.size()); }
  FrameFault read(Checksum checksum, std::uint64_t room_bytes) const {
    FrameHeader header = this->header();
    FrameFault fault = check_lengths(header, room_bytes);
    if (fault != FrameFault::None) return fault;
    std::vector<std::byte> private_meta(meta(), meta() + header.meta_bytes);
    return check_sums(header, checksum, private_meta.data(), payload(header.meta_bytes));
  }

  FrameHeader header() const {
    FrameHeader header;
    std::memcpy(&header, slot_.data(), sizeof header);
    return header;
  }
  void put(const FrameHeader& header) { std::memcpy(slot_.data(), &header, sizeof header); }
  std::byte& operator[](std::size_t i) { return slot_[i]; }
  std::size_t size() const { return slot_.size(); }

 private:
  const std::byte* meta() const { return slot_.data() + sizeof(FrameHeader); }
  const std::byte* payload(std::uint32_t meta_bytes) const {
    return slot_.data() + payload_offset(meta_bytes);
  }

  std::vector<std::byte> slot_;
};

template <class Change>
FrameFault fault_after(Change change) {
  Frame frame(8, 100, Checksum::Header);
  FrameHeader header = frame.header();
  change(header);
  return check_lengths(header, frame.size());
}

TEST(FrameLayout, PutsThePayloadAtTheNextMultipleOf64) {
  EXPECT_EQ(payload_offset(0), 64u);
  EXPECT_EQ(payload_offset(1), 128u);
  EXPECT_EQ(payload_offset(64), 128u);
  EXPECT_EQ(payload_offset(65), 192u);
  EXPECT_EQ(payload_offset(kMaxMetaBytes), 64u + 65536u);
  EXPECT_EQ(payload_offset(0xFFFFFFFF), 0x100000040u);
}

TEST(FrameLayout, CountsTheBytesOfAFrame) {
  std::uint64_t bytes = 0;
  ASSERT_TRUE(frame_bytes(0, 0, bytes));
  EXPECT_EQ(bytes, 64u);
  ASSERT_TRUE(frame_bytes(8, 100, bytes));
  EXPECT_EQ(bytes, 228u);
}

TEST(FrameLayout, SaysWhenTheBytesDoNotFitInto64Bits) {
  std::uint64_t bytes = 0;
  ASSERT_TRUE(frame_bytes(0, kMax - 64, bytes));
  EXPECT_EQ(bytes, kMax);
  EXPECT_FALSE(frame_bytes(0, kMax - 63, bytes));
  EXPECT_FALSE(frame_bytes(1, kMax - 64, bytes));
}

TEST(FrameSeal, IsAcceptedByItsReader) {
  for (Checksum checksum : {Checksum::None, Checksum::Header, Checksum::Full}) {
    for (std::uint32_t meta_bytes : {0u, 8u, 64u, 72u, kMaxMetaBytes}) {
      for (std::uint64_t payload_bytes : {0u, 1u, 64u, 5000u}) {
        EXPECT_EQ(Frame(meta_bytes, payload_bytes, checksum).read(checksum), FrameFault::None)
            << meta_bytes << " " << payload_bytes;
      }
    }
  }
}

// The same bytes stand in docs/design/frame-format.md.
TEST(FrameSeal, WritesTheWorkedExampleOfTheDesignPage) {
  MetadataBuilder meta;
  const std::int64_t shape[] = {2, 3};
  meta.add_dtype(std::string("f\1\0\0\4\0\0\0", 8));
  meta.add_shape(shape, 2);
  const std::uint64_t schema = schema_hash(meta.bytes().data(), meta.bytes().size());
  meta.add_tag_str("camera", "front");
  FrameHeader header{};
  header.magic = kFrameMagic;
  header.version = kFrameVersion;
  header.kind = FrameKind::Array;
  header.payload_bytes = 24;
  header.timestamp_ns = 1'700'000'000'000'000'000;
  header.schema_hash = schema;
  header.meta_bytes = static_cast<std::uint32_t>(meta.bytes().size());
  seal(header, Checksum::Header, reinterpret_cast<const std::byte*>(meta.bytes().data()), nullptr);
  const std::uint8_t expected[] = {
      0x44, 0x53, 0x4C, 0x46, 0x01, 0x01, 0x01, 0x00, 0x18, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00,  //
      0x00, 0x00, 0x2A, 0x36, 0xFE, 0x9C, 0x97, 0x17, 0xD2, 0xF9, 0x9C, 0x35, 0xB8, 0xDD, 0x4F, 0x00,  //
      0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0x40, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00,  //
      0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0xE1, 0x69, 0xB2, 0x97,  //
      0x01, 0x00, 0x00, 0x00, 0x08, 0x00, 0x00, 0x00, 0x66, 0x01, 0x00, 0x00, 0x04, 0x00, 0x00, 0x00,  //
      0x02, 0x00, 0x00, 0x00, 0x10, 0x00, 0x00, 0x00, 0x02, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00,  //
      0x03, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0x06, 0x00, 0x00, 0x00, 0x0D, 0x00, 0x00, 0x00,  //
      0x06, 0x04, 0x63, 0x61, 0x6D, 0x65, 0x72, 0x61, 0x66, 0x72, 0x6F, 0x6E, 0x74, 0x00, 0x00, 0x00};
  EXPECT_EQ(std::memcmp(&header, expected, sizeof header), 0);
  ASSERT_EQ(meta.bytes().size(), 64u);
  EXPECT_EQ(std::memcmp(meta.bytes().data(), expected + sizeof header, 64), 0);
}

TEST(FrameSeal, FillsInOnlyTheSumsThatWereAskedFor) {
  FrameHeader none = Frame(8, 100, Checksum::None).header();
  EXPECT_EQ(none.flags, 0);
  EXPECT_EQ(none.header_crc, 0u);
  EXPECT_EQ(none.payload_crc, 0u);
  FrameHeader header = Frame(8, 100, Checksum::Header).header();
  EXPECT_EQ(header.flags, kHeaderChecksum);
  EXPECT_NE(header.header_crc, 0u);
  EXPECT_EQ(header.payload_crc, 0u);
  FrameHeader full = Frame(8, 100, Checksum::Full).header();
  EXPECT_EQ(full.flags, kHeaderChecksum | kPayloadChecksum);
  EXPECT_NE(full.payload_crc, 0u);
}

TEST(FrameSeal, ReplacesWhatStoodInTheFieldsBefore) {
  FrameHeader header{};
  header.flags = 0xFFFF;
  header.payload_crc = header.header_crc = 0xFFFFFFFF;
  seal(header, Checksum::None, nullptr, nullptr);
  EXPECT_EQ(header.flags, 0);
  EXPECT_EQ(header.payload_crc, 0u);
  EXPECT_EQ(header.header_crc, 0u);
}

TEST(FrameSeal, CoversHeaderThenMetadata) {
  Frame frame(8, 0, Checksum::Header);
  FrameHeader header = frame.header();
  std::uint32_t crc = base::crc32c_table(&header, 60);
  crc = base::crc32c_table(&frame[64], 8, crc);
  EXPECT_EQ(header.header_crc, crc);
}

TEST(FrameCheck, RefusesAWrongMagic) {
  EXPECT_EQ(fault_after([](FrameHeader& h) { h.magic ^= 1; }), FrameFault::Magic);
  EXPECT_EQ(fault_after([](FrameHeader& h) { h = FrameHeader{}; }), FrameFault::Magic);
}

TEST(FrameCheck, RefusesAnotherVersion) {
  EXPECT_EQ(fault_after([](FrameHeader& h) { h.version = 0; }), FrameFault::Version);
  EXPECT_EQ(fault_after([](FrameHeader& h) { h.version = 2; }), FrameFault::Version);
}

TEST(FrameCheck, KnowsExactlyTheKindsOfThisVersion) {
  const std::set<int> known{0, 1, 2, 16, 17, 18, 19};
  for (int kind = 0; kind < 256; ++kind) {
    FrameFault fault = fault_after([kind](FrameHeader& h) { h.kind = static_cast<FrameKind>(kind); });
    EXPECT_EQ(fault, known.count(kind) == 1 ? FrameFault::None : FrameFault::Kind) << kind;
  }
}

TEST(FrameCheck, RefusesUnknownFlags) {
  EXPECT_EQ(fault_after([](FrameHeader& h) { h.flags = 3; }), FrameFault::None);
  EXPECT_EQ(fault_after([](FrameHeader& h) { h.flags = 4; }), FrameFault::Flags);
  EXPECT_EQ(fault_after([](FrameHeader& h) { h.flags = 0x8001; }), FrameFault::Flags);
}

TEST(FrameCheck, RefusesLengthsThatDoNotFitTheRoom) {
  Frame frame(8, 100, Checksum::Header);
  EXPECT_EQ(frame.read(Checksum::Header, 228), FrameFault::None);
  EXPECT_EQ(frame.read(Checksum::Header, 227), FrameFault::Lengths);
  EXPECT_EQ(frame.read(Checksum::Header, 0), FrameFault::Lengths);
  EXPECT_EQ(fault_after([](FrameHeader& h) { h.payload_bytes = 101; }), FrameFault::Lengths);
  EXPECT_EQ(fault_after([](FrameHeader& h) { h.meta_bytes = 65; }), FrameFault::Lengths);
}

TEST(FrameCheck, RefusesLengthsThatWrapAround) {
  for (std::uint64_t payload_bytes : {kMax, kMax - 63, kMax - 64, kMax - 127, kMax - 128, kMax / 2 + 1}) {
    EXPECT_EQ(fault_after([=](FrameHeader& h) { h.payload_bytes = payload_bytes; }), FrameFault::Lengths);
  }
  EXPECT_EQ(fault_after([](FrameHeader& h) { h.meta_bytes = 0xFFFFFFFF; }), FrameFault::Lengths);
}

TEST(FrameCheck, RefusesMoreMetadataThanTheLimitEvenWhereItFits) {
  FrameHeader header = Frame(kMaxMetaBytes, 0, Checksum::None).header();
  EXPECT_EQ(check_lengths(header, kMax), FrameFault::None);
  header.meta_bytes = kMaxMetaBytes + 1;
  EXPECT_EQ(check_lengths(header, kMax), FrameFault::Lengths);
}

TEST(FrameCheck, SeesEverySingleFlippedBitOfHeaderAndMetadata) {
  Frame frame(16, 32, Checksum::Header);
  for (std::size_t bit = 0; bit < (64 + 16) * 8; ++bit) {
    const auto mask = static_cast<std::byte>(1u << (bit % 8));
    frame[bit / 8] ^= mask;
    EXPECT_NE(frame.read(Checksum::Header), FrameFault::None) << bit;
    frame[bit / 8] ^= mask;
  }
  EXPECT_EQ(frame.read(Checksum::Header), FrameFault::None);
}

TEST(FrameCheck, SeesEverySingleFlippedBitOfThePayloadWhereItsSumIsAskedFor) {
  Frame full(0, 32, Checksum::Full);
  Frame header(0, 32, Checksum::Header);
  for (std::size_t bit = 64 * 8; bit < 96 * 8; ++bit) {
    const auto mask = static_cast<std::byte>(1u << (bit % 8));
    full[bit / 8] ^= mask;
    header[bit / 8] ^= mask;
    EXPECT_EQ(full.read(Checksum::Full), FrameFault::PayloadChecksum) << bit;
    EXPECT_EQ(header.read(Checksum::Header), FrameFault::None) << bit;
    full[bit / 8] ^= mask;
    header[bit / 8] ^= mask;
  }
}

TEST(FrameCheck, DoesNotLetAFrameSwitchItsChecksOff) {
  EXPECT_EQ(Frame(0, 8, Checksum::None).read(Checksum::Header), FrameFault::HeaderChecksum);
  EXPECT_EQ(Frame(0, 8, Checksum::None).read(Checksum::Full), FrameFault::HeaderChecksum);
  EXPECT_EQ(Frame(0, 8, Checksum::Header).read(Checksum::Full), FrameFault::PayloadChecksum);
}

TEST(FrameCheck, LooksAtNoSumWhereTheChannelHasNone) {
  Frame frame(8, 8, Checksum::None);
  frame[20] ^= std::byte{1};
  frame[64] ^= std::byte{1};
  EXPECT_EQ(frame.read(Checksum::None), FrameFault::None);
}

TEST(FrameFaultText, DiffersForEveryFault) {
  std::set<std::string> texts;
  for (int fault = 0; fault <= static_cast<int>(FrameFault::Metadata); ++fault) {
    texts.insert(describe(static_cast<FrameFault>(fault)));
  }
  EXPECT_EQ(texts.size(), static_cast<std::size_t>(FrameFault::Metadata) + 1);
}

}  // namespace
}  // namespace dsline::frames
