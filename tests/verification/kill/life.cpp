#include "life.hpp"

#include <time.h>
#include <unistd.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <stdexcept>
#include <vector>

#include "base/clock.hpp"
#include "payload.hpp"
#include "points.hpp"
#include "slots/position.hpp"

namespace dsline::kill {
namespace {

constexpr std::int64_t kPatienceNs = 100'000'000;

std::uint32_t group_number(const std::string& name) {
  const std::size_t dash = name.find('-');
  return dash == std::string::npos ? kDefaultGroup
                                   : static_cast<std::uint32_t>(atoi(name.c_str() + dash + 1));
}

class Torn : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

void nap(Random& random, std::uint32_t most_us) {
  if (most_us == 0 || !random.one_in(2)) return;
  timespec pause{0, static_cast<long>(random.below(most_us)) * 1000};
  nanosleep(&pause, nullptr);
}

std::string describe(const Received& message, const Stamp& stamp) {
  char text[200];
  std::snprintf(text, sizeof text,
                "slot %u position %llu bytes %llu, stamp: producer %u sequence %u bytes %llu", message.slot,
                static_cast<unsigned long long>(message.sequence),
                static_cast<unsigned long long>(message.payload_bytes), stamp.producer, stamp.sequence,
                static_cast<unsigned long long>(stamp.bytes));
  return text;
}

class Member {
 public:
  Member(const Site& site, std::uint32_t index, std::uint64_t seed)
      : plan_(*site.plan), log_(*site.log), life_(log_.life[index]), index_(index), random_(seed) {
    channel_ = plan_.inherits ? site.keeper : open_channel(site, OpenMode::OpenOrCreate);
    if (life_.group != kDefaultGroup) {
      base_ = channel_;
      life_.asked_ns = base::monotonic_ns();
      channel_ = base_->subscribe(subscription(plan_, life_.group));
      if (random_.one_in(2)) base_->close();
    }
    life_.joined_ns = base::monotonic_ns();
  }

  void run() {
    switch (life_.role) {
      case Role::Producer:
        while (!log_.stop_sending && !life_.is_full() && send_one()) {
        }
        break;
      case Role::Consumer:
      case Role::Viewer:
        while (!life_.is_full() && receive_some(log_.stop)) {
        }
        break;
      case Role::Undertaker:
        while (!life_.is_full() && !log_.stop && bury_one()) {
        }
        break;
      case Role::Looker:
        while (!log_.stop && look_once()) {
        }
        break;
      case Role::Peer:
        for (std::uint32_t i = random_.between(1, plan_.leave_one_in); i > 0; --i) {
          if (log_.stop_sending || life_.is_full() || !send_one() || !receive_some(true)) break;
        }
        break;
    }
    life_.leaving_ns = base::monotonic_ns();
    if (life_.role == Role::Viewer) life_.lost = channel_->stats().lost;
    // What is still held outlives the handle, and its group.
    if (!held_.empty() && random_.one_in(2)) {
      channel_->close();
      nap(random_, 2000);
    }
    while (!held_.empty()) let_go();
    if (!kept_.empty() && random_.one_in(2)) channel_->close();
    while (!kept_.empty()) end_keeping();
    channel_->close();
    channel_.reset();
    base_.reset();
  }

 private:
  /// False when this life is over.
  bool send_one() {
    ++life_.heartbeat;
    while (!kept_.empty() && random_.one_in(3)) end_keeping();
    const std::uint32_t bytes = random_.between(kLeastPayload, random_.one_in(4) ? plan_.largest : 200);
    if (random_.one_in(20)) return abort_one(bytes);
    const std::uint32_t sequence = life_.sends.load(std::memory_order_relaxed);
    life_.sent[sequence] = {base::monotonic_ns(), 0, Fate::Intended};
    life_.sends.store(sequence + 1, std::memory_order_release);
    const Outcome outcome = random_.one_in(2) ? send_copy(sequence, bytes) : send_loan(sequence, bytes);
    std::atomic_signal_fence(std::memory_order_seq_cst);
    life_.sent[sequence].returned_ns = base::monotonic_ns();
    life_.sent[sequence].fate = outcome == Outcome::Ok ? Fate::Returned : Fate::Refused;
    if (outcome == Outcome::Closed) return false;
    nap(random_, plan_.send_pause_us);
    return plan_.leave_one_in == 0 || life_.role == Role::Peer || !random_.one_in(plan_.leave_one_in * 4);
  }

  Outcome send_copy(std::uint32_t sequence, std::uint32_t bytes) {
    alignas(8) std::byte payload[20000];
    write_payload(payload, index_, sequence, bytes);
    return channel_->send(payload, bytes, plan_.policy, base::monotonic_ns() + kPatienceNs);
  }

