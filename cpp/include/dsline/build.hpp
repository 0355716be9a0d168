#pragma once

namespace dsline {

/// Which CRC32C this process uses: "sse4.2", "armv8-crc" or "table".
const char* crc32c_backend() noexcept;

}  // namespace dsline
