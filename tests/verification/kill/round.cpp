#include "round.hpp"

#include <signal.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include <algorithm>
#include <cstdio>
#include <cstring>

#include "base/clock.hpp"
#include "points.hpp"

namespace dsline::kill {

char path_to_remove[200];

namespace {

constexpr std::int64_t kMs = 1'000'000;
constexpr std::int64_t kLongestRoundNs = 20'000 * kMs;
constexpr std::int64_t kLongestEndNs = 10'000 * kMs;

void clear(Log& log) {
  for (Life& life : log.life) {
    std::memset(static_cast<void*>(life.sent), 0, sizeof(Send) * life.sends.load());
    std::memset(static_cast<void*>(life.seen), 0, sizeof(Event) * life.events.load());
    std::memset(static_cast<void*>(&life), 0, offsetof(Life, sent));
  }
  log.stop_sending = false;
  log.stop = false;
  log.lives = 0;
}

}  // namespace

Round::Round(const Plan& plan, const std::string& folder, Log& log, Tally& tally, Shared& shared)
    : plan_(plan), log_(log), tally_(tally), shared_(shared), random_(plan.seed ^ 0x5EED) {
  clear(log);
  site_.plan = &plan_;
  site_.log = &log_;
  if (plan_.place == Place::Shm) {
    site_.where = "kill-" + std::to_string(getpid());
    std::snprintf(path_to_remove, sizeof path_to_remove, "%s/%s", channel_directory().c_str(),
                  site_.where.c_str());
  } else if (plan_.place == Place::File) {
    site_.where = folder + "/channel-" + std::to_string(getpid());
    std::snprintf(path_to_remove, sizeof path_to_remove, "%s", site_.where.c_str());
  }
}

void Round::complain(Fault fault, const std::string& text) {
  switch (fault) {
    case Fault::Lost:
      ++tally_.lost;
      break;
    case Fault::Torn:
      ++tally_.torn;
      break;
    case Fault::Duplicated:
      ++tally_.duplicated;
      break;
    case Fault::Disordered:
      ++tally_.disordered;
      break;
    case Fault::Leaked:
      ++tally_.leaked;
      break;
    case Fault::Stuck:
      ++tally_.stuck;
      break;
    case Fault::Other:
      ++tally_.other;
      break;
  }
  if (tally_.violations == kMostViolations) return;
  std::snprintf(tally_.violation[tally_.violations++], sizeof tally_.violation[0], "round %llu (%s, %s): %s",
                static_cast<unsigned long long>(plan_.round),
                shape_name(static_cast<std::uint32_t>(plan_.shape)), place_name(plan_.place), text.c_str());
  std::fprintf(stderr, "VIOLATION in round %llu (%s, %s, capacity %u): %s\n",
               static_cast<unsigned long long>(plan_.round),
               shape_name(static_cast<std::uint32_t>(plan_.shape)), place_name(plan_.place),
               plan_.options.capacity, text.c_str());
}

void Round::create() {
  if (path_to_remove[0] != 0) ::unlink(path_to_remove);
  if (plan_.shape == Shape::Creators) return;
  std::shared_ptr<Channel> first = plan_.place == Place::Memfd ? Channel::create_anonymous(plan_.options)
                                                               : open_channel(site_, OpenMode::Create);
  site_.fd = dup(first->descriptor());
  watch_ = memory::Region::attach(memory::make_file_storage(dup(site_.fd), memory::StorageKind::File,
                                                            "the channel as its watcher sees it"));
  for (std::uint32_t g = 1; g <= plan_.durable; ++g) first->subscribe(subscription(plan_, g))->close();
  if (plan_.has_keeper) {
    site_.keeper = first;
  } else {
    first->close();
  }
}

void Round::choose_point(Life& life) {
  life.wanted_point = -1;
  if (random_.one_in(4)) return;
  const auto shape = static_cast<std::uint32_t>(plan_.shape);
  const auto role = static_cast<std::uint32_t>(life.role);
  const auto& hits = tally_.hits[shape][role];
  // Of a few labels that such a process comes to, or now and then of all, the one that has had the fewest deaths.
  const bool any = random_.one_in(4);
  const std::uint32_t first = random_.below(point_count());
  for (std::uint32_t i = 0; i < (any ? point_count() : 6); ++i) {
    const std::uint32_t point = any ? (first + i) % point_count() : random_.below(point_count());
    if (hits[point] == 0) continue;
    if (life.wanted_point < 0 || tally_.killed_at[point] < tally_.killed_at[life.wanted_point]) {
      life.wanted_point = static_cast<std::int32_t>(point);
    }
  }
  if (life.wanted_point < 0) return;
  const std::uint64_t usual = hits[life.wanted_point] / (tally_.lives[shape][role] + 1);
  life.wanted_hit = 1 + random_.below(std::min<std::uint64_t>(usual, 30) + 1);
  life.wants_stop = plan_.stops && random_.one_in(4);
}

/// A consumer goes to the group that has the fewest.
std::uint32_t Round::group_for(Role role, std::uint32_t index) {
  if (role == Role::Viewer) return kViewerGroup + index;
  if (role != Role::Consumer) return kDefaultGroup;
  std::vector<std::uint32_t> members(plan_.durable + 1, 0);
  if (plan_.options.default_group == 0) members[0] = ~0u;
  for (const Child& child : children_) {
    if (log_.life[child.index].role == Role::Consumer) ++members[log_.life[child.index].group];
  }
  return static_cast<std::uint32_t>(std::min_element(members.begin(), members.end()) - members.begin());
}

void Round::spawn(Role role) {
  const std::uint32_t index = log_.lives++;
  Life& life = log_.life[index];
  life.role = role;
  life.group = group_for(role, index);
  life.killed_at = -1;
  life.last_point = -1;
  choose_point(life);
  ++tally_.lives[static_cast<std::uint32_t>(plan_.shape)][static_cast<std::uint32_t>(role)];
  const std::uint64_t seed = random_.next();
  const pid_t lane = getpid();
  const pid_t pid = fork();
  if (pid == 0) {
    prctl(PR_SET_PDEATHSIG, SIGKILL);
    if (getppid() != lane) _exit(1);
    signal(SIGTERM, SIG_DFL);
    live(site_, index, seed,
         tally_.hits[static_cast<std::uint32_t>(plan_.shape)][static_cast<std::uint32_t>(role)]);
  }
  if (pid < 0) {
    complain(Fault::Other, "fork failed");
    return;
  }
  life.pid = pid;
  const std::int64_t now = base::monotonic_ns();
  Child child{index, pid, 0, 0, 0};
  // Whoever has a label to die at gets more time to come there.
  const std::uint32_t patience = life.wanted_point >= 0 ? 3 : 1;
  child.kill_at_ns =
      now + (plan_.life_us / 4 + std::int64_t{random_.below(plan_.life_us * 2)} * patience) * 1000;
  if (plan_.stops && random_.one_in(3)) child.stop_at_ns = now + random_.below(10) * kMs;
  children_.push_back(child);
  last_spawn_ns_ = now;
}

void Round::spawn_missing() {
  const std::int64_t now = base::monotonic_ns();
  for (std::uint32_t r = 0; r < kRoles; ++r) {
    std::uint32_t have = 0;
    for (const Child& child : children_) have += log_.life[child.index].role == static_cast<Role>(r);
    while (have < plan_.wanted[r] && now >= next_spawn_ns_[r] && log_.lives < kMostLives - 1) {
      spawn(static_cast<Role>(r));
      ++have;
    }
  }
}

void Round::reap() {
  int status = 0;
  for (pid_t pid; (pid = waitpid(-1, &status, WNOHANG | WUNTRACED)) > 0;) {
    auto child =
        std::find_if(children_.begin(), children_.end(), [pid](const Child& c) { return c.pid == pid; });
    if (child == children_.end()) continue;
    const std::int64_t now = base::monotonic_ns();
    Life& life = log_.life[child->index];
    if (WIFSTOPPED(status)) {
      if (child->go_on_at_ns == 0) child->go_on_at_ns = now + (1 + random_.below(60)) * kMs;
      continue;
    }
    if (WIFSIGNALED(status) && WTERMSIG(status) == SIGKILL && life.killed_ns != 0) {
      life.end = End::Killed;
      ++kills_;
      ++shared_.kills;
      ++tally_.kills[static_cast<std::uint32_t>(plan_.shape)];
      if (life.killed_at >= 0) {
        ++tally_.killed_at[life.killed_at];
      } else {
        ++tally_.killed_at_random;
      }
      unrecovered_.push_back({pid, life.killed_ns});
    } else if (WIFEXITED(status) && WEXITSTATUS(status) == 0) {
      life.end = End::Left;
    } else if (WIFEXITED(status) && WEXITSTATUS(status) == kRefused) {
      life.end = End::Refused;
      ++tally_.refused;
    } else {
      life.end = End::Failed;
      const bool torn =
          std::strstr(life.error, "torn") != nullptr || std::strstr(life.error, "corrupted") != nullptr;
      char text[300];
      std::snprintf(text, sizeof text, "life %u ended with status %x: %s", child->index, status, life.error);
      complain(torn ? Fault::Torn : Fault::Other, text);
    }
    const std::uint32_t delay = random_.one_in(3) ? plan_.respawn_delay_us : plan_.respawn_delay_us / 20;
    next_spawn_ns_[static_cast<std::uint32_t>(life.role)] =
        now + std::int64_t{plan_.respawn_least_us + random_.below(delay + 1)} * 1000;
    children_.erase(child);
  }
}

void Round::kill_now(const Child& child) {
  Life& life = log_.life[child.index];
  if (life.killed_ns == 0) life.killed_ns = base::monotonic_ns();
  ::kill(child.pid, SIGKILL);
}

/// What is due: deaths at random times, stops and their ends.
void Round::act() {
  const std::int64_t now = base::monotonic_ns();
  for (Child& child : children_) {
    if (!is_ending_ && now >= child.kill_at_ns) {
      kill_now(child);
      child.kill_at_ns = INT64_MAX;
    } else if (child.go_on_at_ns != 0) {
      if (now < child.go_on_at_ns) continue;
      ::kill(child.pid, SIGCONT);
      child.go_on_at_ns = 0;
    } else if (child.stop_at_ns != 0 && now >= child.stop_at_ns) {
      ::kill(child.pid, SIGSTOP);
      ++tally_.stops;
      child.stop_at_ns = 0;
    }
  }
}

/// Recovery is over when the entry of the dead is free. It is promised while somebody waits for messages, or for room:
/// a producer that has room needs nothing of the dead.
void Round::watch_recovery() {
  if (watch_ == nullptr) return;
  const std::int64_t now = base::monotonic_ns();
  const bool somebody = std::any_of(children_.begin(), children_.end(), [this](const Child& child) {
    const Life& life = log_.life[child.index];
    const bool receives =
        life.role == Role::Consumer || life.role == Role::Viewer || life.role == Role::Undertaker;
    return receives && child.go_on_at_ns == 0 && child.kill_at_ns != INT64_MAX && life.joined_ns != 0;
  });
  if (!somebody) {
    somebody_since_ns_ = 0;
  } else if (somebody_since_ns_ == 0) {
    somebody_since_ns_ = now;
  }
  std::erase_if(unrecovered_, [&](const Dead& dead) {
    for (std::uint32_t i = 0; i < watch_->geometry().participants; ++i) {
      const memory::ParticipantState& entry = watch_->participant(i);
      if ((entry.word.load() & 0xFF) != 0 && entry.pid.load() == static_cast<std::uint32_t>(dead.pid))
        return false;
    }
    if (somebody_since_ns_ != 0 && !plan_.stops && !is_ending_) {
      Times& times =
          last_spawn_ns_ > dead.since_ns ? tally_.recovery_by_newcomers : tally_.recovery_by_waiters;
      const std::int64_t took = now - std::max(dead.since_ns, somebody_since_ns_);
      times.add(took);
      if (plan_.shape == Shape::Steady && last_spawn_ns_ <= dead.since_ns)
        tally_.recovery_in_stream.add(took);
    }
    return true;
  });
}

bool Round::is_over() const { return kills_ >= plan_.kills || log_.lives >= kMostLives - 1 || shared_.stop; }

std::string Round::dump() const {
  std::string text = watch_ != nullptr ? dump_region(*watch_) : "";
  for (const Child& child : children_) {
    const Life& life = log_.life[child.index];
    char line[200];
    const std::int32_t point = life.last_point;
    std::snprintf(line, sizeof line, "; life %u pid %d role %d beats %llu at '%s'%s", child.index, child.pid,
                  static_cast<int>(life.role), static_cast<unsigned long long>(life.heartbeat.load()),
                  point >= 0 ? point_name(static_cast<std::uint32_t>(point)) : "",
                  child.go_on_at_ns != 0 ? " stopped" : "");
    text += line;
  }
  return text;
}

void Round::supervise() {
  sigset_t child_ended;
  sigemptyset(&child_ended);
  sigaddset(&child_ended, SIGCHLD);
  timespec tick{0, 500'000};
  sigtimedwait(&child_ended, nullptr, &tick);
  ++tally_.heartbeat;
  reap();
  act();
  watch_recovery();
}

void Round::run() {
  started_ns_ = base::monotonic_ns();
  try {
    create();
    while (!is_over()) {
      spawn_missing();
      supervise();
      if (base::monotonic_ns() - started_ns_ > kLongestRoundNs) {
        complain(Fault::Stuck, "the round does not come to its end: " + dump());
        break;
      }
    }
    finish();
    final_look();
  } catch (const std::exception& error) {
    complain(Fault::Other, std::string("the supervisor failed: ") + error.what());
    for (const Child& child : children_) ::kill(child.pid, SIGKILL);
    while (waitpid(-1, nullptr, 0) > 0) {
    }
  }
  if (path_to_remove[0] != 0) ::unlink(path_to_remove);
  path_to_remove[0] = 0;
  if (site_.fd >= 0) close(site_.fd);
  const auto shape = static_cast<std::uint32_t>(plan_.shape);
  ++tally_.rounds[shape];
}

void Round::finish() {
  is_ending_ = true;
  log_.stop_sending = true;
  if (plan_.ends_by_kill) {
    for (const Child& child : children_) kill_now(child);
  }
  const std::int64_t end = base::monotonic_ns() + kLongestEndNs;
  while (!children_.empty()) {
    supervise();
    const bool senders = std::any_of(children_.begin(), children_.end(), [this](const Child& child) {
      return log_.life[child.index].role == Role::Producer || log_.life[child.index].role == Role::Peer;
    });
    if (!senders) log_.stop = true;
    if (base::monotonic_ns() > end) {
      complain(Fault::Stuck, "processes do not end: " + dump());
      for (const Child& child : children_) kill_now(child);
      while (!children_.empty()) supervise();
      break;
    }
  }
}

/// Whoever joins now finds the whole history, whatever the groups before it have had.
void Round::judge_late_joiner(Channel& channel, const memory::Region& region) {
  const std::uint32_t kept = kept_messages(region);
  SubscribeOptions options;
  options.group = "late";
  options.start = Start::Oldest;
  auto late = channel.subscribe(options);
  std::uint32_t got = 0;
  Received message;
  while (late->try_recv(message) == Outcome::Ok) {
    Stamp stamp{};
    if (!read_payload(message.payload, message.payload_bytes, stamp))
      complain(Fault::Torn, "torn in the history");
    late->release(message.slot, message.process, message.group);
    ++got;
  }
  late->close();
  if (got != kept) {
    complain(Fault::Lost, "a late joiner got " + std::to_string(got) + " of the " + std::to_string(kept) +
                              " messages of the history: " + dump_region(region));
  }
}

void Round::final_look() {
  std::shared_ptr<Channel> channel = open_channel(site_, OpenMode::OpenOrCreate);
  site_.keeper.reset();
  Life& last = log_.life[kMostLives - 1];
  last.role = Role::Consumer;
  last.end = End::Left;
  last.joined_ns = base::monotonic_ns();
  const Complain complain_here = [this](Fault fault, const std::string& text) { complain(fault, text); };
  auto region = memory::Region::attach(memory::make_file_storage(
      dup(channel->descriptor()), memory::StorageKind::File, "the channel as its watcher sees it"));
  Counts counts;
  for (std::uint32_t g = plan_.options.default_group == 0 ? 1 : 0; g <= plan_.durable; ++g) {
    auto member = g == kDefaultGroup ? channel : channel->subscribe(subscription(plan_, g));
    Outcome outcome = Outcome::Ok;
    while (outcome == Outcome::Ok) outcome = take_one(*member, last, g);
    if (outcome != Outcome::Empty) {
      complain(Fault::Other, "the last look ended with outcome " + std::to_string(static_cast<int>(outcome)));
    }
    // Numbers are given in order, and the durable groups came first.
    counts.dropped_oldest.push_back(region->group(g).dropped_oldest.load());
    if (g != kDefaultGroup) member->close();
  }
  while (take_one_letter(*channel, last) == Outcome::Ok) {
  }
  counts.letters_dropped = region->header().letters_dropped.load();
  // A sender that dies before it cuts the history leaves that to the next one, and the last ones may all have died.
  const std::uint32_t history = region->rules().history;
  judge_region(*region, 1, plan_.durable, history == 0 ? 0 : region->geometry().slots, complain_here);
  if (history != 0) judge_late_joiner(*channel, *region);
  // Every slot can be taken again.
  std::vector<Loan> loans(channel->capacity());
  for (Loan& loan : loans) {
    if (channel->try_alloc(16, 0, Backpressure::Raise, loan) == Outcome::Ok) continue;
    complain(Fault::Leaked, "a free slot cannot be taken: " + dump_region(*region));
    break;
  }
  for (const Loan& loan : loans) channel->abort(loan);
  if (history != 0) {
    for (std::uint32_t i = 0; i < 2; ++i)
      channel->try_send("", 0, kBytesMessage, nullptr, 0, 0, Backpressure::Raise);
    for (std::uint32_t g = plan_.options.default_group == 0 ? 1 : 0; g <= plan_.durable; ++g) {
      auto member = g == kDefaultGroup ? channel : channel->subscribe(subscription(plan_, g));
      Received message;
      while (member->try_recv(message) == Outcome::Ok)
        member->release(message.slot, message.process, message.group);
      if (g != kDefaultGroup) member->close();
    }
    judge_region(*region, 1, plan_.durable, history, complain_here);
  }
  channel->close();
  judge_messages(plan_, log_, counts, tally_, complain_here);
}

}  // namespace dsline::kill
