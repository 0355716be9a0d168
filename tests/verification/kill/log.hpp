#pragma once

#include <atomic>
#include <cstdint>

/// What the processes of a round say about themselves, in memory that they share and that is no part of the channel.
/// Plain stores by one writer each; read when the writer is dead or has ended, so the order of its stores is enough.
namespace dsline::kill {

inline constexpr std::uint32_t kMaxPoints = 256;
inline constexpr std::uint32_t kMostLives = 256;   // child processes of a round
inline constexpr std::uint32_t kMostSends = 3000;  // messages of one life
inline constexpr std::uint32_t kMostEvents = 6000;
inline constexpr std::uint32_t kNeverSent = 0xFFFFFFFF;  // sequence in payloads that are aborted

enum class Fate : std::uint8_t {
  None,
  Intended,  ///< send() was called: may or may not be delivered
  Returned,  ///< send() returned Ok: must be delivered
  Refused,   ///< send() returned something else: must not be delivered
};

struct Send {
  std::int64_t intended_ns;
  std::int64_t returned_ns;
  Fate fate;
};

enum class What : std::uint8_t {
  Got,  ///< a message, or a dead letter
  Released,
  GivingBack,
  Reviving,  ///< a dead letter goes to its group again
};

/// Groups as the harness counts them: 0 the default group, from 1 the durable ones, and one per viewer.
inline constexpr std::uint32_t kDefaultGroup = 0;
inline constexpr std::uint32_t kViewerGroup = 1000;  // + number of the life

struct Event {
  std::int64_t at_ns;
  std::uint64_t position;
  std::uint32_t producer;
  std::uint32_t sequence;
  std::uint32_t group;
  std::uint8_t attempts;
  bool is_letter;
  What what;
};

enum class Role : std::uint8_t {
  Producer,
  Consumer,    ///< of the default group or a durable one
  Viewer,      ///< in a group of its own that goes with it
  Undertaker,  ///< takes dead letters
  Looker,      ///< looks at the newest message of the history
  Peer,        ///< opens, sends, receives, closes
};
inline constexpr std::uint32_t kRoles = 6;

enum class End : std::uint8_t { Running, Left, Killed, Refused, Failed };

/// One child process.
struct Life {
  // Writer: the supervisor.
  std::int32_t pid;
  Role role;
  std::uint32_t group;
  End end;
  std::int32_t wanted_point;  // -1: none
  std::uint32_t wanted_hit;
  bool wants_stop;  // at wanted_point: SIGSTOP instead of SIGKILL
  // Writer: whoever kills: the process itself before it does, or the supervisor.
  std::int64_t killed_ns;
  std::int32_t killed_at;  // label, -1 when at a random time
  // Writer: the child.
  std::int64_t asked_ns;   // before it subscribed
  std::int64_t joined_ns;  // when it had
  std::int64_t leaving_ns;
  std::uint64_t lost;  // as the channel counts it for this viewer, when it leaves
  std::atomic<std::uint32_t> sends;
  std::atomic<std::uint32_t> events;
  std::atomic<std::uint64_t> heartbeat;
  std::atomic<std::uint64_t> looks;
  std::atomic<std::int32_t> last_point;
  char error[200];
  Send sent[kMostSends];
  Event seen[kMostEvents];

  void note(const Event& event) noexcept {
    const std::uint32_t n = events.load(std::memory_order_relaxed);
    if (n == kMostEvents) return;
    seen[n] = event;
    events.store(n + 1, std::memory_order_release);
  }
  bool is_full() const noexcept {
    return events.load(std::memory_order_relaxed) + 64 > kMostEvents ||
           sends.load(std::memory_order_relaxed) == kMostSends;
  }
};

struct Log {
  std::atomic<bool> stop_sending;
  std::atomic<bool> stop;
  std::atomic<std::uint32_t> lives;
  Life life[kMostLives];
};

/// Distribution of times, in steps of a quarter of a millisecond.
struct Times {
  static constexpr std::uint32_t kSteps = 8000;
  static constexpr std::int64_t kStepNs = 250'000;
  std::uint64_t count;
  std::int64_t longest_ns;
  std::uint32_t steps[kSteps];

  void add(std::int64_t ns) noexcept {
    if (ns < 0) ns = 0;
    ++count;
    if (ns > longest_ns) longest_ns = ns;
    const std::int64_t step = ns / kStepNs;
    ++steps[step < kSteps ? step : kSteps - 1];
  }
  void add(const Times& other) noexcept {
    count += other.count;
    if (other.longest_ns > longest_ns) longest_ns = other.longest_ns;
    for (std::uint32_t i = 0; i < kSteps; ++i) steps[i] += other.steps[i];
  }
  double quantile_ms(double q) const noexcept {
    std::uint64_t below = 0;
    for (std::uint32_t i = 0; i < kSteps; ++i) {
      below += steps[i];
      if (static_cast<double>(below) >= q * static_cast<double>(count) && below != 0) {
        return static_cast<double>(i + 1) * kStepNs / 1e6;
      }
    }
    return 0;
  }
};

inline constexpr std::uint32_t kMostShapes = 16;
inline constexpr std::uint32_t kMostViolations = 40;

/// What one lane (a process that runs rounds one after the other) has counted.
struct Tally {
  std::atomic<std::uint64_t> heartbeat;
  std::atomic<std::uint64_t> round;
  std::uint64_t rounds[kMostShapes];
  std::uint64_t kills[kMostShapes];
  std::uint64_t lives[kMostShapes][kRoles];
  std::uint64_t stops;
  std::uint64_t sent;
  std::uint64_t received;
  std::uint64_t redelivered;
  std::uint64_t given_back;
  std::uint64_t rolled_forward;  // delivered though send() had not returned
  std::uint64_t dropped;
  std::uint64_t letters;
  std::uint64_t old_messages;  // received by viewers that joined later
  std::uint64_t looks;         // at the newest message
  std::uint64_t refused;       // no number left for a group
  std::uint64_t lost, torn, duplicated, disordered, leaked, stuck, other;  // violations
  std::uint64_t killed_at[kMaxPoints];
  std::uint64_t killed_at_random;
  std::atomic<std::uint64_t> hits[kMostShapes][kRoles][kMaxPoints];
  // From a death to the entry of the dead being free: when a process has joined meanwhile, and when none has.
  Times recovery_by_newcomers;
  Times recovery_by_waiters;
  Times recovery_in_stream;  // the same where messages keep coming, so that no wait lasts long
  Times redelivery;          // from a death to its message in other hands
  std::uint32_t violations;
  char violation[kMostViolations][400];
};

struct Shared {
  std::atomic<bool> stop;
  std::atomic<std::uint64_t> kills;
  std::atomic<std::uint64_t> next_round;
};

}  // namespace dsline::kill
