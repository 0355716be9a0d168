#include "dsline/watch.hpp"

#include <algorithm>
#include <array>
#include <deque>

#include "channel/impl.hpp"
#include "channel/watcher.hpp"

namespace dsline {

/// A handle as the watcher sees it.
class Channel::Impl::Watched final : public channel::Watched {
 public:
  Watched(Impl& impl, Side side) noexcept : impl_(impl), side_(side) {}

  waiting::WaitPoint point() override { return impl_.point(side_); }

  bool begin() override {
    // Counts as a call that the handle must not leave under (Dekker with close(), as Busy). Before it: at the end of a
    // process nobody waits for what is armed late.
    if (impl_.closed.load(std::memory_order_seq_cst)) return false;
    impl_.busy.fetch_add(1, std::memory_order_seq_cst);
    if (impl_.closed.load(std::memory_order_seq_cst)) {
      impl_.busy.fetch_sub(1, std::memory_order_seq_cst);
      return false;
    }
    deaths_ = deaths();
    impl_.begin_to_sleep(side_);
    return true;
  }

  // Does not leave in the place of close(), which comes after refuse_calls() in any case, and ends watches itself.
  void end() noexcept override {
    impl_.end_sleep(side_);
    impl_.busy.fetch_sub(1, std::memory_order_seq_cst);
  }

  // Deaths: whoever waits may have been asked to tell of them.
  bool is_ready() noexcept override { return impl_.is_ready(side_, true) || deaths() != deaths_; }
  void pass_on() noexcept override { impl_.pass_on(side_); }
  bool look_after() noexcept override { return impl_.look_after(side_) || deaths() != deaths_; }
  const void* owner() const noexcept override { return &impl_; }

 private:
  std::uint64_t deaths() const noexcept {
    return impl_.region->header().deaths.load(std::memory_order_acquire);
  }

  Impl& impl_;
  const Side side_;
  std::uint64_t deaths_ = 0;
};

struct Watch::Impl {
  Impl(std::shared_ptr<Channel> of, Side side) : channel(std::move(of)), watched(*channel->impl_, side) {}

  std::shared_ptr<Channel> channel;
  Channel::Impl::Watched watched;
};

Watch::Watch(std::shared_ptr<Channel> channel, Side side)
    : impl_(std::make_unique<Impl>(std::move(channel), side)) {
  channel::Watcher::instance().descriptor(impl_->watched);
}

Watch::~Watch() {
  if (channel::Watcher* watcher = channel::Watcher::existing()) watcher->drop(impl_->watched);
  channel::Watcher::forget(impl_->watched);
}

int Watch::descriptor() { return channel::Watcher::instance().descriptor(impl_->watched); }

bool Watch::arm() {
  impl_->channel->impl_->enter();
  return channel::Watcher::instance().arm(impl_->watched);
}

void Watch::arm_again() {
  channel::Watcher* watcher = channel::Watcher::existing();
  if (watcher != nullptr && watcher->knows(impl_->watched)) arm();
}

void Watch::clear() { channel::Watcher::instance().clear(impl_->watched); }

std::size_t most_waited() noexcept { return waiting::can_wait_for_many() ? waiting::kMostWords : 0; }

void pretend_old_kernel(bool pretend) noexcept { waiting::pretend_not_to_wait_for_many(pretend); }

Outcome wait_for_any(Waited* list, std::size_t count, std::int64_t deadline_ns, bool spin) {
  using Impl = Channel::Impl;
  std::deque<Impl::Busy> guards;  // the handles stay until this call is over
  for (std::size_t i = 0; i < count; ++i) {
    list[i].channel->impl_->enter();
    guards.emplace_back(*list[i].channel->impl_);
  }
  const auto look = [list, count](bool surely) {
    bool any = false;
    for (std::size_t i = 0; i < count; ++i) {
      list[i].is_ready = list[i].channel->impl_->is_ready(list[i].side, surely);
      any = any || list[i].is_ready;
    }
    return any;
  };
  if (look(true)) return Outcome::Ok;
  if (base::monotonic_ns() >= deadline_ns) return Outcome::TimedOut;
  Impl& first = *list[0].channel->impl_;
  if (spin && first.local->message_spin([&look] { return look(false); }, deadline_ns,
                                        first.taken.load(std::memory_order_relaxed))) {
    return Outcome::Ok;
  }
  std::array<waiting::Expected, waiting::kMostWords> words;
  waiting::Wake wake = waiting::Wake::Woken;
  for (std::size_t i = 0; i < count; ++i) {
    Impl& impl = *list[i].channel->impl_;
    // Nobody has left: who was closed before `guards` was ready above.
    impl.begin_to_sleep(list[i].side);
    waiting::WaitPoint point = impl.point(list[i].side);
    words[i] = {&point.word(), point.sequence()};
  }
  const bool at_once = look(true);
  if (!at_once) {
    std::size_t hit = 0;
    wake = waiting::futex_wait_many(words.data(), count,
                                    std::min(deadline_ns, base::monotonic_ns() + kSliceNs), hit);
  }
  for (std::size_t i = 0; i < count; ++i) list[i].channel->impl_->end_sleep(list[i].side);
  const bool any = at_once || look(true);
  for (std::size_t i = 0; i < count; ++i) {
    Impl& impl = *list[i].channel->impl_;
    if (!at_once && wake == waiting::Wake::Woken) impl.pass_on(list[i].side);
    if (wake == waiting::Wake::TimedOut && !any) {
      list[i].is_ready = impl.look_after(list[i].side);
    } else if (!at_once) {
      impl.sweep(false);
    }
  }
  if (any) return Outcome::Ok;
  if (wake == waiting::Wake::Interrupted) return Outcome::Interrupted;
  for (std::size_t i = 0; i < count; ++i) list[i].is_ready = false;
  return base::monotonic_ns() >= deadline_ns ? Outcome::TimedOut : Outcome::Empty;
}

}  // namespace dsline
