#pragma once

#include <cstddef>
#include <cstdint>

/// What the checker knows of one state beside the shared memory and the stacks: plain bytes, copied and hashed.
namespace dsline::model {

inline constexpr int kMaxProcesses = 8;
inline constexpr int kSurgeon = kMaxProcesses;  ///< the one that recovers and drains at the end
inline constexpr int kAllProcesses = kMaxProcesses + 1;
inline constexpr int kMaxSlots = 4;
inline constexpr int kMaxGroups = 4;
inline constexpr int kMaxMessages = 12;
inline constexpr int kMaxLocks = 1 + kAllProcesses + 3;

/// A process between two of its operations; inside one, its stack says the rest.
struct Process {
  std::uint64_t history;     ///< of what it has read since its operation began (0 where stacks are compared)
  std::uint64_t word;        ///< of the loan
  std::uint64_t position;    ///< of the message that it holds
  std::uint32_t stack_used;  ///< 0: between two operations
  std::uint8_t alive;
  std::uint8_t phase;   ///< of its role
  std::uint8_t done;    ///< operations that count
  std::uint8_t number;  ///< participant + 1; 0: none
  std::uint8_t slot;    ///< + 1; of its loan or of the message that it holds
  std::uint8_t attempts;
  std::uint8_t group;   ///< + 1
  std::uint8_t left;    ///< a count of its role: give-backs, rounds
  std::uint8_t asleep;  ///< in a futex
  std::uint8_t woken;
  std::uint8_t member;  ///< of this group + 1
  std::uint8_t joined;  ///< how often the group's number had been given away then
  std::uint8_t ticks;   ///< looks at the clock since the operation began
  std::uint8_t kept;    ///< slot + 1 of the message that it has published and still looks at
  std::uint8_t kept_message;
  std::uint8_t spare[1];
  std::uint32_t sleeps_on;  ///< word of the futex
};

enum class Status : std::uint8_t {
  NotEntitled,
  Waiting,
  Held,
  Back,        ///< to be delivered again
  Discarding,  ///< taken only to be released
  DeadLetter,
  Done,
  Dropped,
};

/// What became of each message, for each group.
struct Ledger {
  std::uint8_t content[kMaxSlots];  ///< message in the slot; 0: half written
  std::uint8_t committed[kMaxMessages + 1];
  std::uint8_t entered[kMaxMessages + 1];
  Status status[kMaxMessages + 1][kMaxGroups];
  std::uint8_t holder[kMaxMessages + 1][kMaxGroups];
  std::uint8_t attempts[kMaxMessages + 1][kMaxGroups];
  std::uint8_t dropped[kMaxGroups];  ///< by DROP_OLDEST
};

struct World {
  Process process[kAllProcesses];
  Ledger ledger;
  std::uint8_t lock_owner[kMaxLocks];  ///< process + 1
  std::uint8_t kills_left;
  std::uint8_t preemptions_left;
  std::uint8_t last_run;     ///< process + 1, only where preemptions are counted
  std::uint8_t wakes_to_do;  ///< a futex_wake has more sleepers than it wakes: the search chooses
  std::uint32_t wakes_at;
};

/// Saved with a state, but no part of its identity.
struct Aside {
  std::uint64_t memory;                 ///< fingerprint of the shared memory, kept up with every write
  std::uint64_t inside[kMaxProcesses];  ///< of each process and its stack
  std::uint64_t rest;                   ///< of the rest of the world
  void* sp[kAllProcesses];
  std::uint8_t wrote[kAllProcesses];  ///< its last step changed something, so that a death now is a new one
};

extern World world;
extern Aside aside;
extern int current;  ///< the process that runs

}  // namespace dsline::model
