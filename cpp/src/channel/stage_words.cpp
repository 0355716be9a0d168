#include "dsline/stage_words.hpp"

#include <algorithm>
#include <bit>
#include <climits>

#include "base/checked.hpp"
#include "base/clock.hpp"
#include "memory/layout.hpp"
#include "memory/storage.hpp"
#include "slots/position.hpp"
#include "waiting/futex.hpp"
#include "waiting/spin.hpp"

namespace dsline {
namespace {

using Word = base::Atomic<std::uint64_t>;

constexpr std::uint32_t kStageMagic = 0x5753534C;  // "LSSW", little-endian
constexpr std::uint32_t kStageVersion = 1;
constexpr std::uint64_t kNoIntent = slots::kNoPosition;
constexpr std::int64_t kTurnSliceNs = 50'000'000;

/// Counters that every process of the stage writes, each on a line of its own or where it changes seldom.
struct StageHeader {
  std::uint32_t magic;
  std::uint32_t version;
  std::uint32_t inputs;
  std::uint32_t outputs;
  std::uint32_t tickets;

  alignas(64) base::Atomic<std::uint32_t> sleepers;  // somebody may sleep on `change`
  alignas(64) base::Atomic<std::uint32_t> change;    // futex
  // Hints: drawn is at most the next ticket to be drawn; all tickets before `finished` are of messages that are done with.
  alignas(64) Word drawn;
  Word finished;
};
static_assert(sizeof(StageHeader) % 64 == 0);

struct alignas(64) InputWords {
  Word done;
  Word lost;
};

/// One intent: {position, offset, done_after[inputs]}, on lines of its own.
constexpr std::uint64_t intent_words(std::uint32_t inputs) noexcept {
  return base::round_up(2 + std::uint64_t{inputs}, 8);
}

/// A ticket's place in the ring: lap:20 | sequence:44. Laps are counted from 1, so that 0 is before the first.
struct Entry {
  std::uint64_t bits;
  static constexpr std::uint32_t kLapBits = 64 - slots::kPositionBits;

  static constexpr Entry make(std::uint64_t lap, std::uint64_t sequence) noexcept {
    return {(lap + 1) << slots::kPositionBits | (sequence & slots::kPositionMask)};
  }
  /// Laps from `lap` to that of this entry: negative while the ticket of that lap is not drawn.
  constexpr std::int64_t ahead_of(std::uint64_t lap) const noexcept {
    return static_cast<std::int64_t>(((bits >> slots::kPositionBits) - (lap + 1)) << (64 - kLapBits)) >>
           (64 - kLapBits);
  }
  constexpr std::uint64_t sequence_low() const noexcept { return bits & slots::kPositionMask; }
};

std::uint64_t stage_bytes(std::uint32_t inputs, std::uint32_t outputs, std::uint32_t tickets) noexcept {
  const std::uint64_t intents = 2 * std::uint64_t{outputs} * intent_words(inputs);
  return base::round_up(
      sizeof(StageHeader) + inputs * sizeof(InputWords) + 8 * (intents + std::uint64_t{tickets}),
      memory::kPageBytes);
}

void raise_to(Word& word, std::uint64_t value) noexcept {
  std::uint64_t seen = word.load(std::memory_order_relaxed);
  while (seen < value && !word.compare_exchange_weak(seen, value, std::memory_order_seq_cst)) {
  }
}

}  // namespace

struct StageWords::Impl {
  std::unique_ptr<memory::Storage> storage;
  std::uint64_t bytes = 0;
  StageHeader* header = nullptr;
  InputWords* input = nullptr;
  Word* intents = nullptr;
  Word* ring = nullptr;
  // Private copies: what a peer may scribble on is never a size.
  std::uint32_t inputs = 0;
  std::uint32_t outputs = 0;
  std::uint32_t tickets = 0;
  waiting::AdaptiveSpin spinner;

  explicit Impl(std::unique_ptr<memory::Storage> of) : storage(std::move(of)) {}
  ~Impl() {
    if (header != nullptr) storage->unmap(reinterpret_cast<std::byte*>(header), bytes);
  }
  Impl(const Impl&) = delete;
  Impl& operator=(const Impl&) = delete;

