/// Rewrites control words, headers and lengths of a channel while peers send and receive.
///
///   peers 0 … 3: each with a handle of the victim, and one of a second channel that nobody scribbles on
///   scribbler: a process that maps the victim and writes into its words, in bursts
///
/// Passes when no peer crashes, no call comes back later than its deadline plus slack, and every message of the second
/// channel arrives whole, once and in order. The victim is replaced every round, since damage may make it useless.

#include <fcntl.h>
#include <sys/mman.h>

#include <atomic>

#include "operations.hpp"

namespace dsline::robust {
namespace {

constexpr std::uint32_t kPeers = 4;  // even ones send on the second channel, odd ones receive from it
constexpr std::int64_t kRoundNs = 300'000'000;
constexpr std::int64_t kWaitNs = 2'000'000;
constexpr std::int64_t kWatchdogNs = 5'000'000'000;
// Every process may have to wait for its turn on a small machine; a hang is longer.
constexpr std::int64_t kSlackNs = 1'500'000'000;
constexpr std::uint64_t kFrameBytes = 256;

struct Shared {
  std::atomic<bool> is_over;
  std::atomic<std::int64_t> beat_ns[kPeers];
  std::atomic<const char*> call[kPeers];
  std::atomic<std::uint64_t> calls[kPeers], delivered[kPeers], corrupted[kPeers], errors[kPeers],
      sent[kPeers];
  std::atomic<std::uint64_t> attaches[kPeers], refused[kPeers];
  std::atomic<std::int64_t> latest_ns[kPeers];
  std::atomic<std::uint64_t> other_sent[kPeers], other_received[kPeers];
  std::atomic<std::uint64_t> writes;
  char wrong[kPeers][200];
};

ChannelOptions victim_options(Random& random) {
  ChannelOptions o;
  o.capacity = 6 + static_cast<std::uint32_t>(random.below(3)) * 5;
  o.slot_size = 512;
  o.max_message_size = random.below(2) == 0 ? 512 : 65536;
  o.max_handles = 12;
  o.max_groups = 3;
  o.history = static_cast<int>(random.below(3)) * 2;
  o.max_deliveries = 2;
  o.dead_letters = 2;
  o.checksum = static_cast<int>(random.below(3));
  o.first_position = random.below(2) == 0 ? 0 : (std::uint64_t{1} << 44) - 50;
  if (random.below(2) == 0) o.schema = small_schema();
  return o;
}

/// The second channel, seen by one peer.
class Other {
 public:
  Other(int fd, std::uint32_t me, Shared& shared)
      : channel_(Channel::adopt_anonymous(fd)), me_(me), shared_(shared) {}

  void step() {
    if (me_ % 2 == 0) {
      std::byte payload[256];
      make_proof(payload, sizeof payload, me_, sent_ + 1);
      if (channel_->send(payload, sizeof payload, Backpressure::Block, base::monotonic_ns() + kWaitNs) ==
          Outcome::Ok) {
        shared_.other_sent[me_].store(++sent_);
      }
      return;
    }
    for (int i = 0; i < 8; ++i) {
      Received message;
      const Outcome outcome = channel_->try_recv(message);
      if (outcome == Outcome::Corrupted) fail("a message of the other channel is corrupted");
      if (outcome != Outcome::Ok) return;
      const Proof proof = read_proof(message.payload, message.payload_bytes);
      if (!proof.is_good || proof.writer >= kPeers) {
        fail("a message of the other channel is not what was sent");
      } else if (proof.number <= last_[proof.writer]) {
        fail("a message of the other channel came twice or out of order");
      } else {
        last_[proof.writer] = proof.number;
      }
      channel_->release(message);
      shared_.other_received[me_].fetch_add(1);
    }
  }

  void fail(const char* what) {
    if (shared_.wrong[me_][0] == 0) std::snprintf(shared_.wrong[me_], sizeof shared_.wrong[me_], "%s", what);
  }

