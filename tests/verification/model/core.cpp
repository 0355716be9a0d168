// The part of the core under check, compiled with scheduled atomics, in one piece.
#include "base/crc32c.cpp"
#include "liveness/membership.cpp"
#include "liveness/participants.cpp"
#include "liveness/recovery.cpp"
#include "memory/layout.cpp"
#include "memory/region.cpp"

#include "engine.hpp"

// What the operating system would say.
namespace dsline::base {

Atomic<std::uint32_t> fork_generation_word{0};
std::uint64_t process_start_time(std::uint32_t) noexcept { return 0; }
std::array<unsigned char, 16> boot_id() noexcept { return {}; }
std::array<unsigned char, 16> random_id() { return {}; }

std::int64_t monotonic_ns() noexcept { return model::look_at_clock(); }

}  // namespace dsline::base