  void map(std::uint64_t size) {
    bytes = size;
    header = reinterpret_cast<StageHeader*>(storage->map(0, size, memory::Access::ReadWrite));
  }
  void place_parts() noexcept {
    inputs = header->inputs;
    outputs = header->outputs;
    tickets = header->tickets;
    input = reinterpret_cast<InputWords*>(header + 1);
    intents = reinterpret_cast<Word*>(input + inputs);
    ring = intents + 2 * std::uint64_t{outputs} * intent_words(inputs);
  }

  Word* intent(std::uint32_t output, std::uint64_t position) const noexcept {
    return intents + (2 * std::uint64_t{output} + (position & 1)) * intent_words(inputs);
  }

  std::uint64_t lap(std::uint64_t ticket) const noexcept { return ticket / tickets; }
  Word& at(std::uint64_t ticket) const noexcept { return ring[ticket & (tickets - 1)]; }
  Entry entry(std::uint64_t ticket) const noexcept {
    // SYNC ticket: pairs with the CAS in try_draw().
    return {at(ticket).load(std::memory_order_acquire)};
  }

  // Dekker with sleep(): here what they wait for changes first, and then `sleepers` is looked at. Who sleeps sets it again
  // for every slice, so one that died is noticed once and costs nothing from then on.
  void wake() noexcept {
    if (header->sleepers.load(std::memory_order_seq_cst) == 0) return;
    header->sleepers.store(0, std::memory_order_seq_cst);
    header->change.fetch_add(1, std::memory_order_seq_cst);
    waiting::futex_wake(header->change, INT_MAX);
  }

  template <class Ready>
  Outcome wait(Ready ready, std::int64_t deadline_ns, bool spin) noexcept {
    if (ready()) return Outcome::Ok;
    if (base::monotonic_ns() >= deadline_ns) return Outcome::TimedOut;
    if (spin && spinner(ready, deadline_ns, 0)) return Outcome::Ok;
    const std::int64_t now = base::monotonic_ns();
    // In this order: who clears `sleepers` changes `change` afterwards.
    const std::uint32_t seen = header->change.load(std::memory_order_seq_cst);
    header->sleepers.store(1, std::memory_order_seq_cst);
    base::fence_seq_cst();
    if (ready()) return Outcome::Ok;
    if (now >= deadline_ns) return Outcome::TimedOut;
    const waiting::Wake woken =
        waiting::futex_wait(header->change, seen, std::min(deadline_ns, now + kTurnSliceNs));
    if (woken == waiting::Wake::Interrupted) return Outcome::Interrupted;
    if (ready()) return Outcome::Ok;
    return base::monotonic_ns() >= deadline_ns ? Outcome::TimedOut : Outcome::Empty;
  }

