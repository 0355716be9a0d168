/// A frame as a receiver reads it: {checksum, mend, room:u16}, then header, metadata and payload.

#include <cstring>
#include <memory>

#include "dsline/metadata.hpp"
#include "frames/frame_header.hpp"
#include "fuzz/target.hpp"

using namespace dsline;
using robust::require;

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  robust::Input input(data, size);
  const auto checksum = static_cast<base::Checksum>(input.take<std::uint8_t>() % 3);
  const bool mend = input.take<std::uint8_t>() % 2 == 1;
  std::uint64_t room = input.take<std::uint16_t>();
  // Exactly the room, so that a sanitizer sees every byte beyond it.
  const std::unique_ptr<std::byte[]> slot(
      new std::byte[room < sizeof(frames::FrameHeader) ? sizeof(frames::FrameHeader) : room]());
  if (room < sizeof(frames::FrameHeader)) room = sizeof(frames::FrameHeader);
  std::memcpy(slot.get(), input.rest(), input.left() < room ? input.left() : room);

  frames::FrameHeader header;
  std::memcpy(&header, slot.get(), sizeof header);
  if (frames::check_lengths(header, room) != frames::FrameFault::None) return 0;
  require(header.meta_bytes <= frames::kMaxMetaBytes, "metadata is within its limit");
  const std::uint64_t payload = frames::payload_offset(header.meta_bytes);
  require(payload <= room && header.payload_bytes <= room - payload, "the payload is within the room");
  std::vector<std::byte> meta(slot.get() + sizeof header, slot.get() + sizeof header + header.meta_bytes);
  if (mend) {
    frames::seal(header, checksum, meta.data(), slot.get() + payload);
    require(
        frames::check_sums(header, checksum, meta.data(), slot.get() + payload) == frames::FrameFault::None,
        "a sealed frame passes its check");
    if (checksum != base::Checksum::None) {
      header.schema_hash ^= 1;
      require(frames::check_sums(header, checksum, meta.data(), slot.get() + payload) ==
                  frames::FrameFault::HeaderChecksum,
              "a changed header does not pass");
      header.schema_hash ^= 1;
    }
  }
  if (frames::check_sums(header, checksum, meta.data(), slot.get() + payload) != frames::FrameFault::None)
    return 0;
  frames::Metadata metadata;
  std::string why;
  if (!frames::parse_metadata(meta.data(), meta.size(), metadata, why))
    require(!why.empty(), "a refusal says why");
  return 0;
}

std::vector<std::string> robust::fuzz_seeds() {
  std::vector<std::string> seeds;
  for (int checksum = 0; checksum < 3; ++checksum) {
    for (bool with_array : {false, true}) {
      frames::MetadataBuilder builder;
      if (with_array) {
        const std::int64_t shape[2] = {3, 4};
        builder.add_dtype(std::string{'f', 1, 0, 0, 4, 0, 0, 0});
        builder.add_shape(shape, 2);
      }
      builder.add_tag_str("camera", "left");
      const std::string& meta = builder.bytes();
      std::string payload(48, 'p');
      frames::FrameHeader header{};
      header.magic = frames::kFrameMagic;
      header.version = frames::kFrameVersion;
      header.kind = with_array ? frames::FrameKind::Array : frames::FrameKind::Bytes;
      header.payload_bytes = payload.size();
      header.meta_bytes = static_cast<std::uint32_t>(meta.size());
      frames::seal(header, static_cast<base::Checksum>(checksum),
                   reinterpret_cast<const std::byte*>(meta.data()),
                   reinterpret_cast<const std::byte*>(payload.data()));
      std::string frame(reinterpret_cast<const char*>(&header), sizeof header);
      frame += meta;
      frame.resize(frames::payload_offset(header.meta_bytes));
      frame += payload;
      for (char mend : {0, 1}) {
        std::string seed{static_cast<char>(checksum), mend, static_cast<char>(frame.size() & 0xFF),
                         static_cast<char>(frame.size() >> 8)};
        seeds.push_back(seed + frame);
      }
    }
  }
  return seeds;
}
