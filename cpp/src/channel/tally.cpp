#include "dsline/tally.hpp"

#include <algorithm>
#include <climits>

#include "base/clock.hpp"
#include "base/process.hpp"
#include "memory/layout.hpp"
#include "memory/storage.hpp"
#include "waiting/futex.hpp"

namespace dsline {
namespace {

constexpr std::uint32_t kTallyMagic = 0x5951534C;  // "LSQY", little-endian
constexpr std::uint32_t kTallyVersion = 1;
constexpr std::uint32_t kEntries = memory::kMaxParticipants;
constexpr std::uint32_t kNoEntry = ~std::uint32_t{0};
constexpr std::uint64_t kBytes = 2 * memory::kPageBytes;
constexpr std::uint64_t kShut = 1;
constexpr std::uint64_t kShutAtOnce = 2;
constexpr std::int64_t kTallySliceNs = 50'000'000;

/// What is shared. Every word is sequentially consistent: none of them is on the way of a message that finds room.
struct TallyState {
  std::uint32_t magic;
  std::uint32_t version;
  base::Atomic<std::uint64_t> end;  // bits kShut, kShutAtOnce; writers: shut_down()

  alignas(64) base::Atomic<std::uint64_t> entered;  // writers: senders
  alignas(64) base::Atomic<std::uint64_t> done;     // writers: those that have received
  base::Atomic<std::uint32_t> done_word;            // futex: changes when nothing is unfinished any more

  alignas(64) base::Atomic<std::uint32_t> room_word;  // futex: changes when there is more room
  base::Atomic<std::uint32_t> room_waiters;           // one that dies stays counted: needless wake-ups

  // Of the process that holds the kernel lock of that number; of nobody, or of a dead one, where nobody does.
  alignas(64) base::Atomic<std::uint64_t> pending[kEntries];  // not sent
  alignas(64)
      base::Atomic<std::uint64_t> waiting[kEntries];  // not let go: pending, but for the one that enters now
};
static_assert(sizeof(TallyState) <= kBytes && std::is_standard_layout_v<TallyState>);

std::uint64_t sum(const base::Atomic<std::uint64_t> (&counts)[kEntries]) noexcept {
  std::uint64_t all = 0;
  for (const auto& count : counts) all += count.load();
  return all;
}

}  // namespace

struct Tally::Impl {
  std::unique_ptr<memory::Storage> storage;
  TallyState* state = nullptr;
  std::uint32_t mine = kNoEntry;  // number of this process
  std::uint32_t process = 0;      // fork generation that `mine` and the locks belong to

  explicit Impl(std::unique_ptr<memory::Storage> bytes)
      : storage(std::move(bytes)), process(base::fork_generation()) {}
  ~Impl() {
    if (state == nullptr) return;
    if (has_entry()) reset(mine);
    storage->unmap(reinterpret_cast<std::byte*>(state), kBytes);
  }
  Impl(const Impl&) = delete;
  Impl& operator=(const Impl&) = delete;

  void map() { state = reinterpret_cast<TallyState*>(storage->map(0, kBytes, memory::Access::ReadWrite)); }
  bool has_entry() const noexcept { return mine != kNoEntry && process == base::fork_generation(); }

  void reset(std::uint32_t number) noexcept {
    state->pending[number].store(0);
    state->waiting[number].store(0);
  }

  /// In a forked child the number is the parent's.
  void renew() {
    if (process == base::fork_generation()) return;
    storage->renew_locks();
    mine = kNoEntry;
    process = base::fork_generation();
  }

