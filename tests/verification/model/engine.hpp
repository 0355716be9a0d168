#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "scheduled_atomic.hpp"
#include "world.hpp"

/// The deterministic scheduler and the search over all its choices.
namespace dsline::model {

struct Bounds {
  std::uint64_t max_states = 0;  ///< 0: none
  double max_seconds = 0;
  bool kill_everybody = true;  ///< in every state: all die, one recovers and drains
  int preemptions = -1;        ///< a process that could go on is interrupted at most so often; -1: no bound
  bool compare_stacks =
      true;  ///< identity of a process inside an operation: its stack, or the history of what it read
};

/// What is to be explored: supplied by the configuration.
class Subject {
 public:
  virtual ~Subject() = default;
  virtual int processes() const = 0;
  /// Number of ways in which process `p`, between two operations, can go on; 0: none.
  virtual int choices(int p) const = 0;
  /// One operation, on the process' own stack.
  virtual void run(int p, int choice) = 0;
  /// A process has just died.
  virtual void on_death(int p) = 0;
  /// A word changed.
  virtual void on_write(const void* at, std::uint64_t before, std::uint64_t after) = 0;
  /// Checked in every state: everybody has died; recover and drain.
  virtual void check_after_all_died() = 0;
  /// Checked where every living process is between two operations.
  virtual void check_at_rest() = 0;
  /// Checked where nobody can go on: some sleep, the others are done or dead.
  virtual void check_blocked() = 0;
  /// A sleeper's time slice may run out (only where nobody else can go on).
  virtual bool slices_end() const = 0;
  /// Process `p` never sees a deadline pass.
  virtual bool is_patient(int p) const = 0;
  virtual std::string describe(const void* at) const = 0;
  virtual std::string name_of(int p) const = 0;
};

struct Result {
  std::uint64_t states = 0;
  std::uint64_t steps = 0;
  std::uint64_t kills = 0;
  std::uint64_t checks_at_rest = 0;
  std::uint64_t ends = 0;  ///< different shared memories in which everybody has died
  std::uint64_t depth = 0;
  std::uint64_t shared_words = 0;
  double seconds = 0;
  bool cut = false;
  std::string violation;
  std::vector<std::string> trace;
};

/// The first violation of a promise ends the search.
void violate(const char* promise) noexcept;
bool is_violated() noexcept;

/// Shared bytes that belong to the state.
void add_range(void* begin, std::size_t bytes);
/// Words that nobody decides by: statistics, times, notes for people.
void ignore_word(const void* at, std::size_t bytes);

/// A counter that is only compared for being the same: states in which it differs by a multiple of what `tells` can count
/// are one. Requires: it can count more than there are processes that remember a value of it.
void count_modulo(const void* at, std::uint64_t tells);

Result explore(Subject& subject, const Bounds& bounds);

/// A step of the kernel's (locks, futexes): as an access to the word `at`.
void kernel_step(const void* at) noexcept;
void kernel_changed(const void* at) noexcept;

/// Inside an operation, right after kernel_step(at): sleeps until somebody wakes `at`; false when the slice ran out.
bool fall_asleep(const void* at) noexcept;
/// Wakes at most `count` sleepers on `at`.
void wake_sleepers(const void* at, int count) noexcept;

/// Runs `work(context)` as process `p` without others in between; false when it took more than `most` accesses.
bool runs_alone() noexcept;
bool run_alone(int p, void (*work)(void*), void* context, std::uint64_t most);

/// Nanoseconds on a clock that stands still for the patient, and jumps by seconds at every look of the others.
std::int64_t look_at_clock() noexcept;

void trace_line(const std::string& text);
bool is_tracing() noexcept;

}  // namespace dsline::model
