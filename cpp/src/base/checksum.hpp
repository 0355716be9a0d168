#pragma once

#include <cstdint>

namespace dsline::base {

/// What a channel protects with CRC32C: nothing, header and metadata of every frame, or the payload too.
enum class Checksum : std::uint32_t { None = 0, Header = 1, Full = 2 };

}  // namespace dsline::base
