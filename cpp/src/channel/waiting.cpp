#include <algorithm>

#include "channel/impl.hpp"
#include "liveness/participants.hpp"
#include "liveness/recovery.hpp"

namespace dsline {
namespace {

// ParticipantState::waiting_on, as a report shows it.
constexpr std::uint64_t kWaitsForRoom = 1;
constexpr std::uint64_t kWaitsForMessage = 2;

}  // namespace

/// Adds this handle's bit while at least one of its threads sleeps.
class Channel::Impl::Sleeper {
 public:
  Sleeper(Impl& impl, waiting::WaitPoint point, std::uint32_t& count, std::uint64_t reason)
      : impl_(impl), point_(point), count_(count) {
    impl_.begin_to_sleep(point, count, reason);
  }
  ~Sleeper() { impl_.end_sleep(point_, count_); }
  Sleeper(const Sleeper&) = delete;
  Sleeper& operator=(const Sleeper&) = delete;

 private:
  Impl& impl_;
  waiting::WaitPoint point_;
  std::uint32_t& count_;
};

void Channel::Impl::begin_to_sleep(waiting::WaitPoint point, std::uint32_t& count, std::uint64_t reason) {
  std::lock_guard lock(local->waiters);
  ++count;
  point.add(me);
  region->participant(me).waiting_on.store(reason, std::memory_order_relaxed);
}

void Channel::Impl::end_sleep(waiting::WaitPoint point, std::uint32_t& count) {
  std::lock_guard lock(local->waiters);
  if (--count != 0) return;
  point.remove(me);
  region->participant(me).waiting_on.store(0, std::memory_order_relaxed);
}

void Channel::Impl::begin_to_sleep(Side side) {
  begin_to_sleep(point(side), side == Side::Room ? local->sleeping_for_space : local->sleeping_for_message,
                 side == Side::Room ? kWaitsForRoom : kWaitsForMessage);
}

void Channel::Impl::end_sleep(Side side) {
  end_sleep(point(side), side == Side::Room ? local->sleeping_for_space : local->sleeping_for_message);
}

bool Channel::Impl::message_or_end() noexcept {
  if (group.anything_waiting() || closed.load(std::memory_order_relaxed) || !may_receive()) return true;
  return is_at_end();
}

bool Channel::Impl::certain_message_or_end() noexcept {
  if (closed.load(std::memory_order_relaxed) || !may_receive()) return true;
  return group.anything_to_take() || is_at_end();
}

/// Of a channel that was shut down: nothing will come any more.
bool Channel::Impl::is_at_end() noexcept {
  const std::uint64_t state = active();
  return (state & memory::kShutDown) != 0 && ((state & memory::kShutDownAtOnce) != 0 || is_drained());
}

bool Channel::Impl::room_or_end(bool surely) noexcept {
  return pool.anything_free() || closed.load(std::memory_order_relaxed) || is_shut_down() ||
         (surely && pool.anything_free_by_scan());
}

bool Channel::Impl::look_after(Side side) noexcept {
  sweep(false);
  if (side == Side::Message) {
    group.offer_what_was_passed();
    return false;
  }
  tidy();
  offer_what_was_passed();
  return region->keeps_history();  // a sender drops of it what nobody holds any more, of which nobody tells
}

void Channel::Impl::pass_on(Side side) noexcept {
  if (is_inherited() || left) return;
  if (side == Side::Message) {
    if (may_receive()) group.pass_on();
  } else if (pool.anything_free() ||
             (region->geometry().slots <= slots::kMostSlotsForHints && pool.anything_free_by_scan())) {
    pool.space().wake_one_if_anyone();
  }
}

/// `ready` is looked at while spinning; `surely` once more between registering and sleeping.
template <class Ready, class Surely>
Outcome Channel::Impl::wait(waiting::WaitPoint point, std::uint32_t& count, std::uint64_t reason,
                            waiting::AdaptiveSpin& spinner, Ready ready, Surely surely, std::uint64_t done,
                            std::int64_t deadline_ns, bool spin) {
  const std::int64_t start = base::monotonic_ns();
  if (start >= deadline_ns) return Outcome::TimedOut;  // also where `ready` promises what nobody can take
  if (spin && spinner(ready, deadline_ns, done)) return Outcome::Ok;
  waiting::Wake wake{};
  std::int64_t now = base::monotonic_ns();
  {
    DSLINE_POINT("wait.before_registering");
    Sleeper sleeper(*this, point, count, reason);
    DSLINE_POINT("wait.registered");
    std::uint32_t sequence = point.sequence();
    if (surely()) return Outcome::Ok;
    if (now >= deadline_ns) return Outcome::TimedOut;
    wake = point.sleep(sequence, std::min(deadline_ns, now + kSliceNs));
    DSLINE_POINT("wait.woken");
  }
  if (wake == waiting::Wake::Interrupted) return Outcome::Interrupted;
  if (wake == waiting::Wake::Woken) {
    if (spin) spinner.woken_after(base::monotonic_ns() - start);
    sweep(false);  // in a steady stream no slice ever runs out
    return Outcome::Ok;
  }
  sweep(false);
  return base::monotonic_ns() >= deadline_ns ? Outcome::TimedOut : Outcome::Empty;
}

Outcome Channel::Impl::wait_for_space(std::int64_t deadline_ns, bool spin) {
  enter();
  Busy guard(*this);
  if (closed.load(std::memory_order_seq_cst)) return Outcome::Ok;
  send_waits.fetch_add(1, std::memory_order_relaxed);
  auto ready = [this] { return room_or_end(false); };
  auto surely = [this] { return room_or_end(true); };
  return wait(pool.space(), local->sleeping_for_space, kWaitsForRoom, local->space_spin, ready, surely,
              sent.load(std::memory_order_relaxed), deadline_ns, spin);
}

Outcome Channel::Impl::wait_for_message(std::int64_t deadline_ns, bool spin) {
  enter();
  Busy guard(*this);
  if (closed.load(std::memory_order_seq_cst) || !may_receive()) return Outcome::Ok;
  recv_waits.fetch_add(1, std::memory_order_relaxed);
  auto ready = [this] { return message_or_end(); };
  const Outcome outcome =
      wait(group.messages(), local->sleeping_for_message, kWaitsForMessage, local->message_spin, ready, ready,
           taken.load(std::memory_order_relaxed), deadline_ns, spin);
  if (outcome == Outcome::Empty) group.offer_what_was_passed();
  return outcome;
}

Outcome Channel::Impl::wait_for_newer(bool any, std::uint64_t newer_than, std::int64_t deadline_ns,
                                      bool spin) {
  enter();
  Busy guard(*this);
  if (closed.load(std::memory_order_seq_cst) || !region->keeps_history()) return Outcome::Ok;
  recv_waits.fetch_add(1, std::memory_order_relaxed);
  auto ready = [this, any, newer_than] {
    std::uint32_t slot = 0;
    std::uint64_t position = 0;
    slots::SlotWord word{};
    return closed_or_shut_down() || find_latest(any, newer_than, slot, position, word);
  };
  order::Group retention(*region, region->retention_group());
  return wait(retention.messages(), local->sleeping_for_newer, kWaitsForMessage, local->message_spin, ready,
              ready, taken.load(std::memory_order_relaxed), deadline_ns, spin);
}

void Channel::Impl::pass_on_wake() noexcept {
  if (is_inherited() || left) return;
  pass_on(Side::Message);
  pass_on(Side::Room);
}

bool Channel::Impl::sweep(bool now) noexcept {
  if (region->storage().kind() == memory::StorageKind::Heap)
    return false;  // its handles die with this process
  std::unique_lock lock(local->recovery, std::try_to_lock);
  if (!lock.owns_lock() || left) return false;
  const std::int64_t time = base::monotonic_ns();
  const std::int64_t last = local->last_sweep_ns.load(std::memory_order_relaxed);
  if (!now && last != 0 && time - last < kSliceNs) return false;
  local->last_sweep_ns.store(time, std::memory_order_relaxed);
  return liveness::recover_the_dead(*region, me, false) != 0;
}

void Channel::Impl::offer_what_was_passed() noexcept {
  const std::uint64_t now = active();
  for (std::uint32_t g = 0; g < region->geometry().groups; ++g) {
    const bool retention = region->keeps_history() && g == region->retention_group();
    if ((now >> g & 1) != 0 && !retention) order::Group(*region, g).offer_what_was_passed();
  }
}

bool Channel::Impl::tidy() noexcept {
  liveness::Membership membership(*region, pool);
  if (!membership.anything_stale()) return false;
  std::unique_lock lock(local->recovery, std::try_to_lock);
  if (!lock.owns_lock() || left || is_inherited()) return false;
  if (!region->storage().try_lock(memory::kControlLock)) return false;  // whoever has it does the same
  membership.remove_abandoned(kNoGroup, me);
  membership.sweep(me);
  region->storage().unlock(memory::kControlLock);
  return true;
}

Outcome Channel::wait_for_space(std::int64_t deadline_ns, bool spin) {
  return impl_->wait_for_space(deadline_ns, spin);
}
Outcome Channel::wait_for_message(std::int64_t deadline_ns, bool spin) {
  return impl_->wait_for_message(deadline_ns, spin);
}
Outcome Channel::wait_for_newer(bool any, std::uint64_t newer_than, std::int64_t deadline_ns, bool spin) {
  return impl_->wait_for_newer(any, newer_than, deadline_ns, spin);
}
void Channel::pass_on_wake() noexcept { impl_->pass_on_wake(); }

}  // namespace dsline
