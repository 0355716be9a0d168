#include "base/crc32c.hpp"

#include <array>
#include <bit>
#include <cstring>

#if defined(__x86_64__)
#include <nmmintrin.h>
#define DSLINE_CRC_TARGET __attribute__((target("sse4.2")))
#define DSLINE_CRC_HARDWARE "sse4.2"
#elif defined(__aarch64__)
#include <sys/auxv.h>
#if defined(__clang__)
#define DSLINE_CRC_TARGET __attribute__((target("crc")))
#else
#define DSLINE_CRC_TARGET __attribute__((target("+crc")))
#endif
#define DSLINE_CRC_HARDWARE "armv8-crc"
#endif

namespace dsline::base {
namespace {

static_assert(std::endian::native == std::endian::little);

// Polynomials over GF(2) in reflected form: the coefficient of x^0 is the highest bit.
constexpr std::uint32_t kPolynomial = 0x82F63B78;

constexpr std::uint32_t times_x(std::uint32_t a) noexcept {
  return (a >> 1) ^ ((a & 1) != 0 ? kPolynomial : 0);
}

using Tables = std::array<std::array<std::uint32_t, 256>, 8>;

/// tables[k][b]: the CRC register after the byte b and k zero bytes.
constexpr Tables make_tables() noexcept {
  Tables tables{};
  for (std::uint32_t b = 0; b < 256; ++b) {
    std::uint32_t r = b;
    for (int bit = 0; bit < 8; ++bit) r = times_x(r);
    tables[0][b] = r;
  }
  for (std::size_t k = 1; k < tables.size(); ++k) {
    for (std::size_t b = 0; b < 256; ++b) {
      std::uint32_t r = tables[k - 1][b];
      tables[k][b] = (r >> 8) ^ tables[0][r & 0xFF];
    }
  }
  return tables;
}

constexpr Tables kTables = make_tables();

std::uint64_t load64(const std::byte* at) noexcept {
  std::uint64_t value;
  std::memcpy(&value, at, sizeof value);
  return value;
}

#if defined(DSLINE_CRC_HARDWARE)

// The instruction takes three cycles and a new one may start every cycle, so long buffers run as three lanes
// whose registers are put together at the end: shifting one by a lane of zero bytes is a linear map, kept as
// one table per byte of the register.
constexpr std::size_t kLongLane = 4096;
constexpr std::size_t kShortLane = 256;

constexpr std::uint32_t times(std::uint32_t a, std::uint32_t b) noexcept {
  std::uint32_t product = 0;
  for (std::uint32_t bit = 0x80000000; bit != 0; bit >>= 1) {
    if ((a & bit) != 0) product ^= b;
    b = times_x(b);
  }
  return product;
}

using Shift = std::array<std::array<std::uint32_t, 256>, 4>;

constexpr Shift make_shift(std::size_t lane_bytes) noexcept {
  std::uint32_t factor = 0x80000000;      // x^0
  std::uint32_t power = times_x(factor);  // x^1, squared once per bit of the exponent
  for (std::size_t e = lane_bytes * 8; e != 0; e >>= 1) {
    if ((e & 1) != 0) factor = times(factor, power);
    power = times(power, power);
  }
  Shift shift{};
  for (std::uint32_t k = 0; k < 4; ++k) {
    for (std::uint32_t b = 0; b < 256; ++b) shift[k][b] = times(factor, b << (8 * k));
  }
  return shift;
}

constexpr Shift kLongShift = make_shift(kLongLane);
constexpr Shift kShortShift = make_shift(kShortLane);

std::uint32_t shifted(const Shift& shift, std::uint32_t r) noexcept {
  return shift[0][r & 0xFF] ^ shift[1][(r >> 8) & 0xFF] ^ shift[2][(r >> 16) & 0xFF] ^ shift[3][r >> 24];
}

#if defined(__x86_64__)

// The libgcc and compiler-rt constructors that fill in the processor's features run before ours.
bool has_hardware() noexcept { return __builtin_cpu_supports("sse4.2") != 0; }

DSLINE_CRC_TARGET inline std::uint32_t step64(std::uint32_t r, std::uint64_t v) noexcept {
  return static_cast<std::uint32_t>(_mm_crc32_u64(r, v));
}
DSLINE_CRC_TARGET inline std::uint32_t step32(std::uint32_t r, std::uint32_t v) noexcept {
  return _mm_crc32_u32(r, v);
}
DSLINE_CRC_TARGET inline std::uint32_t step8(std::uint32_t r, std::uint8_t v) noexcept {
  return _mm_crc32_u8(r, v);
}

#else

constexpr unsigned long kHwcapCrc32 = 1ul << 7;

bool has_hardware() noexcept {
  static const bool has = (getauxval(AT_HWCAP) & kHwcapCrc32) != 0;
  return has;
}

DSLINE_CRC_TARGET inline std::uint32_t step64(std::uint32_t r, std::uint64_t v) noexcept {
#if defined(__clang__)
  return __builtin_arm_crc32cd(r, v);
#else
  return __builtin_aarch64_crc32cx(r, v);
#endif
}
DSLINE_CRC_TARGET inline std::uint32_t step32(std::uint32_t r, std::uint32_t v) noexcept {
#if defined(__clang__)
  return __builtin_arm_crc32cw(r, v);
#else
  return __builtin_aarch64_crc32cw(r, v);
#endif
}
DSLINE_CRC_TARGET inline std::uint32_t step8(std::uint32_t r, std::uint8_t v) noexcept {
#if defined(__clang__)
  return __builtin_arm_crc32cb(r, v);
#else
  return __builtin_aarch64_crc32cb(r, v);
#endif
}

#endif

template <std::size_t kLane>
DSLINE_CRC_TARGET std::uint32_t three_lanes(const std::byte* at, std::uint32_t r,
                                            const Shift& shift) noexcept {
  std::uint32_t second = 0;
  std::uint32_t third = 0;
  for (const std::byte* end = at + kLane; at != end; at += 8) {
    r = step64(r, load64(at));
    second = step64(second, load64(at + kLane));
    third = step64(third, load64(at + 2 * kLane));
  }
  return shifted(shift, shifted(shift, r) ^ second) ^ third;
}

DSLINE_CRC_TARGET std::uint32_t crc32c_hardware(const void* data, std::size_t size,
                                                std::uint32_t crc) noexcept {
  const auto* at = static_cast<const std::byte*>(data);
  std::uint32_t r = ~crc;
  if (size >= 3 * kShortLane) [[unlikely]] {
    for (; size >= 3 * kLongLane; size -= 3 * kLongLane, at += 3 * kLongLane) {
      r = three_lanes<kLongLane>(at, r, kLongShift);
    }
    for (; size >= 3 * kShortLane; size -= 3 * kShortLane, at += 3 * kShortLane) {
      r = three_lanes<kShortLane>(at, r, kShortShift);
    }
  }
  for (; size >= 8; size -= 8, at += 8) r = step64(r, load64(at));
  if ((size & 4) != 0) {
    std::uint32_t value;
    std::memcpy(&value, at, sizeof value);
    r = step32(r, value);
    at += 4;
    size -= 4;
  }
  for (; size != 0; --size, ++at) r = step8(r, static_cast<std::uint8_t>(*at));
  return ~r;
}

#endif

}  // namespace

std::uint32_t crc32c_table(const void* data, std::size_t size, std::uint32_t crc) noexcept {
  const auto* at = static_cast<const std::byte*>(data);
  std::uint32_t r = ~crc;
  for (; size >= 8; size -= 8, at += 8) {
    std::uint64_t v = load64(at) ^ r;
    r = 0;
    for (std::size_t k = 0; k < 8; ++k) r ^= kTables[7 - k][(v >> (8 * k)) & 0xFF];
  }
  for (; size != 0; --size, ++at) r = (r >> 8) ^ kTables[0][(r ^ static_cast<std::uint32_t>(*at)) & 0xFF];
  return ~r;
}

bool crc32c_hardware_available() noexcept {
#if defined(DSLINE_CRC_HARDWARE)
  return has_hardware();
#else
  return false;
#endif
}

const char* crc32c_backend() noexcept {
#if defined(DSLINE_CRC_HARDWARE)
  if (has_hardware()) return DSLINE_CRC_HARDWARE;
#endif
  return "table";
}

std::uint32_t crc32c(const void* data, std::size_t size, std::uint32_t crc) noexcept {
#if defined(DSLINE_CRC_HARDWARE)
  if (has_hardware()) [[likely]]
    return crc32c_hardware(data, size, crc);
#endif
  return crc32c_table(data, size, crc);
}

}  // namespace dsline::base
