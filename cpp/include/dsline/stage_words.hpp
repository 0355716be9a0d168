#pragma once

#include <cstdint>
#include <memory>

#include "dsline/channel.hpp"

namespace dsline {

/// How far a stage is, for the processes that share it: pages of anonymous shared memory beside its channels.
///
/// A stage takes messages from its inputs and publishes to its outputs, each exactly once whoever dies. A worker holds an
/// input message until what it makes of it is in the outputs, and only who has the *turn* publishes:
///
///   `done(input)` is the sequence of the next message to be committed. Who holds that message has the turn. It says what a
///   publication at `position` will mean (intend), publishes, stores the new `done` (commit), releases the message.
///
/// An output has two intents, chosen by the parity of the position: while the next one is written, that of the last
/// publication stays whole. A worker that takes the turn of a dead one waits until nobody is entering (Channel), and
/// finds in the intent of the last position how far the dead one was.
///
/// In an unordered stage what is committed is a *ticket*, drawn when an input's result is ready. A ring remembers which
/// input has which ticket for as long as that input may come again.
///
/// docs/design/stage-commit.md has every step, and what holds when a process dies there.
///
/// Threads: any number, of any processes; intend() by the one that has the turn.
/// Death: of a process at any step: nothing here needs to be mended.
class StageWords {
 public:
  static constexpr std::uint32_t kMostInputs = 256;
  static constexpr std::uint32_t kMostOutputs = 256;
  static constexpr std::uint32_t kMostTickets = 1u << 20;

  /// `tickets`: size of the ring of an unordered stage, rounded up to a power of two; 0: the stage is ordered. Throws
  /// Error(InvalidArgument).
  static std::shared_ptr<StageWords> create(std::uint32_t inputs, std::uint32_t outputs,
                                            std::uint32_t tickets);
  /// Of a descriptor that another process handed over (taken over). Throws Error(ChannelLayout) for any other.
  static std::shared_ptr<StageWords> adopt(int fd);
  ~StageWords();

  /// Of the shared bytes; stays the object's.
  int descriptor() const noexcept;
  std::uint32_t inputs() const noexcept;
  std::uint32_t outputs() const noexcept;
  /// 0: the stage is ordered.
  std::uint32_t tickets() const noexcept;

  // --- turns. Requires: input < inputs(), output < outputs() -------------------------------------------------------

  /// Next sequence of the input to be committed; of an unordered stage the next ticket (input 0).
  std::uint64_t done(std::uint32_t input) const noexcept;
  /// Where the stage begins. Nobody else uses the words yet.
  void set_done(std::uint32_t input, std::uint64_t value) noexcept;
  /// Everything before `value` is out. Never goes back; wakes those that wait.
  void commit(std::uint32_t input, std::uint64_t value) noexcept;
  /// Passes the turn of `value`, whose message is gone for ever (Channel::is_outstanding), and counts it. False when it is
  /// not the turn. Requires: the caller has waited until nobody is entering the outputs, and the intents say that
  /// `value` is not out; if they say that it is out, commit() is right.
  bool skip_lost(std::uint32_t input, std::uint64_t value) noexcept;
  std::uint64_t lost(std::uint32_t input) const noexcept;
  /// Waits until done(input) >= value, for one slice of 50 ms at most: Ok, Empty (the slice is over), TimedOut or
  /// Interrupted. Who gets Empty looks after the dead, and whether somebody still works on the message whose turn it is.
  Outcome wait_turn(std::uint32_t input, std::uint64_t value, std::int64_t deadline_ns, bool spin) noexcept;

  /// What a publication at `position` will mean: `offset` outputs of the message whose turn it is are out, and done(i) is
  /// done_after[i]. Before it is published, by who has the turn.
  void intend(std::uint32_t output, std::uint64_t position, std::uint64_t offset,
              const std::uint64_t* done_after) noexcept;
  /// False when the intent for `position` is not there (any more). `done_after` has room for inputs() values.
  bool intended(std::uint32_t output, std::uint64_t position, std::uint64_t& offset,
                std::uint64_t* done_after) const noexcept;

  // --- tickets. Requires: tickets() != 0; `inbox` is the one input, a handle of the group of the stage ----------------

  /// Draws the next ticket for a message that the caller holds and that has none (find()): Ok, or Empty as long as
  ///   a control frame before it is not through, or, for a `control` frame, any message before it: so a control frame
  ///   stays between the messages that it was sent between; or
  ///   a message as many tickets ago as the ring has may still come again.
  Outcome try_draw(const Channel& inbox, std::uint64_t sequence, bool control,
                   std::uint64_t& ticket) noexcept;
  /// The same, and waits as wait_turn() does.
  Outcome draw(const Channel& inbox, std::uint64_t sequence, bool control, std::uint64_t& ticket,
               std::int64_t deadline_ns, bool spin) noexcept;
  /// The ticket that was drawn for a message, by whoever held it before. Requires: the caller holds it.
  bool find(std::uint64_t sequence, std::uint64_t& ticket) const noexcept;
  /// The message of a ticket. Exact for tickets from done(0) on; false for one that is not drawn, or long gone.
  bool sequence_of(std::uint64_t ticket, std::uint64_t& sequence) const noexcept;
  /// After the release of a message: wakes those that wait in draw().
  void acknowledged() noexcept;

 private:
  struct Impl;
  explicit StageWords(std::unique_ptr<Impl> impl);
  std::unique_ptr<Impl> impl_;
};

}  // namespace dsline
