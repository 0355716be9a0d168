#pragma once

#include <bit>
#include <cstddef>
#include <cstdint>
#include <type_traits>

#include "base/checked.hpp"
#include "base/checksum.hpp"
#include "base/crc32c.hpp"

/// What the writer of a message says about it. A frame is the header, the metadata directly behind it, and the
/// payload at the next multiple of 64 bytes. docs/design/frame-format.md has the byte table.
namespace dsline::frames {

static_assert(std::endian::native == std::endian::little, "frames are little-endian and are read in place");

inline constexpr std::uint32_t kFrameMagic = 0x464C5344;  // "DSLF", little-endian
inline constexpr std::uint8_t kFrameVersion = 1;
inline constexpr std::uint32_t kMaxMetaBytes = 65536;

enum class FrameKind : std::uint8_t {
  Bytes = 0,
  Array = 1,
  Object = 2,
  End = 16,
  Marker = 17,
  Watermark = 18,
  Gap = 19,
};

/// Which checksums the writer filled in.
inline constexpr std::uint16_t kHeaderChecksum = 1;
inline constexpr std::uint16_t kPayloadChecksum = 2;

/// The message's sequence is not here: it is its position in the order, known only after the header is sealed.
struct FrameHeader {
  std::uint32_t magic;
  std::uint8_t version;
  FrameKind kind;
  std::uint16_t flags;
  std::uint64_t payload_bytes;
  std::int64_t timestamp_ns;  // CLOCK_REALTIME
  std::uint64_t schema_hash;  // 0: none
  std::uint64_t key;          // dataflow; else 0
  std::uint32_t meta_bytes;
  std::uint32_t rows;         // dataflow; else 0
  std::uint32_t payload_crc;  // 0 without kPayloadChecksum
  std::uint32_t reserved[2];  // written as 0, not looked at
  std::uint32_t header_crc;   // of the bytes before it, then of the metadata; 0 without kHeaderChecksum
};
static_assert(offsetof(FrameHeader, magic) == 0 && offsetof(FrameHeader, version) == 4);
static_assert(offsetof(FrameHeader, kind) == 5 && offsetof(FrameHeader, flags) == 6);
static_assert(offsetof(FrameHeader, payload_bytes) == 8 && offsetof(FrameHeader, timestamp_ns) == 16);
static_assert(offsetof(FrameHeader, schema_hash) == 24 && offsetof(FrameHeader, key) == 32);
static_assert(offsetof(FrameHeader, meta_bytes) == 40 && offsetof(FrameHeader, rows) == 44);
static_assert(offsetof(FrameHeader, payload_crc) == 48 && offsetof(FrameHeader, reserved) == 52);
static_assert(offsetof(FrameHeader, header_crc) == 60 && sizeof(FrameHeader) == 64);
static_assert(std::is_standard_layout_v<FrameHeader> && std::is_trivially_copyable_v<FrameHeader>);

/// Where the payload starts, counted from the header.
constexpr std::uint64_t payload_offset(std::uint32_t meta_bytes) noexcept {
  return base::round_up(sizeof(FrameHeader) + std::uint64_t{meta_bytes}, base::kCacheLine);
}

/// Bytes from the header to the end of the payload; false if 64 bits cannot hold them.
[[nodiscard]] constexpr bool frame_bytes(std::uint32_t meta_bytes, std::uint64_t payload_bytes,
                                         std::uint64_t& out) noexcept {
  return base::checked_add(payload_offset(meta_bytes), payload_bytes, out);
}

enum class FrameFault {
  None,
  Magic,
  Version,
  Kind,
  Flags,
  Lengths,
  HeaderChecksum,
  PayloadChecksum,
  Metadata
};

/// A phrase for error messages: "the frame's ..."; for None "no fault".
const char* describe(FrameFault fault) noexcept;

namespace detail {

/// Requires: `meta` has header.meta_bytes bytes.
inline std::uint32_t header_crc(const FrameHeader& header, const std::byte* meta) noexcept {
  // Whole words, put together in registers: reading them from a header whose small fields were just written would
  // wait until these stores have left the store buffer, which costs more than the sum itself.
  const std::uint64_t words[8] = {
      std::uint64_t{header.magic} | std::uint64_t{header.version} << 32 |
          std::uint64_t{static_cast<std::uint8_t>(header.kind)} << 40 | std::uint64_t{header.flags} << 48,
      header.payload_bytes,
      static_cast<std::uint64_t>(header.timestamp_ns),
      header.schema_hash,
      header.key,
      std::uint64_t{header.meta_bytes} | std::uint64_t{header.rows} << 32,
      std::uint64_t{header.payload_crc} | std::uint64_t{header.reserved[0]} << 32,
      header.reserved[1],
  };
  std::uint32_t crc = base::crc32c(words, offsetof(FrameHeader, header_crc));
  return header.meta_bytes == 0 ? crc : base::crc32c(meta, header.meta_bytes, crc);
}

constexpr bool is_known(FrameKind kind) noexcept {
  return kind <= FrameKind::Object || (kind >= FrameKind::End && kind <= FrameKind::Gap);
}

}  // namespace detail

/// Fills in the flags and the checksums; every other field is final. Requires: `meta` and `payload` have the
/// bytes that the header says, and are final too.
inline void seal(FrameHeader& header, base::Checksum checksum, const std::byte* meta,
                 const std::byte* payload) noexcept {
  header.flags = 0;
  header.payload_crc = 0;
  header.header_crc = 0;
  if (checksum == base::Checksum::None) return;
  header.flags = kHeaderChecksum;
  if (checksum == base::Checksum::Full) [[unlikely]] {
    header.flags |= kPayloadChecksum;
    header.payload_crc = base::crc32c(payload, header.payload_bytes);
  }
  header.header_crc = detail::header_crc(header, meta);
}

/// First half of reading a frame: is this a header, and does its frame fit into the `room_bytes` behind it?
/// Requires: `header` is a private copy, made once; a peer may scribble on the shared one at any time, so what
/// is checked here must be what is used later. Nothing behind the header may be touched before this says None.
[[nodiscard]] inline FrameFault check_lengths(const FrameHeader& header, std::uint64_t room_bytes) noexcept {
  if (header.magic != kFrameMagic) [[unlikely]]
    return FrameFault::Magic;
  if (header.version != kFrameVersion) [[unlikely]]
    return FrameFault::Version;
  if (!detail::is_known(header.kind)) [[unlikely]]
    return FrameFault::Kind;
  if (header.flags > (kHeaderChecksum | kPayloadChecksum)) [[unlikely]]
    return FrameFault::Flags;
  std::uint64_t bytes = 0;
  if (header.meta_bytes > kMaxMetaBytes || !frame_bytes(header.meta_bytes, header.payload_bytes, bytes) ||
      bytes > room_bytes) [[unlikely]] {
    return FrameFault::Lengths;
  }
  return FrameFault::None;
}

/// Second half: do the checksums that the channel asks for agree? A frame that lacks one of them fails it: a
/// flag that was flipped must not switch its own check off. Requires: check_lengths() said None; `meta` is a
/// private copy. The payload is read in place: its sum says what was there when it was looked at.
[[nodiscard]] inline FrameFault check_sums(const FrameHeader& header, base::Checksum checksum,
                                           const std::byte* meta, const std::byte* payload) noexcept {
  if (checksum == base::Checksum::None) return FrameFault::None;
  if ((header.flags & kHeaderChecksum) == 0 || detail::header_crc(header, meta) != header.header_crc)
      [[unlikely]] {
    return FrameFault::HeaderChecksum;
  }
  if (checksum == base::Checksum::Full && ((header.flags & kPayloadChecksum) == 0 ||
                                           base::crc32c(payload, header.payload_bytes) != header.payload_crc))
      [[unlikely]] {
    return FrameFault::PayloadChecksum;
  }
  return FrameFault::None;
}

}  // namespace dsline::frames