  /// Moves `finished` on over tickets whose messages are done with, at most to `end`. Requires: they are drawn.
  void forget_finished(const Channel& inbox, std::uint64_t end, std::uint64_t near) noexcept {
    std::uint64_t ticket = header->finished.load(std::memory_order_acquire);
    end = std::min(end, input[0].done.load(std::memory_order_acquire));
    for (; ticket < end; ++ticket) {
      const Entry of = entry(ticket);
      if (of.ahead_of(lap(ticket)) > 0) continue;  // somebody else was here, and it has been drawn again
      const std::int64_t away = slots::distance(of.sequence_low(), near);
      if (inbox.is_outstanding(near + static_cast<std::uint64_t>(away))) break;
    }
    raise_to(header->finished, ticket);
  }
};

StageWords::StageWords(std::unique_ptr<Impl> impl) : impl_(std::move(impl)) {}
StageWords::~StageWords() = default;

std::shared_ptr<StageWords> StageWords::create(std::uint32_t inputs, std::uint32_t outputs,
                                               std::uint32_t tickets) {
  if (inputs == 0 || inputs > kMostInputs || outputs > kMostOutputs || tickets > kMostTickets) {
    throw Error(ErrorCode::InvalidArgument,
                "a stage of " + std::to_string(inputs) + " inputs, " + std::to_string(outputs) +
                    " outputs and " + std::to_string(tickets) + " tickets: 1 to " +
                    std::to_string(kMostInputs) + " inputs, at most " + std::to_string(kMostOutputs) +
                    " outputs and " + std::to_string(kMostTickets) + " tickets are possible");
  }
  if (tickets != 0) tickets = std::bit_ceil(tickets);
  const std::uint64_t bytes = stage_bytes(inputs, outputs, tickets);
  auto impl = std::make_unique<Impl>(memory::make_memfd_storage());
  impl->storage->resize(bytes);
  impl->storage->reserve(0, bytes, "creating a stage");
  impl->map(bytes);
  impl->header->magic = kStageMagic;
  impl->header->version = kStageVersion;
  impl->header->inputs = inputs;
  impl->header->outputs = outputs;
  impl->header->tickets = tickets;
  impl->place_parts();
  for (std::uint32_t output = 0; output < outputs; ++output) {
    for (const std::uint64_t parity : {0, 1}) {
      impl->intent(output, parity)->store(kNoIntent, std::memory_order_relaxed);
    }
  }
  return std::shared_ptr<StageWords>(new StageWords(std::move(impl)));
}

std::shared_ptr<StageWords> StageWords::adopt(int fd) {
  auto impl = std::make_unique<Impl>(memory::adopt_memfd_storage(fd));
  const std::uint64_t size = impl->storage->size();
  if (size >= memory::kPageBytes) {
    impl->map(size);
    const StageHeader& header = *impl->header;
    if (header.magic == kStageMagic && header.version == kStageVersion) {
      impl->place_parts();
      const bool sound = impl->inputs >= 1 && impl->inputs <= kMostInputs && impl->outputs <= kMostOutputs &&
                         impl->tickets <= kMostTickets &&
                         (impl->tickets == 0 || std::has_single_bit(impl->tickets));
      if (sound && size == stage_bytes(impl->inputs, impl->outputs, impl->tickets))
        return std::shared_ptr<StageWords>(new StageWords(std::move(impl)));
    }
  }
  throw Error(ErrorCode::ChannelLayout, "the descriptor is not the one of a stage of this version");
}

int StageWords::descriptor() const noexcept { return impl_->storage->descriptor(); }
std::uint32_t StageWords::inputs() const noexcept { return impl_->inputs; }
std::uint32_t StageWords::outputs() const noexcept { return impl_->outputs; }
std::uint32_t StageWords::tickets() const noexcept { return impl_->tickets; }

std::uint64_t StageWords::done(std::uint32_t input) const noexcept {
  // SYNC done: pairs with commit(); who sees that the turn has come sees what was published before it.
  return impl_->input[input].done.load(std::memory_order_acquire);
}

void StageWords::set_done(std::uint32_t input, std::uint64_t value) noexcept {
  impl_->input[input].done.store(value, std::memory_order_seq_cst);
}

void StageWords::commit(std::uint32_t input, std::uint64_t value) noexcept {
  // SYNC done: release half pairs with done(); sequentially consistent with a sleeper's last look.
  raise_to(impl_->input[input].done, value);
  base::fence_seq_cst_after_rmw();
  impl_->wake();
}

bool StageWords::skip_lost(std::uint32_t input, std::uint64_t value) noexcept {
  // SYNC done: as in commit(). One of those that find the message gone wins.
  if (!impl_->input[input].done.compare_exchange_strong(value, value + 1, std::memory_order_seq_cst))
    return false;
  impl_->input[input].lost.fetch_add(1, std::memory_order_relaxed);
  base::fence_seq_cst_after_rmw();
  impl_->wake();
  return true;
}

std::uint64_t StageWords::lost(std::uint32_t input) const noexcept {
  return impl_->input[input].lost.load(std::memory_order_relaxed);
}

Outcome StageWords::wait_turn(std::uint32_t input, std::uint64_t value, std::int64_t deadline_ns,
                              bool spin) noexcept {
  const Word& word = impl_->input[input].done;
  return impl_->wait([&word, value] { return word.load(std::memory_order_seq_cst) >= value; }, deadline_ns,
                     spin);
}

void StageWords::intend(std::uint32_t output, std::uint64_t position, std::uint64_t offset,
                        const std::uint64_t* done_after) noexcept {
  Word* at = impl_->intent(output, position);
  // Half written it belongs to no position. The intent of the position before it has the other parity.
  at[0].store(kNoIntent, std::memory_order_relaxed);
  base::fence_release();
  at[1].store(offset, std::memory_order_relaxed);
  for (std::uint32_t i = 0; i < impl_->inputs; ++i) at[2 + i].store(done_after[i], std::memory_order_relaxed);
  // SYNC intent: pairs with intended(). Visible to whoever sees the message, whose publication releases it.
  at[0].store(position, std::memory_order_release);
}

bool StageWords::intended(std::uint32_t output, std::uint64_t position, std::uint64_t& offset,
                          std::uint64_t* done_after) const noexcept {
  const Word* at = impl_->intent(output, position);
  if (position == kNoIntent || at[0].load(std::memory_order_acquire) != position) return false;
  offset = at[1].load(std::memory_order_relaxed);
  for (std::uint32_t i = 0; i < impl_->inputs; ++i) done_after[i] = at[2 + i].load(std::memory_order_relaxed);
  base::fence_acquire();
  return at[0].load(std::memory_order_relaxed) == position;
}

Outcome StageWords::try_draw(const Channel& inbox, std::uint64_t sequence, bool control,
                             std::uint64_t& ticket) noexcept {
  StageHeader& header = *impl_->header;
  if (control ? inbox.anything_outstanding_before(sequence) : inbox.any_control_before(sequence))
    return Outcome::Empty;
  for (std::uint64_t t = header.drawn.load(std::memory_order_acquire);;) {
    Entry seen = impl_->entry(t);
    if (seen.ahead_of(impl_->lap(t)) >= 0) {  // drawn; walking makes a stale hint harmless
      ++t;
      continue;
    }
    if (t >= impl_->tickets && t - impl_->tickets >= header.finished.load(std::memory_order_acquire)) {
      impl_->forget_finished(inbox, t, sequence);
      if (t - impl_->tickets >= header.finished.load(std::memory_order_acquire)) return Outcome::Empty;
    }
    // SYNC ticket: pairs with entry().
    if (!impl_->at(t).compare_exchange_strong(seen.bits, Entry::make(impl_->lap(t), sequence).bits,
                                              std::memory_order_acq_rel))
      continue;
    raise_to(header.drawn, t + 1);
    ticket = t;
    return Outcome::Ok;
  }
}

Outcome StageWords::draw(const Channel& inbox, std::uint64_t sequence, bool control, std::uint64_t& ticket,
                         std::int64_t deadline_ns, bool spin) noexcept {
  return impl_->wait([&] { return try_draw(inbox, sequence, control, ticket) == Outcome::Ok; }, deadline_ns,
                     spin);
}

bool StageWords::find(std::uint64_t sequence, std::uint64_t& ticket) const noexcept {
  const std::uint64_t lap = impl_->lap(impl_->header->drawn.load(std::memory_order_acquire));
  for (std::uint32_t i = 0; i < impl_->tickets; ++i) {
    const Entry of = impl_->entry(i);
    if (of.bits == 0 || of.sequence_low() != (sequence & slots::kPositionMask)) continue;
    ticket = (lap + static_cast<std::uint64_t>(of.ahead_of(lap))) * impl_->tickets + i;
    return true;
  }
  return false;
}

bool StageWords::sequence_of(std::uint64_t ticket, std::uint64_t& sequence) const noexcept {
  const Entry of = impl_->entry(ticket);
  if (of.ahead_of(impl_->lap(ticket)) != 0) return false;
  sequence = of.sequence_low();
  return true;
}

void StageWords::acknowledged() noexcept {
  base::fence_seq_cst();
  impl_->wake();
}

}  // namespace dsline
