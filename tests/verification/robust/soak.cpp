/// Runs a channel for long: several processes send and receive, handles come and go, a process is killed every 50 ms.
///
/// Passes when nothing grows: private memory, descriptors and mappings of the processes that stay, reserved bytes and
/// names in /dev/shm; no message is torn or comes unflagged twice, what was sent and not held by a dead process arrives;
/// after the end every slot is free.
///
///   2 producers, 2 consumers    stay for the whole run and are watched
///   victims                     send, receive, join groups; each is killed after about 50 ms
///   watcher (this process)      kills, watches, keeps the books

#include <dirent.h>
#include <fcntl.h>
#include <sys/mman.h>

#include <algorithm>
#include <atomic>

#include "operations.hpp"

namespace dsline::robust {
namespace {

constexpr std::uint32_t kProducers = 2;
constexpr std::uint32_t kConsumers = 2;
constexpr std::uint32_t kStaying = kProducers + kConsumers;
constexpr std::uint32_t kVictims = 2;
constexpr std::int64_t kKillEveryNs = 50'000'000;
constexpr std::int64_t kWaitNs = 20'000'000;
constexpr std::uint64_t kLargest = 200'000;
// What the allocator may keep more at the end than after the start: a leak of one small object a second is more.
constexpr double kMostGrowth = 512 * 1024;
constexpr double kMostGrowthPerHour = 64.0 * 1024 * 1024;
constexpr std::uint64_t kMaxNumbers = std::uint64_t{1}
                                      << 24;  // messages of one producer that are kept book of

struct Shared {
  std::atomic<bool> producers_end, all_end;
  std::atomic<std::uint64_t> sent[kProducers];
  std::atomic<std::uint64_t> received, redelivered, letters, wrong, victims_joined, timeouts;
  std::atomic<std::int64_t> beat_ns[kStaying];
  char what[200];
  // Per message of the staying producers: how often it was received to its end.
  std::atomic<std::uint8_t> seen[kProducers][kMaxNumbers];
};

ChannelOptions options() {
  ChannelOptions o;
  o.capacity = 32;
  o.slot_size = 4096;
  o.max_message_size = 1 << 20;
  o.max_handles = 32;
  o.max_groups = 6;
  o.history = 4;
  o.max_deliveries = 3;
  o.dead_letters = 8;
  o.checksum = 1;
  return o;
}

void wrong(Shared& shared, const char* what) {
  if (shared.wrong.fetch_add(1) == 0) std::snprintf(shared.what, sizeof shared.what, "%s", what);
}

/// A message that no consumer can work with: it becomes a dead letter.
bool is_poison(const Proof& proof) { return proof.number % 5000 == 4999; }

std::uint64_t size_of_message(Random& random) {
  return random.below(50) == 0 ? kProofBytes + random.below(kLargest) : kProofBytes + random.below(2000);
}

bool send_one(Channel& channel, std::vector<std::byte>& payload, Random& random, std::uint32_t writer,
              std::uint64_t number) {
  payload.resize(size_of_message(random));
  make_proof(payload.data(), payload.size(), writer, number);
  return channel.send(payload.data(), payload.size(), Backpressure::Block, base::monotonic_ns() + kWaitNs) ==
         Outcome::Ok;
}

void receive_one(Channel& channel, Shared& shared, Random& random, bool counts) {
  Received message;
  const Outcome outcome = channel.recv(message, base::monotonic_ns() + kWaitNs);
  if (outcome == Outcome::Corrupted) return wrong(shared, "a corrupted message");
  if (outcome != Outcome::Ok) {
    shared.timeouts.fetch_add(1);
    return;
  }
  const Proof proof = read_proof(message.payload, message.payload_bytes);
  if (!proof.is_good) wrong(shared, "a torn message");
  if (random.below(200) == 0 || is_poison(proof)) {
    channel.give_back(message);
    return;
  }
  if (counts && proof.writer < kProducers && proof.number < kMaxNumbers) {
    const bool again = shared.seen[proof.writer][proof.number].fetch_add(1) != 0;
    if (again && message.attempts == 0) wrong(shared, "a message came twice without the flag");
  }
  if (message.attempts != 0) shared.redelivered.fetch_add(1);
  shared.received.fetch_add(1);
  channel.release(message);
}

int produce(const std::string& name, std::uint32_t me, Shared& shared, std::uint64_t seed) {
  Random random(seed);
  auto channel = Channel::open_named(name, ChannelOptions{}, OpenMode::Open);
  std::vector<std::byte> payload;
  std::uint64_t number = 0;
  while (!shared.producers_end.load()) {
    shared.beat_ns[me].store(base::monotonic_ns());
    if (number < kMaxNumbers && send_one(*channel, payload, random, me, number))
      shared.sent[me].store(++number);
    if (random.below(500) == 0) {  // a handle comes and goes
      channel = Channel::open_named(name, ChannelOptions{}, OpenMode::Open);
    }
  }
  while (!shared.all_end.load()) {
    shared.beat_ns[me].store(base::monotonic_ns());
    sleep_ns(5'000'000);
  }
  return 0;
}

int consume(const std::string& name, std::uint32_t me, Shared& shared, std::uint64_t seed) {
  Random random(seed);
  auto channel = Channel::open_named(name, ChannelOptions{}, OpenMode::Open);
  while (!shared.all_end.load()) {
    shared.beat_ns[me].store(base::monotonic_ns());
    receive_one(*channel, shared, random, true);
    const bool ending = shared.producers_end.load();
    if (ending || random.below(300) == 0) {
      DeadLetter why;
      Received letter;
      if (channel->try_take_dead_letter(letter, why) == Outcome::Ok) {
        shared.letters.fetch_add(1);
        if (!ending && random.below(2) == 0) {
          channel->revive(letter);
        } else {
          const Proof proof = read_proof(letter.payload, letter.payload_bytes);
          if (proof.is_good && proof.writer < kProducers)
            shared.seen[proof.writer][proof.number].fetch_add(1);
          channel->release(letter);
        }
      }
    }
    if (random.below(1000) == 0) {
      channel = Channel::open_named(name, ChannelOptions{}, OpenMode::Open);
    }
    if (random.below(1000) == 0) static_cast<void>(channel->report());
  }
  return 0;
}

/// Lives for about 50 ms; what it does is interrupted at any instruction.
int be_a_victim(const std::string& name, Shared& shared, std::uint64_t seed) {
  Random random(seed);
  std::vector<std::byte> payload;
  auto channel = Channel::open_named(name, ChannelOptions{}, OpenMode::Open);
  shared.victims_joined.fetch_add(1);
  for (std::uint64_t i = 0;; ++i) {
    switch (random.below(6)) {
      case 0:
      case 1:
        send_one(*channel, payload, random, 100, i);
        break;
      case 2: {
        // Held when the process dies: it comes again. What it finished with is not in the books, so it gives back.
        Received message;
        if (channel->recv(message, base::monotonic_ns() + 1'000'000) == Outcome::Ok) {
          if (!read_proof(message.payload, message.payload_bytes).is_good) wrong(shared, "a torn message");
          if (random.below(8) == 0) sleep_ns(10'000'000);
          channel->put_back(message);
        }
        break;
      }
      case 3: {
        SubscribeOptions own;
        own.group = std::string(1, static_cast<char>('a' + random.below(4)));
        own.start = static_cast<Start>(random.below(3));
        auto member = channel->subscribe(own);
        for (int k = 0; k < 5; ++k) receive_one(*member, shared, random, false);
        break;
      }
      case 4:
        channel = Channel::open_named(name, ChannelOptions{}, OpenMode::Open);
        break;
      default: {
        Loan loan;
        if (channel->try_alloc(100, 0, Backpressure::Raise, loan) == Outcome::Ok) channel->abort(loan);
      }
    }
  }
  return 0;
}

/// Names that this run has made, whatever others do meanwhile.
std::size_t count_names() {
  const std::vector<std::string> names = list_channels();
  const std::string mine = "soak-" + std::to_string(getpid());
  return static_cast<std::size_t>(std::count_if(
      names.begin(), names.end(), [&](const std::string& one) { return one.rfind(mine, 0) == 0; }));
}

/// What is watched of one process over time.
struct Curve {
  std::vector<double> times, values;
  void add(double time, double value) {
    times.push_back(time);
    values.push_back(value);
  }
  /// Median of the last quarter less that of the second.
  double growth() const {
    const std::size_t quarter = values.size() / 4;
    if (quarter == 0) return 0;
    auto median = [&](std::size_t from) {
      std::vector<double> part(values.begin() + static_cast<std::ptrdiff_t>(from),
                               values.begin() + static_cast<std::ptrdiff_t>(from + quarter));
      std::sort(part.begin(), part.end());
      return part[part.size() / 2];
    };
    return median(values.size() - quarter) - median(quarter);
  }
  double largest() const { return values.empty() ? 0 : *std::max_element(values.begin(), values.end()); }
};

int run(const Options& options_given) {
  Report report("soak", options_given);
  Random random(options_given.seed);
  void* page = mmap(nullptr, sizeof(Shared), PROT_READ | PROT_WRITE,
                    MAP_SHARED | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (page == MAP_FAILED) return 2;
  Shared& shared = *static_cast<Shared*>(page);
  const std::string name = "soak-" + std::to_string(getpid());
  const std::size_t names_before = count_names();
  const std::size_t own_descriptors = count_descriptors(getpid());
  auto channel = Channel::open_named(name, options(), OpenMode::Create);

  std::vector<pid_t> staying;
  for (std::uint32_t i = 0; i < kStaying; ++i) {
    shared.beat_ns[i].store(base::monotonic_ns());
    staying.push_back(start_child([&] {
      return i < kProducers ? produce(name, i, shared, options_given.seed * 100 + i)
                            : consume(name, i, shared, options_given.seed * 100 + i);
    }));
  }
  pid_t victims[kVictims] = {};
  std::int64_t due[kVictims] = {};

  const std::int64_t start = base::monotonic_ns();
  const std::int64_t end = start + static_cast<std::int64_t>(options_given.seconds * 1e9);
  std::vector<Curve> memory(kStaying), descriptors(kStaying), mappings(kStaying);
  Curve reserved, names;
  std::int64_t next_look = start + 500'000'000;
  while (base::monotonic_ns() < end && report.failed() == 0) {
    const std::int64_t now = base::monotonic_ns();
    for (std::uint32_t v = 0; v < kVictims; ++v) {
      if (victims[v] != 0 && now < due[v]) continue;
      if (victims[v] != 0) {
        kill(victims[v], SIGKILL);
        int status = 0;
        waitpid(victims[v], &status, 0);
        ++report["kills"];
        if (!WIFSIGNALED(status) || WTERMSIG(status) != SIGKILL) {
          // Too many handles or groups at a moment, as long as the dead are not recovered, are typed errors.
          ++report[WIFEXITED(status) && WEXITSTATUS(status) == 98 ? "victims refused"
                                                                  : "victims that ended badly"];
        }
      }
      const std::uint64_t seed = random.next();
      victims[v] = start_child([&] {
        if (std::freopen("/dev/null", "w", stderr) == nullptr) return 97;
        return be_a_victim(name, shared, seed);
      });
      due[v] = now + kKillEveryNs * kVictims / 2 + static_cast<std::int64_t>(random.below(kKillEveryNs));
    }
    for (std::uint32_t i = 0; i < kStaying; ++i) {
      if (now - shared.beat_ns[i].load() > 10'000'000'000) {
        report.fail("process " + std::to_string(i) + " stands still");
        shared.beat_ns[i].store(now);
      }
    }
    if (now >= next_look) {
      next_look = now + std::max<std::int64_t>(100'000'000, (end - start) / 2000);
      const double t = static_cast<double>(now - start) / 1e9;
      for (std::uint32_t i = 0; i < kStaying; ++i) {
        memory[i].add(t, static_cast<double>(private_bytes(staying[i])));
        descriptors[i].add(t, static_cast<double>(count_descriptors(staying[i])));
        mappings[i].add(t, static_cast<double>(count_mappings(staying[i], name)));
      }
      reserved.add(t, static_cast<double>(channel->stats().reserved_bytes));
      names.add(t, static_cast<double>(count_names()));
      ++report["looks"];
    }
    sleep_ns(2'000'000);
  }

  for (pid_t victim : victims) {
    if (victim == 0) continue;
    kill(victim, SIGKILL);
    waitpid(victim, nullptr, 0);
  }
  // The last messages: consumers drain what is there, then everything has to be free.
  shared.producers_end.store(true);
  const std::int64_t drained_by = base::monotonic_ns() + 20'000'000'000;
  auto missing = [&] {
    std::uint64_t count = 0;
    for (std::uint32_t p = 0; p < kProducers; ++p) {
      for (std::uint64_t n = 0; n < shared.sent[p].load(); ++n) count += shared.seen[p][n].load() == 0;
    }
    return count;
  };
  std::uint64_t lost = missing();
  while (lost != 0 && base::monotonic_ns() < drained_by) {
    sleep_ns(20'000'000);
    channel->check_peers();
    lost = missing();
  }
  const ChannelStats last = channel->stats();
  // Dead letters that were dropped for newer ones are gone in order, and counted.
  if (lost > last.letters_dropped) {
    report.fail(std::to_string(lost) + " messages are lost, of which " +
                std::to_string(last.letters_dropped) + " as dead letters");
  }
  shared.all_end.store(true);
  for (std::uint32_t i = 0; i < kStaying; ++i) {
    const int status = wait_child(staying[i], 20);
    if (status != 0) report.fail("process " + std::to_string(i) + " " + describe_status(status));
  }

  const double hours = options_given.seconds / 3600;
  for (std::uint32_t i = 0; i < kStaying; ++i) {
    const std::string who = "process " + std::to_string(i);
    if (memory[i].growth() > std::max(kMostGrowth, kMostGrowthPerHour * hours / 64)) {
      report.fail(who + ": private memory grew by " + std::to_string(memory[i].growth() / 1024) + " KiB");
    }
    if (descriptors[i].growth() > 1) report.fail(who + ": descriptors grew");
    if (mappings[i].growth() > 1) report.fail(who + ": mappings grew");
    report["private KiB at most"] =
        std::max(report["private KiB at most"], static_cast<std::uint64_t>(memory[i].largest() / 1024));
    report["descriptors at most"] =
        std::max(report["descriptors at most"], static_cast<std::uint64_t>(descriptors[i].largest()));
  }
  if (names.largest() > static_cast<double>(names_before + 1)) report.fail("names in /dev/shm grew");
  report["reserved KiB at most"] = static_cast<std::uint64_t>(reserved.largest() / 1024);

  // Nothing is left behind: take what victims have sent, look after the dead, count the slots.
  Received message;
  for (int i = 0; i < 10; ++i) {
    channel->check_peers();
    DeadLetter why;
    while (channel->try_take_dead_letter(message, why) == Outcome::Ok) channel->release(message);
    while (channel->try_recv(message) == Outcome::Ok) channel->release(message);
    sleep_ns(60'000'000);
  }
  const ChannelStats stats = channel->stats();
  const std::uint64_t kept = channel->history();
  if (stats.free_slots + kept < channel->capacity()) {
    report.fail("of " + std::to_string(channel->capacity()) + " slots only " +
                std::to_string(stats.free_slots) + " are free (" + std::to_string(stats.writing_slots) +
                " being written, " + std::to_string(stats.pinned_slots) + " held, " +
                std::to_string(stats.corrupted_slots) + " corrupted)");
  }
  if (stats.participants != 1) report.fail("somebody who is gone still takes part");
  channel->shutdown(true);
  channel.reset();
  if (count_names() != names_before) report.fail("a name is left in /dev/shm");
  if (count_descriptors(getpid()) != own_descriptors) report.fail("a descriptor is left");

  for (auto& sent : shared.sent) report["messages sent"] += sent;
  report["messages received"] = shared.received;
  report["redelivered"] = shared.redelivered;
  report["dead letters taken"] = shared.letters;
  report["victims that joined"] = shared.victims_joined;
  report["deaths recovered"] = stats.deaths;
  report["dead letters dropped"] = stats.letters_dropped;
  if (shared.wrong != 0) report.fail(std::to_string(shared.wrong) + " times: " + shared.what);
  if (report["victims that ended badly"] != 0) report.fail("victims ended by themselves");
  const auto seconds = static_cast<std::uint64_t>(options_given.seconds);
  report.expect_at_least("messages sent", 100 * seconds);
  report.expect_at_least("dead letters taken", seconds / 5);
  report.expect_at_least("kills", 5 * seconds);
  report.expect_at_least("deaths recovered", seconds);
  report.expect_at_least("looks", seconds);
  return report.finish();
}

}  // namespace
}  // namespace dsline::robust

int main(int argc, char** argv) {
  auto options = dsline::robust::parse_options(argc, argv, 15);
  if (options.is_long) options.seconds = std::max(options.seconds, 3600.0);
  return dsline::robust::run(options);
}
