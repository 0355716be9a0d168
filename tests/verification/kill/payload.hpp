#pragma once

#include <cstdint>
#include <cstring>

/// Payloads that prove themselves: who sent which, and every further word follows from that.
namespace dsline::kill {

struct Stamp {
  std::uint32_t producer;
  std::uint32_t sequence;
  std::uint64_t bytes;
  std::uint64_t sum;  // of everything behind the stamp
};

inline constexpr std::uint64_t kLeastPayload = sizeof(Stamp);

inline std::uint64_t mix(std::uint64_t x) noexcept {
  x ^= x >> 30;
  x *= 0xBF58476D1CE4E5B9ull;
  x ^= x >> 27;
  x *= 0x94D049BB133111EBull;
  return x ^ x >> 31;
}

inline std::uint64_t word_at(const Stamp& stamp, std::uint64_t i) noexcept {
  return mix((std::uint64_t{stamp.producer} << 32 | stamp.sequence) + i * 0x9E3779B97F4A7C15ull);
}

/// Requires: bytes >= kLeastPayload.
inline void write_payload(std::byte* at, std::uint32_t producer, std::uint32_t sequence,
                          std::uint64_t bytes) noexcept {
  Stamp stamp{producer, sequence, bytes, 0};
  std::uint64_t i = 0;
  for (std::uint64_t offset = sizeof stamp; offset < bytes; offset += 8, ++i) {
    const std::uint64_t word = word_at(stamp, i);
    stamp.sum = mix(stamp.sum + word);
    const std::uint64_t left = bytes - offset;
    std::memcpy(at + offset, &word, left < 8 ? left : 8);
  }
  std::memcpy(at, &stamp, sizeof stamp);
}

/// True when every byte is as it was written.
inline bool read_payload(const std::byte* at, std::uint64_t bytes, Stamp& stamp) noexcept {
  if (bytes < sizeof stamp) return false;
  std::memcpy(&stamp, at, sizeof stamp);
  if (stamp.bytes != bytes) return false;
  std::uint64_t sum = 0;
  std::uint64_t i = 0;
  for (std::uint64_t offset = sizeof stamp; offset < bytes; offset += 8, ++i) {
    const std::uint64_t wanted = word_at(stamp, i);
    const std::uint64_t left = bytes - offset;
    if (std::memcmp(at + offset, &wanted, left < 8 ? left : 8) != 0) return false;
    sum = mix(sum + wanted);
  }
  return sum == stamp.sum;
}

/// Small, fast, and the same everywhere.
class Random {
 public:
  explicit Random(std::uint64_t seed) noexcept : state_(mix(seed + 0x9E3779B97F4A7C15ull)) {}
  std::uint64_t next() noexcept { return mix(state_ += 0x9E3779B97F4A7C15ull); }
  /// 0 … n - 1.
  std::uint32_t below(std::uint64_t n) noexcept { return static_cast<std::uint32_t>(next() % n); }
  std::uint32_t between(std::uint32_t least, std::uint32_t most) noexcept {
    return least + below(std::uint64_t{most} - least + 1);
  }
  bool one_in(std::uint32_t n) noexcept { return below(n) == 0; }

 private:
  std::uint64_t state_;
};

}  // namespace dsline::kill