 private:
  std::shared_ptr<Channel> channel_;
  std::uint32_t me_;
  Shared& shared_;
  std::uint64_t sent_ = 0;
  std::uint64_t last_[kPeers] = {};
};

int run_peer(std::uint32_t me, int victim, Other& other, Shared& shared, std::uint64_t seed,
             std::int64_t end) {
  Random random(seed);
  CallWatch watch;
  watch.running = &shared.call[me];
  while (base::monotonic_ns() < end) {
    Tally tally;
    shared.beat_ns[me].store(base::monotonic_ns());
    std::shared_ptr<Channel> channel;
    try {
      watch("attach", 0, [&] { channel = Channel::adopt_anonymous(dup(victim)); });
      shared.attaches[me].fetch_add(1);
    } catch (const Error&) {
      shared.refused[me].fetch_add(1);
      sleep_ns(200'000);
    }
    if (channel) {
      Peer peer(std::move(channel), watch, tally, me);
      // A peer that scribbles may change what is being read, and the counters.
      peer.checks_payload = peer.checks_counter = false;
      const std::uint64_t turns = 1 + random.below(20);
      for (std::uint64_t i = 0; i < turns && base::monotonic_ns() < end; ++i) {
        shared.beat_ns[me].store(base::monotonic_ns());
        peer.payload_bytes = 64 + random.below(448);
        peer.exercise(random.below(4) == 0 ? kWaitNs : 100'000);
        if (random.below(4) == 0) peer.borrow(true, true);
        if (random.below(4) == 0) peer.look_closely();
        if (random.below(4) == 0) {
          const char* const names[] = {"left", "right", "late"};
          peer.visit_group(names[random.below(3)], static_cast<Start>(random.below(3)),
                           names[random.below(3)]);
        }
        if (peer.held() > 2) peer.finish(true);
        watch("calls on the other channel", base::monotonic_ns() + kWaitNs, [&] { other.step(); });
      }
      if (random.below(2) == 0) peer.finish(false);
      peer.close();
    }
    shared.calls[me].fetch_add(tally.calls);
    shared.delivered[me].fetch_add(tally.delivered);
    shared.corrupted[me].fetch_add(tally.corrupted);
    shared.errors[me].fetch_add(tally.errors);
    shared.sent[me].fetch_add(tally.sent);
    shared.latest_ns[me].store(std::max(shared.latest_ns[me].load(), watch.latest_ns));
    if (!watch.wrong.empty()) other.fail(watch.wrong.c_str());
  }
  return 0;
}

/// Bursts of writes, with pauses in which the peers get somewhere: from a few writes to a million a second. Now and then
/// all control words become those of a new channel again, else little would be delivered.
void scribble(Bytes& bytes, const std::vector<Field>& fields, Shared& shared, Random& random,
              std::int64_t end) {
  const memory::Geometry g = bytes.geometry();
  const std::vector<unsigned char> fresh(bytes.data(), bytes.data() + g.arena_offset);
  const std::uint64_t longest_burst = std::uint64_t{1} << random.below(6);
  const std::uint64_t longest_pause_ns = std::uint64_t{20'000} << random.below(8);
  std::vector<const Field*> weighted;
  for (const Field& field : fields) {
    const int weight = field.kind == Field::Kind::Plain ? 1 : field.kind == Field::Kind::Frame ? 4 : 6;
    for (int i = 0; i < weight; ++i) weighted.push_back(&field);
  }
  while (base::monotonic_ns() < end) {
    const std::uint64_t burst = 1 + random.below(longest_burst);
    for (std::uint64_t i = 0; i < burst; ++i) {
      const Field& field = *weighted[random.below(weighted.size())];
      if (field.bytes == 8 && random.below(4) != 0) {
        auto& word = *reinterpret_cast<std::atomic<std::uint64_t>*>(bytes.data() + field.offset);
        const std::uint64_t value = damaged(field.kind, word.load(std::memory_order_relaxed),
                                            static_cast<std::uint32_t>(random.below(64)), random);
        word.store(value, std::memory_order_relaxed);
      } else {
        bytes[field.offset + random.below(field.bytes)] = static_cast<unsigned char>(random.next());
      }
    }
    // Else nobody could attach after the first hit.
    if (random.below(4) == 0) std::memcpy(bytes.data(), fresh.data(), offsetof(memory::RegionHeader, active));
    if (random.below(16) == 0) std::memcpy(bytes.data(), fresh.data(), fresh.size());
    shared.writes.fetch_add(burst, std::memory_order_relaxed);
    sleep_ns(static_cast<std::int64_t>(random.below(longest_pause_ns)));
  }
}

int run(const Options& options) {
  Report report("scribbler", options);
  Random random(options.seed);
  void* page = mmap(nullptr, sizeof(Shared), PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
  if (page == MAP_FAILED) return 2;
  Shared& shared = *static_cast<Shared*>(page);

  const std::int64_t end = base::monotonic_ns() + static_cast<std::int64_t>(options.seconds * 1e9);
  std::vector<std::string> trouble;
  while (base::monotonic_ns() < end && report.failed() < 20) {
    ++report["rounds"];
    ChannelOptions calm;
    calm.capacity = 16;
    calm.slot_size = calm.max_message_size = 256;
    calm.max_handles = 16;
    calm.checksum = 2;
    auto second = Channel::create_anonymous(calm);
    auto victim = Channel::create_anonymous(victim_options(random));
    const std::int64_t round_end = std::min(end, base::monotonic_ns() + kRoundNs);
    const std::uint64_t round_seed = random.next();
    for (auto& beat : shared.beat_ns) beat.store(base::monotonic_ns());

    std::vector<pid_t> children;
    for (std::uint32_t me = 0; me < kPeers; ++me) {
      children.push_back(start_child([&] {
        Other other(dup(second->descriptor()), me, shared);
        return run_peer(me, victim->descriptor(), other, shared, round_seed + me, round_end);
      }));
    }
    const pid_t scribbler = start_child([&] {
      Bytes bytes(victim->descriptor());
      const memory::Geometry g = bytes.geometry();
      Random own(round_seed + 99);
      scribble(bytes, fields_of(g, g.groups, g.participants, kFrameBytes), shared, own, round_end);
      return 0;
    });

    for (std::uint32_t me = 0; me < kPeers; ++me) {
      int status = 0;
      for (;;) {
        if (waitpid(children[me], &status, WNOHANG) == children[me]) break;
        if (base::monotonic_ns() - shared.beat_ns[me].load() > kWatchdogNs) {
          if (options.others.count("debugger") != 0) {  // --debugger yes: where does it hang?
            const std::string command =
                "gdb -p " + std::to_string(children[me]) + " -batch -ex bt 2>/dev/null | grep '^#' >&2";
            static_cast<void>(std::system(command.c_str()) == 0);
          }
          kill(children[me], SIGKILL);
          waitpid(children[me], &status, 0);
          status = -1;
          break;
        }
        sleep_ns(1'000'000);
      }
      if (status != 0) {
        report.fail("round " + std::to_string(report["rounds"]) + ", peer " + std::to_string(me) + " " +
                    describe_status(status) + " in: " + shared.call[me].load());
      }
    }
    if (wait_child(scribbler, 5) != 0) report.fail("the scribbler itself did not end well");

    // What is left in the second channel counts as received; nothing may be missing.
    std::uint64_t sent = 0, received = 0;
    Received message;
    while (second->try_recv(message) == Outcome::Ok) {
      ++received;
      if (!read_proof(message.payload, message.payload_bytes).is_good) {
        report.fail("a queued message of the other channel is not what was sent");
      }
      second->release(message);
    }
    for (std::uint32_t me = 0; me < kPeers; ++me) {
      sent += shared.other_sent[me].exchange(0);
      received += shared.other_received[me].exchange(0);
    }
    if (sent != received) {
      report.fail("the other channel took " + std::to_string(sent) + " messages and gave " +
                  std::to_string(received));
    }
    report["messages of the other channel"] += sent;
  }
  for (std::uint32_t me = 0; me < kPeers; ++me) {
    report["calls"] += shared.calls[me];
    report["messages sent"] += shared.sent[me];
    report["messages delivered"] += shared.delivered[me];
    report["corrupted messages found"] += shared.corrupted[me];
    report["typed errors"] += shared.errors[me];
    report["attaches"] += shared.attaches[me];
    report["attaches refused"] += shared.refused[me];
    auto& latest = report["latest call, microseconds"];
    latest = std::max(latest, static_cast<std::uint64_t>(shared.latest_ns[me].load() / 1000));
    if (shared.latest_ns[me].load() > kSlackNs) {
      report.fail("a call of peer " + std::to_string(me) + " came back " +
                  std::to_string(shared.latest_ns[me].load() / 1'000'000) + " ms after its deadline");
    }
    if (shared.wrong[me][0] != 0) report.fail("peer " + std::to_string(me) + ": " + shared.wrong[me]);
  }
  report["words scribbled"] = shared.writes;
  report.expect_at_least("words scribbled", 1000);
  report.expect_at_least("calls", 1000);
  report.expect_at_least("attaches", 10);
  report.expect_at_least("messages delivered", 1000);
  report.expect_at_least("messages of the other channel", 100);
  return report.finish();
}

}  // namespace
}  // namespace dsline::robust

int main(int argc, char** argv) {
  auto options = dsline::robust::parse_options(argc, argv, 10);
  if (options.is_long) options.seconds = std::max(options.seconds, 600.0);
  return dsline::robust::run(options);
}
