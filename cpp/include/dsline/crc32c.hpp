#pragma once

#include <cstddef>
#include <cstdint>

namespace dsline {

/// CRC-32C (Castagnoli) of `size` bytes, continued from `crc`: crc32c(b, crc32c(a)) is the CRC of a followed by b.
std::uint32_t crc32c(const void* data, std::size_t size, std::uint32_t crc = 0) noexcept;

}  // namespace dsline
