#include "scene.hpp"

#include <signal.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/ptrace.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <stdexcept>

#include "base/clock.hpp"
#include "memory/region.hpp"
#include "points.hpp"

namespace dsline::steps {
namespace {

constexpr std::uint32_t kCapacity = 3;
constexpr std::uint64_t kPayloadWords = 3;
ChannelOptions options_for(Start start) {
  ChannelOptions options;
  options.capacity = kCapacity;
  options.slot_size = options.max_message_size = 8 * kPayloadWords;
  options.max_handles = 6;
  options.checksum = 2;
  options.max_deliveries = 15;
  if (start == Start::Historic) {
    options.capacity = 4;
    options.history = 2;
  }
  if (start == Start::Lettered) options.max_deliveries = 2;
  options.max_groups = 3;
  if (start == Start::Wrapped) options.first_position = (std::uint64_t{1} << 44) - 9;
  return options;
}

/// Forks; the child stops itself when it is ready and runs `work`. It dies with this process.
template <class Work>
pid_t start_child(bool traced, Work&& work) {
  const pid_t parent = getpid();
  const pid_t pid = fork();
  if (pid < 0) throw std::runtime_error(std::string("fork: ") + strerror(errno));
  if (pid == 0) {
    prctl(PR_SET_PDEATHSIG, SIGKILL);
    if (getppid() != parent) _exit(1);
    try {
      if (traced && ptrace(PTRACE_TRACEME, 0, nullptr, nullptr) != 0) _exit(8);
      work();
    } catch (const std::exception& error) {
      static_cast<void>(!write(2, error.what(), strlen(error.what())));
    }
    _exit(9);
  }
  return pid;
}

void await_stop(pid_t pid) {
  int status = 0;
  if (waitpid(pid, &status, WUNTRACED) != pid || !WIFSTOPPED(status) || WSTOPSIG(status) != SIGSTOP) {
    throw std::runtime_error("a process of the scene did not come to its place, status " +
                             std::to_string(status));
  }
}

void end_child(pid_t& pid) {
  if (pid <= 0) return;
  kill(pid, SIGKILL);
  int status = 0;
  while (waitpid(pid, &status, 0) == pid && !WIFSIGNALED(status) && !WIFEXITED(status)) {
  }
  pid = -1;
}

}  // namespace

namespace {

std::uint64_t id_of(const Received& message) {
  std::uint64_t payload[kPayloadWords];
  if (message.payload_bytes != sizeof payload) throw std::runtime_error("torn: its length is another");
  std::memcpy(payload, message.payload, sizeof payload);
  for (std::uint64_t i = 0; i < kPayloadWords; ++i) {
    if (payload[i] != payload[0] * (i + 1))
      throw std::runtime_error("torn: its words do not belong together");
  }
  return payload[0];
}

}  // namespace

void send(Channel& channel, std::uint64_t id, Backpressure policy) {
  std::uint64_t payload[kPayloadWords];
  for (std::uint64_t i = 0; i < kPayloadWords; ++i) payload[i] = id * (i + 1);
  const Outcome outcome = channel.try_send(payload, sizeof payload, kBytesMessage, nullptr, 0, 0, policy);
  if (outcome != Outcome::Ok) throw std::runtime_error("the scene's message was not sent");
}

std::uint64_t take(Channel& channel, Received& message) {
  const Outcome outcome = channel.try_recv(message);
  if (outcome == Outcome::Empty || outcome == Outcome::Closed) return 0;
  if (outcome != Outcome::Ok) throw std::runtime_error(std::string("corrupted: ") + message.fault);
  return id_of(message);
}

std::uint64_t take_letter(Channel& channel, Received& message, std::string& group) {
  DeadLetter why;
  const Outcome outcome = channel.try_take_dead_letter(message, why);
  if (outcome == Outcome::Empty || outcome == Outcome::Closed) return 0;
  if (outcome != Outcome::Ok) throw std::runtime_error(std::string("corrupted: ") + message.fault);
  group = why.group;
  return id_of(message);
}

std::shared_ptr<Channel> subscribe(Channel& channel, const std::string& group, bool durable,
                                   dsline::Start start) {
  SubscribeOptions options;
  options.group = group;
  options.durable = durable;
  options.start = start;
  return channel.subscribe(options);
}

Scene::Scene(Act act, Start start) : act_(act), start_(start) {
  std::shared_ptr<Channel> channel = Channel::create_anonymous(options_for(start));
  fd_ = dup(channel->descriptor());
  size_ = static_cast<std::size_t>(lseek(fd_, 0, SEEK_END));
  void* at = mmap(nullptr, size_, PROT_READ, MAP_SHARED, fd_, 0);
  if (at == MAP_FAILED) throw std::runtime_error(std::string("mmap: ") + strerror(errno));
  bytes_ = static_cast<std::byte*>(at);
  set_stage(*channel);
  channel->close();
  channel.reset();
  if (is_dead(start)) place_dead();
  plan_act();
}

Scene::~Scene() {
  kill_mover();
  kill_bystander();
  if (bytes_ != nullptr) munmap(bytes_, size_);
  if (fd_ >= 0) close(fd_);
}

void Scene::kill_mover() { end_child(mover_); }
void Scene::kill_bystander() { end_child(bystander_); }

void Scene::put(Channel& channel, std::vector<int> path) {
  items_.push_back({next_id_, std::move(path)});
  if (has_group()) items_.push_back({next_id_, {0}, kDurable});
  send(channel, next_id_++, Backpressure::Raise);
}

void Scene::put_and_consume(Channel& channel) {
  Received message;
  send(channel, next_id_++, Backpressure::Raise);
  take(channel, message);
  channel.release(message.slot, message.process, message.group);
}

/// Everybody comes to his place; the one to be stepped through is stopped in front of his act.
void Scene::set_stage(Channel& channel) {
  if (start_ == Start::Wrapped) {
    for (std::uint32_t i = 0; i < 20; ++i) put_and_consume(channel);
  }
  if (has_group()) subscribe(channel, kDurable, true)->close();
  if (start_ == Start::Historic) {
    for (std::uint32_t i = 0; i < 3; ++i) put_and_consume(channel);
    items_.push_back({next_id_ - 2, {0}, kOld});
    items_.push_back({next_id_ - 1, {0}, kOld});
  }
  if (start_ == Start::Lettered) {
    put(channel, {kLetter});
    Received message;
    for (int i = 0; i < 2; ++i) {
      take(channel, message);
      channel.give_back(message);
    }
    take(channel, message);  // buries it
  }
  const bool mover_holds = act_ == Act::Release || act_ == Act::GiveBack;
  if (mover_holds) put(channel, {1});
  place_mover();

  if (start_ == Start::Pinned) {
    put(channel, {1});
    items_.back().with_bystander = true;
    place_bystander(false);
  }
  if (start_ == Start::Waited) place_bystander(true);
  if (start_ == Start::GivenBack) {
    put(channel, {1});
    Received message;
    take(channel, message);
    channel.give_back(message);
  }
  std::uint32_t more = 0;
  if (start_ == Start::Queued || start_ == Start::Wrapped || start_ == Start::DeadHolding) more = 1;
  if (start_ == Start::DeadJoining || start_ == Start::Grouped) more = 1;
  if (start_ == Start::GroupedFull) {
    for (std::uint32_t i = 0; i < kCapacity; ++i) put(channel);
    Received message;
    take(channel, message);
    channel.release(message.slot, message.process, message.group);
    items_.erase(items_.begin());
    return;
  }
  if (act_ == Act::Bury) {
    put(channel, {kLetter});
    Received message;
    for (int i = 0; i < 2; ++i) {
      take(channel, message);
      channel.give_back(message);
    }
  }
  if (start_ == Start::Full || act_ == Act::DropOldest)
    more = kCapacity - static_cast<std::uint32_t>(items_.size());
  if (act_ == Act::Receive && start_ == Start::Pinned) more = 1;
  for (std::uint32_t i = 0; i < more; ++i) put(channel);
}

int Scene::number_of(pid_t pid) const {
  auto region =
      memory::Region::attach(memory::make_file_storage(dup(fd_), memory::StorageKind::File, "the scene"));
  for (std::uint32_t i = 0; i < region->geometry().participants; ++i) {
    if ((region->participant(i).word.load() & 0xFF) != 0 &&
        region->participant(i).pid.load() == static_cast<std::uint32_t>(pid)) {
      return static_cast<int>(i);
    }
  }
  throw std::runtime_error("a process of the scene has no entry");
}

void Scene::place_bystander(bool waits) {
  bystander_ = start_child(false, [this, waits] { be_bystander(waits); });
  if (waits) {
    auto region =
        memory::Region::attach(memory::make_file_storage(dup(fd_), memory::StorageKind::File, "the scene"));
    while (region->group(0).messages.waiters[0].load() == 0) sched_yield();
    kill(bystander_, SIGSTOP);
  }
  await_stop(bystander_);
  bystander_number_ = number_of(bystander_);
}

void Scene::be_bystander(bool waits) {
  auto channel = Channel::adopt_anonymous(dup(fd_));
  Received message;
  if (waits) {
    for (;;) channel->recv(message, base::kForever);
  }
  if (take(*channel, message) == 0) throw std::runtime_error("the bystander got nothing");
  for (;;) raise(SIGSTOP);
}

void Scene::place_mover() {
  mover_ = start_child(true, [this] { be_mover(); });
  await_stop(mover_);
}

void Scene::be_mover() {
  std::shared_ptr<Channel> channel;
  std::shared_ptr<Channel> member;
  Received held;
  std::string group;
  if (act_ != Act::Join) channel = Channel::adopt_anonymous(dup(fd_));
  if (act_ == Act::EndGroup) {
    member = subscribe(*channel, "mover", false);
    for (std::uint64_t i = 0; i < 2; ++i) send(*channel, 900 + i, Backpressure::Raise);
    Received message;
    for (std::uint64_t i = 0; i < 2; ++i) {
      take(*channel, message);
      channel->release(message.slot, message.process, message.group);
    }
    take(*member, held);
  }
  if (act_ == Act::ReleaseLetter || act_ == Act::ReturnLetter || act_ == Act::Revive) {
    take_letter(*channel, held, group);
  }
  if (act_ == Act::Release || act_ == Act::GiveBack) take(*channel, held);
  const std::uint64_t id = 1000;
  raise(SIGSTOP);
  switch (act_) {
    case Act::Send:
      send(*channel, id, Backpressure::Raise);
      break;
    case Act::Abort: {
      Loan loan;
      channel->try_alloc(8 * kPayloadWords, 0, Backpressure::Raise, loan);
      std::memset(loan.payload, 0xEE, 8 * kPayloadWords);
      channel->abort(loan);
      break;
    }
    case Act::Receive:
      take(*channel, held);
      break;
    case Act::Release:
      channel->release(held.slot, held.process, held.group);
      break;
    case Act::GiveBack:
      channel->give_back(held);
      break;
    case Act::Join:
      channel = Channel::adopt_anonymous(dup(fd_));
      break;
    case Act::Leave:
      channel->close();
      break;
    case Act::Wait:
      // A busy machine may take long over the spin; where a message comes, the wait ends with it.
      channel->recv(held, base::monotonic_ns() + (has_dead_message() ? 5'000'000'000 : 80'000'000));
      break;
    case Act::DropOldest:
      send(*channel, id, Backpressure::DropOldest);
      break;
    case Act::ShutDown:
      channel->shutdown(false);
      break;
    case Act::Check:
      channel->check_peers();
      break;
    case Act::Subscribe:
      member = subscribe(*channel, "mover", false);
      break;
    case Act::SubscribeOldest:
      member = subscribe(*channel, "mover", false, dsline::Start::Oldest);
      break;
    case Act::Enter:
      member = subscribe(*channel, kDurable, true);
      break;
    case Act::EndGroup:
      member->close();
      break;
    case Act::RemoveGroup:
      channel->remove_group(kDurable);
      break;
    case Act::Bury:
      take(*channel, held);
      break;
    case Act::TakeLetter:
      take_letter(*channel, held, group);
      break;
    case Act::ReleaseLetter:
      channel->release(held.slot, held.process, held.group);
      break;
    case Act::ReturnLetter:
      channel->give_back(held);
      break;
    case Act::Revive:
      channel->revive(held);
      break;
    case Act::Look:
      channel->try_read_latest(true, 0, held);
      break;
  }
  for (;;) raise(SIGSTOP);
}

void Scene::place_dead() {
  Item item{next_id_++, {start_ == Start::DeadHolding ? 1 : 0}};
  if (start_ == Start::DeadHolding) {
    --next_id_;
    for (Item& queued : items_) {
      if (queued.path == std::vector<int>{0}) queued.path = {1};
    }
  } else if (start_ == Start::DeadCommitted || start_ == Start::DeadEntered || start_ == Start::DeadViewer ||
             start_ == Start::DeadLeaving) {
    items_.push_back(item);
  }
  pid_t pid = start_child(false, [this] { be_dead(); });
  int status = 0;
  if (waitpid(pid, &status, 0) != pid || !WIFSIGNALED(status) || WTERMSIG(status) != SIGKILL) {
    throw std::runtime_error("the one who was to die did not, status " + std::to_string(status));
  }
}

void Scene::be_dead() {
  auto channel = Channel::adopt_anonymous(dup(fd_));
  Received message;
  switch (start_) {
    case Start::DeadHolding:
      if (take(*channel, message) == 0) throw std::runtime_error("nothing to hold");
      kill(getpid(), SIGKILL);
      break;
    case Start::DeadWriting:
      die_at("publish.before_commit");
      send(*channel, next_id_ - 1, Backpressure::Raise);
      break;
    case Start::DeadWaiting:
      die_at("wait.registered");
      channel->recv(message, base::monotonic_ns() + 1'000'000'000);
      break;
    case Start::DeadViewer: {
      auto member = subscribe(*channel, "dead", false);
      send(*channel, next_id_ - 1, Backpressure::Raise);
      if (take(*member, message) == 0) throw std::runtime_error("nothing to hold");
      kill(getpid(), SIGKILL);
      break;
    }
    case Start::DeadLeaving: {
      auto member = subscribe(*channel, "dead", false);
      send(*channel, next_id_ - 1, Backpressure::Raise);
      die_at("leave.inactive");
      member->close();
      break;
    }
    case Start::DeadJoining: {
      die_at("join.before_active");
      auto member = subscribe(*channel, "dead", false, dsline::Start::Oldest);
      break;
    }
    case Start::DeadEntered:
      die_at("publish.entered");
      send(*channel, next_id_ - 1, Backpressure::Raise);
      break;
    default:
      die_at("publish.committed");
      send(*channel, next_id_ - 1, Backpressure::Raise);
      break;
  }
  throw std::runtime_error("still alive");
}

/// What the act does to the messages.
void Scene::plan_act() {
  switch (act_) {
    case Act::Send:
      items_.push_back({1000, {kAbsent, 0}});
      if (has_group()) items_.push_back({1000, {kAbsent, 0}, kDurable});
      if (has_history()) {
        items_.front().path = {0, kAbsent};
        items_.push_back({1000, {kAbsent, 0}, kOld});
      }
      break;
    case Act::RemoveGroup:
      for (Item& item : items_) {
        if (item.group == kDurable) item.path = {0, kAbsent};
      }
      break;
    case Act::EndGroup:
      if (has_group()) {
        for (std::uint64_t i = 0; i < 2; ++i) {
          items_.push_back({900 + i, {0}, kDurable});
          items_.back().in_turn = false;  // sent first
        }
      }
      if (has_history()) {
        // The mover's messages are the history now.
        items_[0] = {900, {0}, kOld};
        items_[1] = {901, {0}, kOld};
      }
      break;
    case Act::Bury:
      // Whoever buries the other one, this one has to go; but not when the mover dies between the two.
      items_.front().path = {kAbsent, kLetter, kAbsent};
      break;
    case Act::ReleaseLetter:
      items_.front().path = {kLetter, kAbsent};
      break;
    case Act::Revive:
      items_.front().path = {kLetter, 1};
      break;
    case Act::DropOldest:
      for (Item& item : items_) {
        if (item.with_bystander) continue;
        item.may_go = true;
        const int before = item.path[0];
        item.path = {before, before + 1, kAbsent};
      }
      items_.push_back({1000, {kAbsent, 0}});
      if (has_group()) items_.push_back({1000, {kAbsent, 0}, kDurable});
      break;
    case Act::Release:
      items_.front().path = {1, kAbsent};
      break;
    case Act::Receive: {
      Item* next = nullptr;
      for (Item& item : items_) {
        if (item.with_bystander || !item.group.empty()) continue;
        if (next == nullptr || item.path[0] > next->path[0]) next = &item;
      }
      next->path = {next->path[0], next->path[0] + 1};
      break;
    }
    case Act::Wait:
      for (Item& item : items_) item.path = {item.path[0], item.path[0] + 1};
      break;
    default:
      break;
  }
  for (Item& item : items_) {
    if (start_ == Start::DeadCommitted) item.in_turn = false;
  }
}

}  // namespace dsline::steps
