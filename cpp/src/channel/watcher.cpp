#include "channel/watcher.hpp"

#include <pthread.h>
#include <signal.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <climits>
#include <system_error>

#include "base/clock.hpp"
#include "dsline/error.hpp"

namespace dsline::channel {
namespace {

constexpr std::int64_t kSliceNs = 50'000'000;
// Watches that are looked after in one slice: with more of them each comes later, so that idle ones cost nothing.
constexpr std::size_t kLookedAfterPerSlice = 8;

base::Atomic<Watcher*> current{nullptr};

}  // namespace

/// A thread with what it waits for.
struct Watched::Crew {
  explicit Crew(bool one) : can_wait_for_many(!one) {}

  const bool can_wait_for_many;  // else it sleeps for one watch, or for `control`
  std::vector<Watched*> entries;
  std::vector<Watched*>
      slept_on;  // entries of the last sleep; a dropped one is in it until the thread has woken up
  base::Atomic<std::uint32_t> control{0};  // changes when the thread must look at its entries again
  Watched* looking_after = nullptr;
  std::size_t next = 0;  // the entry that was looked after last
  bool is_asleep = false;
  bool must_stop = false;
  std::int64_t slice_end_ns = 0;
  std::thread thread;

  std::size_t room() const noexcept { return can_wait_for_many ? waiting::kMostWords - 1 : 1; }
  bool has(const Watched* watched) const noexcept {
    return std::find(entries.begin(), entries.end(), watched) != entries.end();
  }
};

Watcher::Watcher() : generation_(base::fork_generation()) {}
Watcher::~Watcher() = default;

Watcher* Watcher::existing() noexcept {
  // SYNC watcher: pairs with instance().
  Watcher* found = current.load(std::memory_order_acquire);
  return found != nullptr && found->generation_ == base::fork_generation() ? found : nullptr;
}

Watcher& Watcher::instance() {
  if (Watcher* found = existing()) return *found;
  Watcher* seen = current.load(std::memory_order_acquire);
  std::unique_ptr<Watcher> fresh(new Watcher);
  // The parent's is never destroyed, and neither is the last one: handles may go after static objects.
  while (seen == nullptr || seen->generation_ != fresh->generation_) {
    if (current.compare_exchange_weak(seen, fresh.get(), std::memory_order_acq_rel)) return *fresh.release();
  }
  return *seen;
}

/// At first use in this process: what the parent had is the parent's.
void Watcher::renew(Watched& watched) {
  if (knows(watched)) return;
  const int event = base::make_event_closed_in_child();
  if (event < 0) throw Error(ErrorCode::System, "there is no descriptor left to watch a channel with", errno);
  watched.event = event;
  watched.crew = nullptr;
  watched.is_armed = watched.is_signalled = watched.is_slept_on = watched.is_swallowed = watched.is_hit =
      false;
  watched.generation = generation_ + 1;  // 0: never used
}

int Watcher::descriptor(Watched& watched) {
  std::lock_guard lock(mutex_);
  renew(watched);
  return watched.event;
}

Watcher::Crew& Watcher::crew_with_room() {
  const bool many = waiting::can_wait_for_many();
  for (const auto& crew : crews_) {
    if (crew->can_wait_for_many == many && crew->entries.size() < crew->room()) return *crew;
  }
  crews_.reserve(crews_.size() + 1);
  auto crew = std::make_unique<Crew>(!many);
  crew->entries.reserve(crew->room());
  crew->slept_on.reserve(crew->room());
  // Signals are for the threads of the program.
  sigset_t all, before;
  sigfillset(&all);
  pthread_sigmask(SIG_SETMASK, &all, &before);
  try {
    crew->thread = std::thread([this, one = crew.get()] { run(*one); });
  } catch (const std::system_error& error) {
    pthread_sigmask(SIG_SETMASK, &before, nullptr);
    throw Error(ErrorCode::System, "the thread that watches channels could not be started",
                error.code().value());
  }
  pthread_sigmask(SIG_SETMASK, &before, nullptr);
  crews_.push_back(std::move(crew));
  return *crews_.back();
}

bool Watcher::arm(Watched& watched) {
  std::lock_guard lock(mutex_);
  renew(watched);
  drain(watched);
  if (watched.is_armed) return false;
  if (watched.crew == nullptr) {
    Crew& crew = crew_with_room();
    crew.entries.push_back(&watched);
    watched.crew = &crew;
  }
  watched.is_recent = true;
  if (!watched.begin()) {
    signal(watched);
    return true;
  }
  watched.is_armed = true;
  watched.looked = watched.point().sequence();
  if (watched.is_ready()) {
    disarm(watched);
    signal(watched);
    return true;
  }
  // A thread that is awake comes by; one that sleeps on this word already is woken by it.
  if (watched.crew->is_asleep && !watched.is_slept_on) kick(*watched.crew);
  return false;
}

void Watcher::clear(Watched& watched) {
  std::lock_guard lock(mutex_);
  renew(watched);
  drain(watched);
}

void Watcher::drain(Watched& watched) noexcept {
  if (!watched.is_signalled) return;
  std::uint64_t count = 0;
  static_cast<void>(!read(watched.event, &count, sizeof count));
  watched.is_signalled = false;
}

void Watcher::signal(Watched& watched) noexcept {
  if (watched.is_signalled) return;
  const std::uint64_t one = 1;
  static_cast<void>(!write(watched.event, &one, sizeof one));
  watched.is_signalled = true;
}

void Watcher::disarm(Watched& watched) noexcept {
  if (!watched.is_armed) return;
  watched.is_armed = false;
  watched.end();
}

void Watcher::kick(Crew& crew) noexcept {
  crew.control.fetch_add(1, std::memory_order_seq_cst);
  waiting::futex_wake(crew.control, INT_MAX);
  // Without futex_waitv the thread sleeps on the one word alone; the others who are woken sleep again.
  if (!crew.can_wait_for_many) {
    for (Watched* each : crew.slept_on) each->point().wake_all();
  }
}

void Watcher::drop(Watched& watched) noexcept {
  std::unique_lock lock(mutex_);
  if (knows(watched)) drop(watched, lock);
}

void Watcher::drop(Watched& watched, std::unique_lock<std::mutex>& lock) noexcept {
  const bool was_armed = watched.is_armed;
  disarm(watched);
  if (was_armed) signal(watched);
  Crew* crew = watched.crew;
  if (crew == nullptr) return;
  std::erase(crew->entries, &watched);
  if (watched.is_slept_on) kick(*crew);
  over_.wait(lock, [&] { return !watched.is_slept_on && crew->looking_after != &watched; });
  watched.crew = nullptr;
  if (watched.is_swallowed) watched.pass_on();
  watched.is_swallowed = watched.is_hit = false;
}

void Watcher::drop_all_of(const void* owner) noexcept {
  std::unique_lock lock(mutex_);
  for (;;) {
    Watched* found = nullptr;
    for (const auto& crew : crews_) {
      for (Watched* each : crew->entries) {
        if (each->owner() == owner) found = each;
      }
    }
    if (found == nullptr) return;
    drop(*found, lock);
  }
}

void Watcher::forget(Watched& watched) noexcept {
  // A forked child has closed what it inherited.
  if (watched.generation == base::fork_generation() + 1) base::close_closed_in_child(watched.event);
}

void Watcher::stop() noexcept {
  std::vector<std::unique_ptr<Crew>> ending;
  {
    std::unique_lock lock(mutex_);
    for (std::size_t i = 0; i < crews_.size(); ++i) {
      while (!crews_[i]->entries.empty()) drop(*crews_[i]->entries.back(), lock);
    }
    ending.swap(crews_);
    for (const auto& crew : ending) {
      crew->must_stop = true;
      kick(*crew);
    }
  }
  for (const auto& crew : ending) crew->thread.join();
}

void Watcher::run(Crew& crew) {
  pthread_setname_np(pthread_self(), "dsline-watcher");
  std::unique_lock lock(mutex_);
  while (!crew.must_stop) {
    const bool slice_over = base::monotonic_ns() >= crew.slice_end_ns;
    settle(crew, slice_over);
    if (slice_over) {
      look_after(crew, lock);
      crew.slice_end_ns = base::monotonic_ns() + kSliceNs;
    }
    if (!crew.must_stop) sleep(crew, lock);
  }
}

/// Tells of what has come, passes on wake-ups, and lets go of what was not armed again.
void Watcher::settle(Crew& crew, bool slice_over) noexcept {
  for (std::size_t i = 0; i < crew.entries.size();) {
    Watched& each = *crew.entries[i];
    const std::uint32_t sequence = each.point().sequence();
    const bool was_armed = each.is_armed;
    if (was_armed && sequence != each.looked) {
      each.looked = sequence;
      signal_if_ready(each, false);
    }
    const bool swallowed = each.is_swallowed;
    each.is_swallowed = false;
    if (swallowed) each.pass_on();
    const bool goes = !was_armed && (each.is_hit || (slice_over && !each.is_recent));
    each.is_hit = false;
    if (slice_over) each.is_recent = false;
    if (goes) {
      each.crew = nullptr;
      crew.entries.erase(crew.entries.begin() + static_cast<std::ptrdiff_t>(i));
    } else {
      ++i;
    }
  }
}

void Watcher::sleep(Crew& crew, std::unique_lock<std::mutex>& lock) {
  waiting::Expected words[waiting::kMostWords];
  std::size_t count = 0;
  if (crew.can_wait_for_many || crew.entries.empty()) {
    words[count++] = {&crew.control, crew.control.load(std::memory_order_relaxed)};
  }
  for (Watched* each : crew.entries) {
    waiting::WaitPoint point = each->point();
    each->waited = each->is_armed ? each->looked : point.sequence();
    each->is_slept_on = true;
    words[count++] = {&point.word(), each->waited};
    crew.slept_on.push_back(each);
  }
  const std::int64_t deadline = crew.entries.empty() ? INT64_MAX : crew.slice_end_ns;
  crew.is_asleep = true;
  lock.unlock();
  std::size_t hit = count;
  const waiting::Wake wake = crew.can_wait_for_many
                                 ? waiting::futex_wait_many(words, count, deadline, hit)
                                 : waiting::futex_wait(*words[0].word, words[0].value, deadline);
  lock.lock();
  crew.is_asleep = false;
  const std::size_t first = count - crew.slept_on.size();
  for (std::size_t i = 0; i < crew.slept_on.size(); ++i) {
    Watched* each = crew.slept_on[i];
    // More than one word may have been woken, and the waker may have changed the sequence before it was loaded for this
    // sleep: so any of them may have taken a wake-up.
    each->is_swallowed = each->is_swallowed || wake == waiting::Wake::Woken;
    each->is_hit = each->is_hit || first + i == hit || each->point().sequence() != each->waited;
    each->is_slept_on = false;
  }
  crew.slept_on.clear();
  over_.notify_all();
}

void Watcher::look_after(Crew& crew, std::unique_lock<std::mutex>& lock) {
  Watched* chosen[kLookedAfterPerSlice];
  std::size_t count = 0;
  const std::size_t all = crew.entries.size();
  for (std::size_t i = 0; i < all && count < kLookedAfterPerSlice; ++i) {
    crew.next = (crew.next + 1) % all;
    if (crew.entries[crew.next]->is_armed) chosen[count++] = crew.entries[crew.next];
  }
  for (std::size_t i = 0; i < count; ++i) {
    Watched* each = chosen[i];
    if (!crew.has(each) || !each->is_armed) continue;  // dropped meanwhile
    crew.looking_after = each;
    lock.unlock();
    const bool look_again = each->look_after();
    lock.lock();
    crew.looking_after = nullptr;
    over_.notify_all();
    if (!crew.has(each) || !each->is_armed) continue;
    each->looked = each->point().sequence();
    signal_if_ready(*each, look_again);
  }
}

void Watcher::signal_if_ready(Watched& watched, bool surely) noexcept {
  if (!surely && !watched.is_ready()) return;
  disarm(watched);
  signal(watched);
}

}  // namespace dsline::channel