  void claim_entry() {
    renew();
    if (mine != kNoEntry) return;
    for (std::uint32_t i = 0; i < kEntries; ++i) {
      if (storage->is_locked(i) || !storage->try_lock(i)) continue;
      reset(i);  // what a dead one left
      mine = i;
      return;
    }
    throw Error(ErrorCode::TooManyHandles,
                "objects of 256 processes wait for room in this queue, which is the most it can count");
  }
};

Tally::Tally(std::unique_ptr<Impl> impl) : impl_(std::move(impl)) {}
Tally::~Tally() = default;

std::shared_ptr<Tally> Tally::create() {
  auto impl = std::make_unique<Impl>(memory::make_memfd_storage());
  impl->storage->resize(kBytes);
  impl->storage->reserve(0, kBytes, "creating a queue");
  impl->map();
  impl->state->magic = kTallyMagic;
  impl->state->version = kTallyVersion;
  return std::shared_ptr<Tally>(new Tally(std::move(impl)));
}

std::shared_ptr<Tally> Tally::adopt(int fd) {
  auto impl = std::make_unique<Impl>(memory::adopt_memfd_storage(fd));
  if (impl->storage->size() == kBytes) {
    impl->map();
    if (impl->state->magic == kTallyMagic && impl->state->version == kTallyVersion) {
      return std::shared_ptr<Tally>(new Tally(std::move(impl)));
    }
  }
  throw Error(ErrorCode::ChannelLayout, "the descriptor is not the one of a queue of this version");
}

int Tally::descriptor() const noexcept { return impl_->storage->descriptor(); }

void Tally::shut_down(bool at_once) noexcept {
  impl_->state->end.fetch_or(at_once ? kShut | kShutAtOnce : kShut);
  tell_of_room();
}
bool Tally::is_shut_down() const noexcept { return impl_->state->end.load() != 0; }
bool Tally::is_shut_down_at_once() const noexcept { return (impl_->state->end.load() & kShutAtOnce) != 0; }

void Tally::keep() {
  if (!impl_->has_entry()) impl_->claim_entry();
  impl_->state->pending[impl_->mine].fetch_add(1);
  impl_->state->waiting[impl_->mine].fetch_add(1);
}
void Tally::let_go() noexcept { impl_->state->waiting[impl_->mine].fetch_sub(1); }
void Tally::sent() noexcept { impl_->state->pending[impl_->mine].fetch_sub(1); }

std::uint64_t Tally::own_pending() const noexcept {
  return impl_->has_entry() ? impl_->state->pending[impl_->mine].load() : 0;
}

std::uint64_t Tally::pending() const noexcept { return sum(impl_->state->pending); }
std::uint64_t Tally::waiting() const noexcept { return sum(impl_->state->waiting); }

bool Tally::forget_the_dead() {
  impl_->renew();
  bool any = false;
  for (std::uint32_t i = 0; i < kEntries; ++i) {
    if (i == impl_->mine || (impl_->state->pending[i].load() == 0 && impl_->state->waiting[i].load() == 0))
      continue;
    if (impl_->storage->is_locked(i) || !impl_->storage->try_lock(i)) continue;
    // It may have been claimed and left in order meanwhile; under the lock nobody else writes it.
    impl_->reset(i);
    impl_->storage->unlock(i);
    any = true;
  }
  return any;
}

void Tally::take_part() {
  if (!impl_->has_entry()) impl_->claim_entry();
}
void Tally::begin_put() noexcept { impl_->state->waiting[impl_->mine].fetch_add(1); }
void Tally::put_is_over(bool entered) noexcept {
  if (entered) impl_->state->entered.fetch_add(1);
  impl_->state->waiting[impl_->mine].fetch_sub(1);
}

// An object is waiting until after it has entered, and is done after that. Read in the opposite order it is counted
// twice at worst, and never left out.
std::uint64_t Tally::unfinished() const noexcept {
  const std::uint64_t done = impl_->state->done.load();
  const std::uint64_t waiting = this->waiting();
  const std::uint64_t all = waiting + impl_->state->entered.load();
  return all > done ? all - done : 0;
}

bool Tally::finish_one() noexcept {
  TallyState& state = *impl_->state;
  for (std::uint64_t done = state.done.load();;) {
    if (waiting() + state.entered.load() <= done) return false;
    if (state.done.compare_exchange_weak(done, done + 1)) break;
  }
  if (unfinished() == 0) {
    state.done_word.fetch_add(1);
    waiting::futex_wake(state.done_word, INT_MAX);
  }
  return true;
}

Outcome Tally::wait_until_finished(std::int64_t deadline_ns) noexcept {
  TallyState& state = *impl_->state;
  const std::uint32_t word = state.done_word.load();
  if (unfinished() == 0) return Outcome::Ok;
  const std::int64_t now = base::monotonic_ns();
  if (now >= deadline_ns) return Outcome::TimedOut;
  // The slice also covers what wakes nobody: the last one dies before it wakes, or had its objects pending.
  const waiting::Wake wake =
      waiting::futex_wait(state.done_word, word, std::min(deadline_ns, now + kTallySliceNs));
  return wake == waiting::Wake::Interrupted ? Outcome::Interrupted : Outcome::Empty;
}

std::uint32_t Tally::room_word() const noexcept { return impl_->state->room_word.load(); }

Outcome Tally::wait_for_room(std::uint32_t word, std::int64_t deadline_ns) noexcept {
  TallyState& state = *impl_->state;
  const std::int64_t now = base::monotonic_ns();
  if (now >= deadline_ns) return Outcome::TimedOut;
  state.room_waiters.fetch_add(1);
  const waiting::Wake wake =
      waiting::futex_wait(state.room_word, word, std::min(deadline_ns, now + kTallySliceNs));
  state.room_waiters.fetch_sub(1);
  return wake == waiting::Wake::Interrupted ? Outcome::Interrupted : Outcome::Empty;
}

// Dekker with wait_for_room(): the waiter counts itself, then looks at the word (in the kernel); here the word changes
// first.
void Tally::tell_of_room() noexcept {
  TallyState& state = *impl_->state;
  state.room_word.fetch_add(1);
  if (state.room_waiters.load() != 0) waiting::futex_wake(state.room_word, INT_MAX);
}

}  // namespace dsline
