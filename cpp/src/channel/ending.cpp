#include <unistd.h>

#include <cstdlib>

#include "channel/directory.hpp"
#include "channel/impl.hpp"
#include "channel/watcher.hpp"

namespace dsline {

using slots::SlotPhase;
using slots::SlotWord;

Channel::Impl::Impl(channel::Attachment attachment, std::unique_ptr<Local> own)
    : region(std::move(attachment.region)),
      pool(*region),
      ring(*region),
      group_number(attachment.group),
      joined(attachment.joined),
      group(*region, group_number == kNoGroup ? 0 : group_number),
      publication(*region, pool),
      letters(*region, pool),
      me(attachment.participant),
      path(std::move(attachment.path)),
      label(std::move(attachment.label)),
      dropped_before(group.state().dropped_oldest.load(std::memory_order_relaxed)),
      process(base::fork_generation()),
      local(std::move(own)) {
  try {
    std::lock_guard lock(base::process_mutex());
    handles().insert(this);
  } catch (...) {
    attachment.region = std::move(region);  // which leaves it, by its name
    attachment.path = std::move(path);
    attachment.label = std::move(label);
    throw;
  }
}

Channel::Impl::~Impl() {
  {
    std::lock_guard lock(base::process_mutex());
    handles().erase(this);
  }
  close();
  if (left || is_inherited()) return;
  return_everything();
  std::lock_guard lock(local->closing);
  leave();
}

/// The handles of this process; never destroyed, since the last ones may go after static objects.
std::set<Channel::Impl*>& Channel::Impl::handles() {
  static std::set<Impl*>* list = new std::set<Impl*>;
  static const int at_exit = std::atexit(abandon_all);
  static_cast<void>(at_exit);
  return *list;
}

// A process that ends in order has not died: what its views still hold is released, not redelivered.
void Channel::Impl::abandon_all() {
  std::lock_guard lock(base::process_mutex());
  for (Impl* handle : handles()) handle->abandon();
  if (channel::Watcher* watcher = channel::Watcher::existing()) watcher->stop();
}

/// Before the handle leaves, whose bit an armed watch has set. Requires: `closed` is set, so that nothing is armed again.
void Channel::Impl::end_watches() noexcept {
  if (channel::Watcher* watcher = channel::Watcher::existing()) watcher->drop_all_of(this);
}

/// In a forked child: registers anew. The parent's leases and loans stay the parent's.
void Channel::Impl::renew() {
  std::lock_guard lock(base::process_mutex());
  if (!is_inherited()) return;  // another thread of the child was first
  static_cast<void>(
      local.release());  // a mutex that another thread of the parent held is never unlocked here
  local = std::make_unique<Local>();
  if (closed.load(std::memory_order_relaxed)) {
    left = true;
  } else {
    me = channel::rejoin(*region, label, group_number, joined);
  }
  hints.bits.store(0, std::memory_order_relaxed);  // the parent's
  busy.store(0, std::memory_order_relaxed);
  process.store(base::fork_generation(), std::memory_order_release);
}

/// For calls that throw: this handle is one of this process, and open.
void Channel::Impl::require_open() {
  enter();
  if (closed.load(std::memory_order_relaxed)) {
    throw Error(ErrorCode::ChannelClosed,
                "this handle of channel '" + label + "' is closed; open another one");
  }
}

void Channel::Impl::wake_receivers() noexcept {
  for (std::uint32_t g = 0; g < region->geometry().groups; ++g) {
    order::Group(*region, g).messages().wake_all();
  }
}

void Channel::Impl::shutdown(bool at_once) {
  enter();
  std::uint64_t bits = memory::kShutDown | (at_once ? memory::kShutDownAtOnce : 0);
  // SYNC active: pairs with publish, see there.
  region->header().active.fetch_or(bits, std::memory_order_seq_cst);
  for (std::uint32_t g = 0; at_once && !left && g < region->geometry().groups; ++g) {
    order::Group ending(*region, g);
    order::Held held{};
    while (ending.is_active() && ending.try_discard(me, held)) pool.clear_pending(held.slot, ending.bit());
  }
  wake_receivers();
  pool.space().wake_all();
}

void Channel::Impl::close() noexcept {
  closed.store(true, std::memory_order_seq_cst);
  if (is_inherited() || left) return;
  group.messages().wake_all();
  if (region->keeps_history()) order::Group(*region, region->retention_group()).messages().wake_all();
  pool.space().wake_all();
  end_watches();
  leave_group();
  leave_if_idle();
}

/// Ends the membership at once, whatever is still held: a group that nobody receives for must not hold up the senders.
void Channel::Impl::leave_group() noexcept {
  if (group_number == 0 || group_number == kNoGroup) return;
  std::lock_guard sweeping(local->recovery);
  if (left || has_left_group.exchange(true, std::memory_order_seq_cst)) return;
  try {
    channel::ControlLock control(*region, label, channel::kLeavePatienceNs);
    liveness::Membership(*region, pool).leave(me);
  } catch (const std::exception&) {
    // Whoever joins, recovers or finds the channel full ends the group.
    region->participant(me).group.store(0, std::memory_order_release);
  }
}

bool Channel::Impl::holds_anything() const noexcept {
  for (std::uint32_t s = 0; s < region->geometry().slots; ++s) {
    const SlotWord word = pool.word(s);
    const bool mine = word.owner() == me;
    if (mine && word.is(SlotPhase::Writing)) return true;
    if (mine && word.is(SlotPhase::Committed) && (word.pending() & slots::kEnqueueing) != 0) return true;
    for (std::uint32_t g = 0; g < region->geometry().groups; ++g) {
      if (is_held_by_me(s, g, word)) return true;
    }
  }
  return false;
}

bool Channel::Impl::is_held_by_me(std::uint32_t s, std::uint32_t g, SlotWord word) const noexcept {
  if (!word.is(SlotPhase::Committed) || (word.pending() >> g & 1) == 0) return false;
  const std::uint32_t who = slots::Claim{region->claim(s, g).load(std::memory_order_acquire)}.who();
  return who == slots::Claim::holder(me) || who == slots::Claim::discarder(me);
}

void Channel::Impl::leave_if_idle() noexcept {
  if (is_inherited()) return;
  std::lock_guard lock(local->closing);
  if (left || busy.load(std::memory_order_seq_cst) != 0 || holds_anything()) return;
  leave_group();  // after refuse_calls() nobody has
  leave();
}

void Channel::Impl::leave() noexcept {
  std::lock_guard sweeping(local->recovery);
  left = true;
  DSLINE_POINT("close.begun");
  pool.return_hints(hints);
  pool.space().remove(me);
  for (std::uint32_t g = 0; g < region->geometry().groups; ++g)
    order::Group(*region, g).messages().remove(me);
  channel::leave(*region, me, path, label);
}

/// What a caller of the C++ interface still held when it let go of the channel.
void Channel::Impl::return_everything() noexcept {
  for (std::uint32_t s = 0; s < region->geometry().slots; ++s) {
    const SlotWord word = pool.word(s);
    if (word.is(SlotPhase::Writing) && word.owner() == me) pool.abort(s, word);
    if (word.owner() == me && word.is_kept()) publication.end_keeping(s, word);
    for (std::uint32_t g = 0; g < region->geometry().groups; ++g) {
      if (!is_held_by_me(s, g, word)) continue;
      order::Group from(*region, g);
      const slots::Claim claim = from.claim(s);
      const order::Held held{s, region->slot(s).position.load(std::memory_order_relaxed), claim.attempts()};
      if (claim.who() == slots::Claim::holder(me) && from.is_active()) {
        if (held.attempts >= region->rules().max_deliveries) {
          letters.put_back(from, held, me);
        } else {
          from.give_back(held, me, static_cast<std::uint32_t>(getpid()));
        }
      } else {
        pool.clear_pending(s, from.bit());
      }
    }
  }
}

void Channel::Impl::abandon() noexcept {
  if (is_inherited() || left) return;
  closed.store(true, std::memory_order_seq_cst);
  end_watches();
  // A thread that still sends or waits goes on until the process is gone; the kernel's lock tells the others then.
  if (busy.load(std::memory_order_seq_cst) != 0) return;
  for (std::uint32_t s = 0; s < region->geometry().slots; ++s) {
    const SlotWord word = pool.word(s);
    for (std::uint32_t g = 0; g < region->geometry().groups; ++g) {
      if (is_held_by_me(s, g, word)) pool.clear_pending(s, 1u << g);
    }
    if (word.owner() == me && word.is_kept()) publication.end_keeping(s, word);
  }
  leave_group();
  leave_if_idle();
}

void Channel::Impl::unlink() {
  if (path.empty()) {
    throw Error(ErrorCode::InvalidArgument,
                "channel '" + label + "' has no name to remove; it goes with its last handle");
  }
  enter();
  std::lock_guard lock(local->closing);
  std::lock_guard sweeping(local->recovery);
  memory::Storage& storage = region->storage();
  storage.renew_locks();  // dropped, if this handle has left
  {
    channel::ControlLock control(*region, label);
    channel::remove_name(storage, path);
  }
  if (left.load(std::memory_order_relaxed)) storage.drop_locks();
}

void Channel::Impl::remove_group(const std::string& name) {
  require_open();
  Busy guard(*this);
  std::lock_guard sweeping(local->recovery);
  channel::ControlLock control(*region, label);
  liveness::Membership membership(*region, pool);
  const std::uint32_t number = membership.find(name);
  if (number == kNoGroup) {
    throw Error(ErrorCode::ChannelNotFound, "channel '" + label + "' has no group '" + name + "'", ENOENT);
  }
  membership.remove(number, me);
}

}  // namespace dsline