  Outcome send_loan(std::uint32_t sequence, std::uint32_t bytes) {
    Loan loan;
    const std::int64_t deadline = base::monotonic_ns() + kPatienceNs;
    for (bool spin = true;;) {
      const Outcome outcome = channel_->try_alloc(bytes, 0, plan_.policy, loan);
      if (outcome == Outcome::Ok) break;
      if (outcome != Outcome::Full) return outcome;
      while (!kept_.empty()) end_keeping();  // it may be what there is no room for
      const Outcome waited = channel_->wait_for_space(deadline, spin);
      if (waited == Outcome::TimedOut) return waited;
      spin = waited == Outcome::Ok;
    }
    write_payload(loan.payload, index_, sequence, bytes);
    nap(random_, plan_.send_pause_us / 4);
    const bool keep = random_.one_in(3);
    const Outcome outcome =
        channel_->publish(loan, kBytesMessage, 0, keep ? AfterPublish::Keep : AfterPublish::LetGo,
                          channel_->can_seal() && random_.one_in(4));
    if (keep && outcome == Outcome::Ok) kept_.push_back({loan, sequence});
    while (kept_.size() > 1 || (!kept_.empty() && random_.one_in(3))) end_keeping();
    return outcome;
  }

  /// Ends the view on a message that was published, whoever has received it meanwhile.
  void end_keeping() {
    const Kept kept = kept_.front();
    kept_.pop_front();
    Stamp stamp{};
    if (!read_payload(kept.loan.shown, kept.loan.payload_bytes, stamp) || stamp.producer != index_ ||
        stamp.sequence != kept.sequence) {
      throw Torn("the payload changed under its publisher: slot " + std::to_string(kept.loan.slot));
    }
    channel_->end_keeping(kept.loan);
  }

  // Nothing that is aborted may ever be received.
  bool abort_one(std::uint32_t bytes) {
    Loan loan;
    if (channel_->try_alloc(bytes, 0, Backpressure::Raise, loan) != Outcome::Ok) return true;
    write_payload(loan.payload, index_, kNeverSent, bytes);
    channel_->abort(loan);
    return true;
  }

  bool receive_some(bool until_empty) {
    ++life_.heartbeat;
    Held held;
    const std::int64_t patience = until_empty ? 0 : random_.one_in(2) ? kPatienceNs : 2'000'000;
    const Outcome outcome = channel_->recv(held.message, base::monotonic_ns() + patience);
    if (outcome == Outcome::Closed)
      throw std::runtime_error("recv() says closed, and nobody has closed anything");
    if (outcome == Outcome::Corrupted) throw Torn(std::string("corrupted: ") + held.message.fault);
    if (outcome == Outcome::Ok) {
      check(held, "when received");
      held.group = life_.group;
      note(held, What::Got);
      held_.push_back(std::move(held));
      nap(random_, plan_.hold_pause_us);
    }
    while (held_.size() >= plan_.most_held || (!held_.empty() && random_.one_in(3))) let_go();
    if (outcome != Outcome::Ok && until_empty) return life_.role == Role::Peer;
    return plan_.leave_one_in == 0 || life_.role == Role::Peer || !random_.one_in(plan_.leave_one_in);
  }

  struct Held {
    Received message;
    Stamp stamp{};
    std::uint32_t group = 0;
    bool is_letter = false;
  };

  struct Kept {
    Loan loan;
    std::uint32_t sequence;
  };

  void note(const Held& held, What what) {
    life_.note({base::monotonic_ns(), held.message.sequence, held.stamp.producer, held.stamp.sequence,
                held.group, static_cast<std::uint8_t>(held.message.attempts), held.is_letter, what});
  }

  bool bury_one() {
    ++life_.heartbeat;
    Held held;
    held.is_letter = true;
    DeadLetter why;
    const Outcome outcome = channel_->try_take_dead_letter(held.message, why);
    if (outcome == Outcome::Corrupted) throw Torn(std::string("corrupted letter: ") + held.message.fault);
    if (outcome != Outcome::Ok) {
      channel_->check_peers();
      nap(random_, 2000);
      return outcome == Outcome::Empty;
    }
    check(held, "as a dead letter");
    held.group = group_number(why.group);
    note(held, What::Got);
    nap(random_, plan_.hold_pause_us);
    held_.push_back(std::move(held));
    let_go();
    return true;
  }

  /// The payload may change while it is read; then is_unchanged() must say so.
  bool look_once() {
    ++life_.heartbeat;
    Received message;
    const Outcome outcome = channel_->try_read_latest(!has_looked_, newest_, message);
    if (outcome == Outcome::Closed) return false;
    if (outcome == Outcome::Empty) {
      channel_->wait_for_newer(!has_looked_, newest_, base::monotonic_ns() + 2'000'000, true);
      return true;
    }
    if (outcome == Outcome::Corrupted) throw Torn(std::string("corrupted newest: ") + message.fault);
    std::vector<std::byte> copy(message.payload, message.payload + message.payload_bytes);
    if (!channel_->is_unchanged(message)) return true;
    Stamp stamp{};
    if (!read_payload(copy.data(), copy.size(), stamp))
      throw Torn("torn newest: " + describe(message, stamp));
    if (has_looked_ && slots::distance(message.sequence & slots::kPositionMask, newest_) <= 0) {
      throw std::runtime_error("the newest message is older than the one before");
    }
    newest_ = message.sequence;
    has_looked_ = true;
    ++life_.looks;
    return true;
  }

