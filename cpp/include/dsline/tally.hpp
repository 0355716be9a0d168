#pragma once

#include <cstdint>
#include <memory>

#include "dsline/channel.hpp"

namespace dsline {

/// What the processes of a queue count together beside the channel that carries its objects: objects that have entered,
/// objects that are done with, objects that wait in the memory of a process for room, and whether the queue is shut down.
/// Two pages of anonymous shared memory.
///
/// Threads: any number of any processes, but the first keep() or take_part() of a process runs alone.
/// Death: what a process had pending or was putting no longer counts once somebody has called forget_the_dead(). A process
///   that dies between the publication of an object and put_is_over() leaves one object too few in the count, never one
///   that nobody can finish.
class Tally {
 public:
  static std::shared_ptr<Tally> create();
  /// Of a descriptor that another process handed over (taken over). Throws Error(ChannelLayout) for any other.
  static std::shared_ptr<Tally> adopt(int fd);
  ~Tally();

  /// Of the shared bytes; stays the tally's.
  int descriptor() const noexcept;

  // --- the end ---------------------------------------------------------------------------------------------------

  void shut_down(bool at_once) noexcept;
  bool is_shut_down() const noexcept;
  bool is_shut_down_at_once() const noexcept;

  // --- objects that wait in the memory of a process -------------------------------------------------------------

  /// One more of this process. Throws Error(TooManyHandles) when 256 processes have one.
  void keep();
  /// One of them is about to be published, or is given up: it is not waiting() any more.
  void let_go() noexcept;
  /// It has been published, or was given up: it is not pending() any more.
  void sent() noexcept;
  /// Of this process, not sent.
  std::uint64_t own_pending() const noexcept;
  /// Of all processes, not sent.
  std::uint64_t pending() const noexcept;
  /// Of all processes, not let go: with the messages of the channel, what the queue holds.
  std::uint64_t waiting() const noexcept;
  /// Sets the counts of processes that have died to zero; true when there were any.
  bool forget_the_dead();

  // --- objects in work -------------------------------------------------------------------------------------------

  /// Before begin_put(). Throws Error(TooManyHandles) when 256 processes have put.
  void take_part();
  /// An object of this process is being put: it counts before others can see it, so that it is never done before. One that
  /// has waited (keep()) counts already.
  void begin_put() noexcept;
  /// It counts for all from here on, whatever becomes of this process; or it was not published after all.
  void put_is_over(bool entered) noexcept;
  /// Entered or waiting, and not done. Never less than at the time of the call.
  std::uint64_t unfinished() const noexcept;
  /// One of them is done; false when there is none.
  bool finish_one() noexcept;
  /// Sleeps until unfinished() is 0, for one slice of 50 ms at most: Ok, Empty (the slice is over), TimedOut or
  /// Interrupted.
  Outcome wait_until_finished(std::int64_t deadline_ns) noexcept;

  // --- room, where it is not that of the channel ----------------------------------------------------------------

  /// For wait_for_room(): taken before one looks whether there is room.
  std::uint32_t room_word() const noexcept;
  Outcome wait_for_room(std::uint32_t word, std::int64_t deadline_ns) noexcept;
  /// Wakes those that wait for room.
  void tell_of_room() noexcept;

 private:
  struct Impl;
  explicit Tally(std::unique_ptr<Impl> impl);
  std::unique_ptr<Impl> impl_;
};

}  // namespace dsline
