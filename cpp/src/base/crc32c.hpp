#pragma once

#include <cstddef>
#include <cstdint>

namespace dsline::base {

/// CRC-32C (Castagnoli, RFC 3720) of `size` bytes, continued from `crc`: crc32c(b, crc32c(a)) is the CRC of a
/// followed by b. The processor's instruction is used where it has one, decided at run time.
std::uint32_t crc32c(const void* data, std::size_t size, std::uint32_t crc = 0) noexcept;

/// The same from tables alone, on any processor.
std::uint32_t crc32c_table(const void* data, std::size_t size, std::uint32_t crc = 0) noexcept;

/// True where crc32c() uses the processor's instruction.
bool crc32c_hardware_available() noexcept;

/// "sse4.2", "armv8-crc" or "table".
const char* crc32c_backend() noexcept;

}  // namespace dsline::base
