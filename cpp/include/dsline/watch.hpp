#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>

#include "dsline/channel.hpp"

namespace dsline {

/// What somebody waits for at a channel.
enum class Side : int {
  Message = 0,  ///< something to receive, or the end of the channel or the handle
  Room = 1,     ///< a free slot, or the end
};

/// A descriptor that becomes readable when a handle has something, for those who wait for many things at once.
///
/// Armed, it becomes readable at the latest when there is something; it stays readable, and is not armed any more, until
/// it is armed again. It may become readable for nothing: others may take what was there. It never takes anything, and
/// whoever else sleeps for the same thing is woken as well. A thread of this process waits for all armed watches.
///
/// Threads: any number. Fork: the child closes the parent's descriptor and gets one of its own at first use.
class Watch {
 public:
  /// Not armed. Throws Error(System) where there is no descriptor left.
  Watch(std::shared_ptr<Channel> channel, Side side);
  ~Watch();
  Watch(const Watch&) = delete;
  Watch& operator=(const Watch&) = delete;

  /// Valid as long as this object (in a forked child until it has another), also when the handle is closed.
  int descriptor();
  /// Makes it unreadable, and watches: true when it is readable again at once.
  /// Throws Error(System) where no thread can be started.
  bool arm();
  /// The same where descriptor() or arm() was called in this process, else nothing.
  void arm_again();
  /// Makes it unreadable without arming it.
  void clear();

 private:
  struct Impl;
  std::unique_ptr<Impl> impl_;
};

/// A handle that wait_for_any() looks at.
struct Waited {
  Channel* channel = nullptr;
  Side side = Side::Message;
  bool is_ready = false;  ///< result
};
/// Handles of one wait_for_any() at most; 0 where the kernel cannot wait for several.
std::size_t most_waited() noexcept;

/// Waits until one of the handles has something, at most one slice of 50 ms: Ok (`is_ready` says which), Empty (the slice
/// was in vain: again, without spinning), TimedOut, Interrupted. Takes nothing, and wakes whoever else sleeps for the same
/// thing. Requires: 1 to most_waited() of them; the caller keeps them alive.
Outcome wait_for_any(Waited* list, std::size_t count, std::int64_t deadline_ns, bool spin);

/// For tests: makes watches and waits do without futex_waitv, as on a kernel that lacks it; watches made before keep on.
void pretend_old_kernel(bool pretend) noexcept;

}  // namespace dsline
