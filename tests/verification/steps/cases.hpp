#pragma once

#include <cstdint>

/// What one process does, and how it finds the channel.
namespace dsline::steps {

enum class Start : std::uint32_t {
  Empty,
  Queued,
  Full,
  Wrapped,    ///< the order has been gone round, and positions wrap
  Pinned,     ///< a living bystander holds a message
  GivenBack,  ///< one message was given back
  Waited,     ///< a living bystander sleeps until a message comes
  DeadHolding,
  DeadWriting,
  DeadCommitted,  ///< committed, but not in the order
  DeadEntered,    ///< in the order, but its slot does not say so
  DeadWaiting,    ///< registered as a waiter
  DeadViewer,     ///< the only member of a group that goes with it, holding a message
  DeadLeaving,    ///< had ended its group, and not yet released what waits for it
  DeadJoining,    ///< had offered old messages to its new group
  Grouped,        ///< a durable group beside the default one
  GroupedFull,    ///< the same, full, and the group is behind the default one
  Historic,       ///< two old messages are kept
  Lettered,       ///< there is a dead letter
};
inline constexpr std::uint32_t kStarts = 19;
const char* start_name(Start start) noexcept;

enum class Act : std::uint32_t {
  Send,
  Abort,
  Receive,
  Release,
  GiveBack,
  Join,
  Leave,
  Wait,
  Check,
  DropOldest,
  ShutDown,
  Subscribe,        ///< as the first member of a new group
  SubscribeOldest,  ///< the same, with the messages that are still there
  Enter,            ///< as another member of the durable group
  EndGroup,         ///< as the last member of a group that goes with it
  RemoveGroup,
  Bury,
  TakeLetter,
  ReleaseLetter,
  ReturnLetter,
  Revive,
  Look,
};
inline constexpr std::uint32_t kActs = 22;
const char* act_name(Act act) noexcept;

/// False where the two make no sense together.
bool fits(Act act, Start start) noexcept;
/// True for those that are long and show little that others do not: only for the long run.
bool is_extra(Act act, Start start) noexcept;
/// True where a participant has died and nobody has noticed yet.
bool is_dead(Start start) noexcept;

}  // namespace dsline::steps