  void check(Held& held, const char* when) {
    if (!read_payload(held.message.payload, held.message.payload_bytes, held.stamp)) {
      throw Torn(std::string("torn ") + when + ": " + describe(held.message, held.stamp));
    }
  }

  /// Releases one of the held messages, or gives it back.
  void let_go() {
    std::swap(held_.front(), held_[random_.below(held_.size())]);
    Held held = std::move(held_.front());
    held_.pop_front();
    const Stamp before = held.stamp;
    check(held, "while held");
    if (std::memcmp(&before, &held.stamp, sizeof before) != 0) {
      throw Torn("another message while held: " + describe(held.message, held.stamp));
    }
    const bool may_go_back = held.message.attempts < 12 || plan_.options.max_deliveries < 12;
    if (plan_.give_back_one_in != 0 && may_go_back && random_.one_in(plan_.give_back_one_in)) {
      const bool revives = held.is_letter && random_.one_in(2);
      note(held, revives ? What::Reviving : What::GivingBack);
      std::atomic_signal_fence(std::memory_order_seq_cst);
      if (revives) {
        channel_->revive(held.message);
      } else {
        channel_->give_back(held.message);
      }
      return;
    }
    channel_->release(held.message.slot, held.message.process, held.message.group);
    std::atomic_signal_fence(std::memory_order_seq_cst);
    note(held, What::Released);
  }

  const Plan& plan_;
  Log& log_;
  Life& life_;
  std::uint32_t index_;
  Random random_;
  std::shared_ptr<Channel> base_;  // what a subscriber came from
  std::shared_ptr<Channel> channel_;
  std::deque<Held> held_;
  std::deque<Kept> kept_;
  std::uint64_t newest_ = 0;
  bool has_looked_ = false;
};

Outcome finish(Channel& channel, Life& life, Received& message, std::uint32_t group, bool is_letter) {
  Stamp stamp{};
  if (!read_payload(message.payload, message.payload_bytes, stamp)) {
    throw Torn("torn at the end: " + describe(message, stamp));
  }
  Event event{base::monotonic_ns(),
              message.sequence,
              stamp.producer,
              stamp.sequence,
              group,
              static_cast<std::uint8_t>(message.attempts),
              is_letter,
              What::Got};
  life.note(event);
  channel.release(message.slot, message.process, message.group);
  event.what = What::Released;
  life.note(event);
  return Outcome::Ok;
}

}  // namespace

std::string group_name(std::uint32_t group) {
  if (group == kDefaultGroup) return "";
  return (group < kViewerGroup ? "durable-" : "viewer-") + std::to_string(group);
}

SubscribeOptions subscription(const Plan& plan, std::uint32_t group) {
  SubscribeOptions options;
  options.group = group_name(group);
  options.durable = group < kViewerGroup;
  options.start = options.durable ? Start::Next : plan.start;
  options.on_death = options.durable && plan.drops ? OnDeath::Drop : OnDeath::Redeliver;
  return options;
}

std::shared_ptr<Channel> open_channel(const Site& site, OpenMode mode) {
  const Plan& plan = *site.plan;
  switch (plan.place) {
    case Place::Memfd:
      return Channel::adopt_anonymous(dup(site.fd));
    case Place::Shm:
      return Channel::open_named(site.where, plan.options, mode);
    case Place::File:
      return Channel::open_file(site.where, plan.options, mode);
  }
  return nullptr;
}

Outcome take_one(Channel& channel, Life& life, std::uint32_t group) {
  Received message;
  const Outcome outcome = channel.try_recv(message);
  return outcome == Outcome::Ok ? finish(channel, life, message, group, false) : outcome;
}

Outcome take_one_letter(Channel& channel, Life& life) {
  Received message;
  DeadLetter why;
  const Outcome outcome = channel.try_take_dead_letter(message, why);
  return outcome == Outcome::Ok ? finish(channel, life, message, group_number(why.group), true) : outcome;
}

void live(const Site& site, std::uint32_t index, std::uint64_t seed, std::atomic<std::uint64_t>* hits) {
  Life& life = site.log->life[index];
  arm({&life, hits, site.plan->delay_one_in, seed});
  try {
    Member(site, index, seed).run();
  } catch (const Error& error) {
    std::snprintf(life.error, sizeof life.error, "%s", error.what());
    _exit(error.code() == ErrorCode::TooManyGroups ? kRefused : 9);
  } catch (const std::exception& error) {
    std::snprintf(life.error, sizeof life.error, "%s", error.what());
    _exit(9);
  }
  _exit(0);
}

}  // namespace dsline::kill
