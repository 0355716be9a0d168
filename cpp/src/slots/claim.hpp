#pragma once

#include <cstdint>

#include "slots/position.hpp"

namespace dsline::slots {

/// Who holds a message for one group. Only the holder of the claim {position, me} may read the payload for its group.
///
///      63       20 19      16 15        0
///     +-----------+----------+-----------+
///     | position  | attempts | who       |
///     +-----------+----------+-----------+
///
/// who: 0        nobody
///      1 …      participant + 1: holds the message
///      kDiscard | participant + 1: has taken it only to release it (drop oldest, end of a group, history); nobody saw it
///      kDead    a dead letter: it stays until it is taken as one
///      kRedeliver  its holder died or gave it back
///
///   from \ to   nobody  holder  discard  redeliver  dead
///   (entering)    P2      -       -         -        -
///   nobody        -      take    discard    -        -
///   holder        -       -       -       nack, V7  bury     and the message may be released
///   discard       -       -       -         -        -       is released, by recovery if its owner dies
///   redeliver     -      take    discard    -        -
///   dead          -      take    discard    -        -
struct Claim {
  std::uint64_t bits;

  static constexpr std::uint32_t kNobody = 0;
  static constexpr std::uint32_t kDiscard = 0x8000;
  static constexpr std::uint32_t kDead = 0xFFFE;
  static constexpr std::uint32_t kRedeliver = 0xFFFF;
  static constexpr std::uint32_t kMaxAttempts = 15;

  static constexpr Claim make(std::uint64_t position, std::uint32_t attempts, std::uint32_t who) noexcept {
    return {(position & kPositionMask) << 20 | std::uint64_t{attempts & 0xF} << 16 | (who & 0xFFFF)};
  }
  /// Of a slot that is not in the order.
  static constexpr Claim none() noexcept { return make(kNoPosition, 0, kNobody); }
  static constexpr std::uint32_t holder(std::uint32_t participant) noexcept { return participant + 1; }
  static constexpr std::uint32_t discarder(std::uint32_t participant) noexcept {
    return kDiscard | (participant + 1);
  }

  constexpr std::uint64_t position_low() const noexcept { return bits >> 20; }
  constexpr std::uint32_t attempts() const noexcept { return static_cast<std::uint32_t>(bits >> 16) & 0xF; }
  constexpr std::uint32_t who() const noexcept { return static_cast<std::uint32_t>(bits) & 0xFFFF; }

  /// True for a message that somebody may take or discard: nobody holds it.
  constexpr bool is_open() const noexcept {
    return who() == kNobody || who() == kRedeliver || who() == kDead;
  }
  constexpr bool is_held() const noexcept { return who() != kNobody && who() < kDiscard; }

  constexpr Claim with(std::uint32_t attempts, std::uint32_t who) const noexcept {
    return make(position_low(), attempts, who);
  }
  constexpr Claim given_back() const noexcept {
    std::uint32_t next = attempts() < kMaxAttempts ? attempts() + 1 : kMaxAttempts;
    return with(next, kRedeliver);
  }

  friend constexpr bool operator==(Claim, Claim) = default;
};
static_assert(sizeof(Claim) == 8);

}  // namespace dsline::slots
