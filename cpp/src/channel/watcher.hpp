#pragma once

#include <condition_variable>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

#include "base/atomic.hpp"
#include "base/process.hpp"
#include "waiting/futex.hpp"
#include "waiting/wait_point.hpp"

namespace dsline::channel {

/// Something that the watcher waits for: a wait point with its condition, and an eventfd to tell of it.
///
/// Threads: the watcher's mutex guards the private part and is held around the virtual functions, but look_after(), which
/// runs without it; a Watched is not destroyed while one of them runs, if drop() was called before.
class Watched {
 public:
  Watched() = default;
  virtual ~Watched() = default;
  Watched(const Watched&) = delete;
  Watched& operator=(const Watched&) = delete;

  virtual waiting::WaitPoint point() = 0;
  /// Registers as a sleeper; false when the handle is closed, and its bit somebody else's.
  virtual bool begin() = 0;
  virtual void end() noexcept = 0;
  /// As the last look before sleeping.
  virtual bool is_ready() noexcept = 0;
  /// Wakes another sleeper if what this one was woken for is still there.
  virtual void pass_on() noexcept = 0;
  /// Called every 50 ms while armed (with many others less often); true when whoever waits had better look again.
  virtual bool look_after() noexcept = 0;
  virtual const void* owner() const noexcept = 0;

 private:
  friend class Watcher;
  struct Crew;

  Crew* crew = nullptr;  // whose entries it is in
  int event = -1;        // eventfd of this generation
  std::uint32_t generation = 0;
  std::uint32_t looked = 0;  // the point's sequence before the last look
  std::uint32_t waited = 0;  // the point's sequence that the thread sleeps, or slept last, with
  bool is_armed = false;
  bool is_signalled = false;  // the eventfd's counter is not 0
  bool is_slept_on = false;   // the thread sleeps on its word
  bool is_swallowed = false;  // a wake-up may have gone to the thread that another sleeper needs
  bool is_hit = false;        // it was its word, as far as can be told
  bool is_recent = false;     // armed since the last slice ended
};

/// The threads of this process that sleep for armed watches: one as long as the kernel can wait for many words at once.
///
/// Threads: any. The mutex is held for looks and signals, never while sleeping or recovering.
/// Invariants: 1. An armed watch is registered as a sleeper, and its thread sleeps with a sequence that was loaded before
///   the last look, or is on its way to look again. 2. A watch that was signalled is not armed. 3. A wake-up that the thread
///   was given is passed on if the condition still holds, whether or not the watch was armed and signalled: the thread takes
///   nothing, so it must not count as one of those who do. 4. A watch that is no longer armed stays in the set for one to
///   two slices, so that arming it again needs no system call; the first wake-up that it swallows then ends that, so that no
///   two watchers can pass a wake-up to each other for ever.
/// Fork: the child makes a new watcher at first use, and leaves the parent's alone, whose mutex may be locked for ever.
/// Death: whoever dies takes its threads along; its bits are swept as those of any sleeper.
class Watcher {
 public:
  static Watcher& instance();
  /// nullptr where nothing was watched yet.
  static Watcher* existing() noexcept;

  /// See Watch. Throws Error(System).
  int descriptor(Watched& watched);
  bool arm(Watched& watched);
  void clear(Watched& watched);
  /// True when it was used in this process.
  bool knows(const Watched& watched) const noexcept {
    return watched.generation == base::fork_generation() + 1;
  }
  /// Ends a watch: when this returns nobody looks at it, or sleeps on its word. Its descriptor stays, and is readable.
  void drop(Watched& watched) noexcept;
  void drop_all_of(const void* owner) noexcept;
  /// Closes the descriptor. Requires: dropped.
  static void forget(Watched& watched) noexcept;
  /// Ends the threads. Arming starts them again.
  void stop() noexcept;

 private:
  friend struct std::default_delete<Watcher>;
  using Crew = Watched::Crew;

  Watcher();
  ~Watcher();
  void renew(Watched& watched);
  Crew& crew_with_room();
  void run(Crew& crew);
  void settle(Crew& crew, bool slice_over) noexcept;
  void sleep(Crew& crew, std::unique_lock<std::mutex>& lock);
  void look_after(Crew& crew, std::unique_lock<std::mutex>& lock);
  void kick(Crew& crew) noexcept;
  void disarm(Watched& watched) noexcept;
  void signal(Watched& watched) noexcept;
  void signal_if_ready(Watched& watched, bool surely) noexcept;
  void drain(Watched& watched) noexcept;
  void drop(Watched& watched, std::unique_lock<std::mutex>& lock) noexcept;

  const std::uint32_t generation_;
  std::mutex mutex_;
  std::condition_variable over_;  // a thread has woken up, or has looked after somebody
  std::vector<std::unique_ptr<Crew>> crews_;
};

}  // namespace dsline::channel
