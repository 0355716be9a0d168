/// Damages every byte and every control word of a small channel, one at a time, and lets peers go on with it.
///
/// Three settings: `live` (two handles were attached before the damage, a third one attaches after it), `dead` (all
/// participants are gone, so that attaching recovers them from damaged words), `reboot` (and the bytes come from another
/// boot, so that attaching rebuilds the order). Passes when every call ends with a result that can be, or a typed error,
/// within its deadline; no signal, no hang.
///
/// Cases run in forked children, many in each; a shared page says which case and which call is running. A case that ends
/// badly or late is run again alone before it counts.

#include <fcntl.h>
#include <sys/mman.h>

#include <atomic>

#include "operations.hpp"
#include "slots/claim.hpp"

namespace dsline::robust {
namespace {

constexpr std::uint32_t kSlots = 8;
constexpr std::uint32_t kHandles = 6;
constexpr std::uint64_t kFrameBytes = 224;  // header, metadata and payload of the largest message
constexpr std::int64_t kWaitNs = 100'000;
constexpr std::int64_t kWatchdogNs = 2'000'000'000;
constexpr std::uint64_t kCasesPerChild = 400;
constexpr std::uint64_t kLastPositions = (std::uint64_t{1} << 44) - 3;

enum class Setting : std::uint32_t { Live, Dead, Reboot };
constexpr const char* kSettings[] = {"live", "dead", "reboot"};

struct Case {
  Setting setting;
  std::uint32_t field;
  std::int32_t byte;    // of the field; -1: the whole word
  std::uint32_t value;  // which damage
};

ChannelOptions options(std::uint64_t first) {
  ChannelOptions o;
  o.capacity = kSlots;
  o.slot_size = o.max_message_size = 96;
  o.max_handles = kHandles;
  o.max_groups = 2;
  o.history = 2;
  o.max_deliveries = 2;
  o.dead_letters = 2;
  o.checksum = 2;
  o.first_position = first;
  o.schema = small_schema();
  return o;
}

std::shared_ptr<Channel> viewer_of(Channel& channel) {
  SubscribeOptions options;
  options.group = "viewers";
  options.durable = true;
  return channel.subscribe(options);
}

/// Messages that are queued, held, given back and a dead letter, and a slot that is being written; a history, and a
/// group with a member that holds a message.
struct Scene {
  std::shared_ptr<Channel> first;
  Peer sender;
  Peer receiver;
  Peer viewer;

  Scene(std::uint64_t position, CallWatch& watch, Tally& tally)
      : first(Channel::create_anonymous(options(position))),
        sender(first, watch, tally, 1),
        receiver(Channel::adopt_anonymous(dup(first->descriptor())), watch, tally, 2),
        viewer(viewer_of(*first), watch, tally, 4) {
    for (int i = 0; i < 3; ++i) sender.send(Backpressure::Raise, 0);
    receiver.recv(0, Peer::Then::GiveBack);
    receiver.recv(0, Peer::Then::GiveBack);
    receiver.recv(0, Peer::Then::Keep);  // the first one becomes a dead letter meanwhile
    receiver.recv(0, Peer::Then::GiveBack);
    viewer.recv(0, Peer::Then::Keep);
    sender.send_array();
    sender.send(Backpressure::Raise, 0);
    sender.borrow(true, true);
  }
};

std::uint64_t first_position_of(std::uint64_t number) { return number % 2 == 0 ? 100 : kLastPositions; }

/// The bytes of a channel whose participants are all dead, one of them between the commit and the order.
std::vector<unsigned char> make_ruin(std::uint64_t position, bool other_boot) {
  CallWatch watch;
  Tally tally;
  Scene scene(position, watch, tally);
  Bytes bytes(scene.first->descriptor());
  std::vector<unsigned char> ruin(bytes.data(), bytes.data() + bytes.size());
  const memory::Geometry g = bytes.geometry();
  auto word_at = [&](std::uint64_t offset) {
    std::uint64_t value;
    std::memcpy(&value, ruin.data() + offset, sizeof value);
    return value;
  };
  auto slot_at = [&](std::uint32_t s) { return g.slots_offset + s * sizeof(memory::SlotState); };
  std::uint32_t queued = kSlots;
  bool entered = false;
  for (std::uint32_t s = 0; s < kSlots; ++s) {
    const slots::SlotWord word{word_at(slot_at(s))};
    if (word.is(slots::SlotPhase::Committed) && word.pending() != 0) {
      if (!entered) {
        entered = true;
        const std::uint64_t enqueueing = word.bits | std::uint64_t{1} << 23;
        std::memcpy(ruin.data() + slot_at(s), &enqueueing, 8);
      }
      queued = s;
    } else if (word.is_free() && queued < kSlots) {
      const std::uint64_t committed =
          slots::SlotWord::make(word.generation() + 1, 0, slots::SlotPhase::Committed, 1 | 1u << 23).bits;
      std::memcpy(ruin.data() + slot_at(s), &committed, 8);
      auto frame = [&](std::uint32_t i) {
        return ruin.data() + g.arena_offset + i * g.stride_bytes + memory::frame_shift(g, i);
      };
      std::memcpy(frame(s), frame(queued), kFrameBytes);
      break;
    }
  }
  if (other_boot) ruin[offsetof(memory::RegionHeader, boot_id)] ^= 0x55;
  return ruin;
}

int memfd_of(const std::vector<unsigned char>& bytes) {
  const int fd = memfd_create("dsline-ruin", MFD_CLOEXEC | MFD_ALLOW_SEALING);
  if (fd < 0 || ftruncate(fd, static_cast<off_t>(bytes.size())) != 0 ||
      pwrite(fd, bytes.data(), bytes.size(), 0) != static_cast<ssize_t>(bytes.size()) ||
      fcntl(fd, F_ADD_SEALS, F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_SEAL) != 0) {
    std::abort();
  }
  return fd;
}

/// Shared between the program and the child that runs cases.
struct Progress {
  std::atomic<std::uint64_t> running;    // number of the case
  std::atomic<std::int64_t> started_ns;  // of the case
  std::atomic<const char*> call;         // a literal, at the same address in both processes
  std::atomic<std::uint64_t> done;
  std::uint64_t calls, delivered, corrupted, errors, refused, sent, timeouts, unchanged, frames_caught,
      letters, latest;
  std::int64_t latest_ns;
  std::uint64_t failed_case;
  char failure[400];
};

class Sweep {
 public:
  explicit Sweep(const Options& given) : options_(given) {
    CallWatch watch;
    Tally tally;
    Scene scene(100, watch, tally);
    Bytes bytes(scene.first->descriptor());
    geometry_ = bytes.geometry();
    fields_ = fields_of(geometry_, geometry_.groups, kHandles, kFrameBytes);
    for (int i = 0; i < 2; ++i) {
      ruins_[i] = make_ruin(first_position_of(static_cast<std::uint64_t>(i)), false);
      reboots_[i] = make_ruin(first_position_of(static_cast<std::uint64_t>(i)), true);
    }
    list_cases();
  }

  const std::vector<Case>& cases() const noexcept { return cases_; }

  std::string describe(const Case& c) const {
    const Field& field = fields_[c.field];
    std::string text = std::string(kSettings[static_cast<int>(c.setting)]) + ", " + field.name;
    if (c.byte >= 0) text += " byte " + std::to_string(c.byte);
    return text + ", damage " + std::to_string(c.value);
  }

  void run(std::uint64_t number, Progress& progress) {
    const Case& c = cases_[number];
    CallWatch watch;
    Tally tally;
    Random random(options_.seed * 1'000'003 + number);
    progress.started_ns.store(base::monotonic_ns());
    progress.running.store(number);
    watch.running = &progress.call;
    if (c.setting == Setting::Live) {
      run_live(c, number, random, watch, tally, progress);
    } else {
      run_dead(c, number, random, watch, tally, progress);
    }
    progress.calls += tally.calls;
    progress.delivered += tally.delivered;
    progress.corrupted += tally.corrupted;
    progress.errors += tally.errors;
    progress.sent += tally.sent;
    progress.timeouts += tally.timeouts;
    progress.letters += tally.letters;
    progress.latest += tally.latest;
    progress.latest_ns = std::max(progress.latest_ns, watch.latest_ns);
    if (watch.wrong.empty() && watch.is_late()) {
      watch.wrong = std::string(watch.latest_call) + " came back " +
                    std::to_string(watch.latest_ns / 1'000'000) + " ms after its deadline";
    }
    if (!watch.wrong.empty() && progress.failure[0] == 0) {
      progress.failed_case = number;
      std::snprintf(progress.failure, sizeof progress.failure, "%s", watch.wrong.c_str());
    }
    progress.done.fetch_add(1);
  }

 private:
  void list_cases() {
    const std::uint32_t values = options_.is_long ? 12 : 5;
    for (Setting setting : {Setting::Live, Setting::Dead, Setting::Reboot}) {
      if (!options_.wants(kSettings[static_cast<int>(setting)])) continue;
      for (std::uint32_t f = 0; f < fields_.size(); ++f) {
        const Field& field = fields_[f];
        // What a dead participant leaves in a frame is read no differently from what a live one does.
        if (setting != Setting::Live && field.kind == Field::Kind::Frame && !options_.is_long) continue;
        for (std::uint32_t b = 0; b < field.bytes; ++b) {
          for (std::uint32_t v = 0; v < values; ++v) {
            const std::uint32_t each = options_.is_long           ? 1
                                       : is_rare(setting, field)  ? 7
                                       : setting == Setting::Dead ? 3
                                                                  : 1;
            if ((b + v + f) % each != 0) continue;
            cases_.push_back({setting, f, static_cast<std::int32_t>(b), v});
          }
        }
        if (field.bytes != 8) continue;
        const bool plain = field.kind == Field::Kind::Plain;
        const std::uint32_t most = plain ? 4 : options_.is_long ? 60 : 20;
        const std::uint32_t each = options_.is_long || !is_rare(setting, field) ? 1 : 3;
        for (std::uint32_t v = f % each; v < most; v += each) cases_.push_back({setting, f, -1, v});
      }
    }
  }

  /// Sampled in the short mode: what nobody uses, what is for people, and the setting that differs little.
  static bool is_rare(Setting setting, const Field& field) {
    auto begins = [&](const char* with) { return field.name.rfind(with, 0) == 0; };
    if (setting == Setting::Reboot || begins("death") || field.name.find("waiters") != std::string::npos ||
        begins("group 2") || begins("participant 4") || begins("participant 5") || begins("participant 3") ||
        field.name.find(" notes ") != std::string::npos || field.name.find(" claim 2") != std::string::npos) {
      return true;
    }
    return setting == Setting::Dead && (begins("header") || begins("group"));
  }

  /// False when the damage changes nothing.
  bool damage(const Case& c, unsigned char* bytes, Random& random) const {
    const Field& field = fields_[c.field];
    if (c.byte < 0) {
      std::uint64_t value;
      std::memcpy(&value, bytes + field.offset, sizeof value);
      const std::uint64_t bad = damaged(field.kind, value, c.value, random);
      std::memcpy(bytes + field.offset, &bad, sizeof bad);
      return bad != value;
    }
    unsigned char& byte = bytes[field.offset + static_cast<std::uint64_t>(c.byte)];
    const unsigned char before = byte;
    switch (c.value) {
      case 0:
        byte = 0x00;
        break;
      case 1:
        byte = 0xFF;
        break;
      case 2:
        byte ^= 0x01;
        break;
      case 3:
        byte ^= 0x80;
        break;
      default:
        byte = static_cast<unsigned char>(random.next());
    }
    return byte != before;
  }

  void newcomer(int fd, std::uint64_t number, Random& random, CallWatch& watch, Tally& tally,
                Progress& progress, bool checks_payload) {
    std::shared_ptr<Channel> channel;
    try {
      watch("attach", 0, [&] { channel = Channel::adopt_anonymous(fd); });
    } catch (const Error&) {
      ++progress.refused;
      return;
    }
    Peer peer(std::move(channel), watch, tally, 3);
    peer.checks_payload = checks_payload;
    peer.look_closely();
    peer.exercise(random.below(16) == 0 ? 20 * kWaitNs : kWaitNs);
    // A group that begins waits 20 ms for a sender that is in the middle of a message, as the one of the live scene is.
    if (random.below(cases_[number].setting == Setting::Live ? 16 : 2) == 0) {
      peer.visit_group(random.below(2) == 0 ? "viewers" : "late",
                       random.below(2) == 0 ? Start::Oldest : Start::Latest,
                       random.below(2) == 0 ? "viewers" : "late");
    }
    peer.look_closely();
    if (random.below(8) == 0) {
      peer.shutdown(random.below(2) == 0);
      for (std::uint32_t i = 0; i < kSlots; ++i) peer.recv(0, Peer::Then::Release);
    }
    if (random.below(2) == 0) peer.finish(true);
    peer.close();
  }

  void run_live(const Case& c, std::uint64_t number, Random& random, CallWatch& watch, Tally& tally,
                Progress& progress) {
    progress.call.store("making the scene");
    Scene scene(first_position_of(number), watch, tally);
    Bytes bytes(scene.first->descriptor());
    const std::uint64_t corrupted_before = scene.first->stats().corrupted;
    const bool changed = damage(c, bytes.data(), random);
    if (!changed) {
      ++progress.unchanged;
      for (Peer* peer : {&scene.receiver, &scene.viewer, &scene.sender}) peer->finish(false);
      return;
    }
    const bool in_frame = fields_[c.field].kind == Field::Kind::Frame;
    if (in_frame) expect_caught(c, bytes, scene, corrupted_before, watch, progress);
    scene.receiver.exercise(kWaitNs);
    scene.viewer.exercise(0);
    scene.sender.exercise(0);
    newcomer(dup(scene.first->descriptor()), number, random, watch, tally, progress, true);
    scene.first.reset();
    for (Peer* peer : {&scene.receiver, &scene.viewer, &scene.sender}) {
      peer->finish(true);
      peer->close();
    }
  }

  /// Damage between the start of a queued message's frame and its end is found by its checksums, and counted.
  void expect_caught(const Case& c, Bytes& bytes, Scene& scene, std::uint64_t before, CallWatch& watch,
                     Progress& progress) {
    std::uint32_t s = 0;
    while (fields_[c.field].offset !=
           geometry_.arena_offset + s * geometry_.stride_bytes + memory::frame_shift(geometry_, s)) {
      ++s;
    }
    const std::uint64_t slot = geometry_.slots_offset + s * sizeof(memory::SlotState);
    const slots::SlotWord word{bytes.word(slot)};
    const std::uint64_t who = bytes.word(slot + 16) & 0xFFFF;
    const bool queued = word.is(slots::SlotPhase::Committed) && (word.pending() & 1) != 0 &&
                        (who == slots::Claim::kNobody || who == slots::Claim::kRedeliver);
    const std::uint32_t at = static_cast<std::uint32_t>(c.byte);
    std::uint64_t payload_bytes = 0;
    std::uint32_t meta_bytes = 0;
    const bool in_lengths = (at >= 8 && at < 16) || (at >= 40 && at < 44);
    std::memcpy(&payload_bytes, bytes.data() + fields_[c.field].offset + 8, 8);
    std::memcpy(&meta_bytes, bytes.data() + fields_[c.field].offset + 40, 4);
    const std::uint64_t payload = (64 + std::uint64_t{meta_bytes} + 63) & ~std::uint64_t{63};
    const bool covered =
        at < 64 || (!in_lengths && at < 64 + meta_bytes) || (at >= payload && at < payload + payload_bytes);
    if (!queued || !covered) return;
    Tally tally;
    for (std::uint32_t i = 0; i < kSlots && tally.corrupted == 0; ++i) {
      Peer reader(scene.first, watch, tally, 9);
      reader.recv(0, Peer::Then::Release);
    }
    watch.expect(tally.corrupted == 1, "a damaged frame was not found");
    watch.expect(scene.first->stats().corrupted == before + 1, "a damaged frame was not counted");
    ++progress.frames_caught;
  }

  void run_dead(const Case& c, std::uint64_t number, Random& random, CallWatch& watch, Tally& tally,
                Progress& progress) {
    progress.call.store("making the scene");
    auto& source = c.setting == Setting::Dead ? ruins_ : reboots_;
    std::vector<unsigned char> bytes = source[number % 2];
    if (!damage(c, bytes.data(), random)) {
      ++progress.unchanged;
      return;
    }
    const int fd = memfd_of(bytes);
    newcomer(dup(fd), number, random, watch, tally, progress, true);
    newcomer(fd, number, random, watch, tally, progress, true);
  }

  Options options_;
  memory::Geometry geometry_{};
  std::vector<Field> fields_;
  std::vector<Case> cases_;
  std::vector<unsigned char> ruins_[2];
  std::vector<unsigned char> reboots_[2];
};

class Runner {
 public:
  Runner(Sweep& sweep, Report& report, std::uint64_t jobs) : sweep_(sweep), report_(report) {
    for (std::uint64_t i = 0; i < jobs; ++i) {
      void* page = mmap(nullptr, sizeof(Progress), PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
      if (page == MAP_FAILED) std::abort();
      jobs_.push_back({static_cast<Progress*>(page), 0, i});
    }
  }

  void run(std::uint64_t most_failures) {
    const std::uint64_t count = sweep_.cases().size();
    for (;;) {
      bool any = false;
      for (Job& job : jobs_) {
        if (job.child == 0 && job.next < count && report_.failed() < most_failures) start(job);
        if (job.child == 0) continue;
        any = true;
        look_after(job);
      }
      if (!any) break;
      sleep_ns(2'000'000);
    }
    for (Job& job : jobs_) add(*job.progress);
  }

 private:
  struct Job {
    Progress* progress;
    pid_t child;
    std::uint64_t next;
  };

  void start(Job& job) {
    const std::uint64_t stride = jobs_.size();
    const std::uint64_t count = sweep_.cases().size();
    job.progress->failure[0] = 0;
    job.progress->started_ns.store(base::monotonic_ns());
    job.progress->running.store(job.next);
    job.child = start_child([&] {
      std::uint64_t number = job.next;
      for (std::uint64_t i = 0; i < kCasesPerChild && number < count; ++i, number += stride) {
        sweep_.run(number, *job.progress);
        if (job.progress->failure[0] != 0) return 1;
      }
      return 0;
    });
  }

  void look_after(Job& job) {
    int status = 0;
    if (waitpid(job.child, &status, WNOHANG) == 0) {
      if (base::monotonic_ns() - job.progress->started_ns.load() < kWatchdogNs) return;
      kill(job.child, SIGKILL);
      waitpid(job.child, &status, 0);
      judge(job, std::string("hangs in: ") + job.progress->call.load());
    } else if (WIFSIGNALED(status) || WEXITSTATUS(status) > 1) {
      judge(job, describe_status(status) + " in: " + job.progress->call.load());
    } else if (WEXITSTATUS(status) == 1) {
      judge(job, job.progress->failure);
    }
    job.child = 0;
    job.next = job.progress->running.load() + jobs_.size();
  }

  /// A machine under load makes a call late now and then: only what happens again is a failure.
  void judge(Job& job, const std::string& what) {
    const std::uint64_t number = job.progress->running.load();
    int again = 0;
    const int tries = 2;
    for (int i = 0; i < tries; ++i) {
      Progress* progress = job.progress;
      progress->failure[0] = 0;
      const pid_t child = start_child([&] {
        sweep_.run(number, *progress);
        return progress->failure[0] != 0 ? 1 : 0;
      });
      again += wait_child(child, kWatchdogNs / 1e9) != 0;
    }
    if (again == tries) {
      report_.fail("case " + std::to_string(number) + " (" + sweep_.describe(sweep_.cases()[number]) +
                   "): " + what);
    } else {
      ++report_["not seen again"];
    }
    job.progress->running.store(number);
  }

  void add(const Progress& progress) {
    report_["cases"] += progress.done.load();
    report_["damages without effect"] += progress.unchanged;
    report_["calls"] += progress.calls;
    report_["messages sent"] += progress.sent;
    report_["messages delivered"] += progress.delivered;
    report_["dead letters taken"] += progress.letters;
    report_["looks at the history"] += progress.latest;
    report_["corrupted messages found"] += progress.corrupted;
    report_["damaged frames caught"] += progress.frames_caught;
    report_["attaches refused"] += progress.refused;
    report_["typed errors"] += progress.errors;
    report_["timeouts"] += progress.timeouts;
    report_["latest call, microseconds"] =
        std::max(report_["latest call, microseconds"], static_cast<std::uint64_t>(progress.latest_ns / 1000));
  }

  Sweep& sweep_;
  Report& report_;
  std::vector<Job> jobs_;
};

int run(const Options& options) {
  Report report("corruption", options);
  Sweep sweep(options);
  const std::uint64_t one = options.number("case", ~std::uint64_t{0});
  if (one < sweep.cases().size()) {  // alone, in this process, for a debugger
    Progress progress{};
    sweep.run(one, progress);
    std::printf("case %llu (%s): %s\n", static_cast<unsigned long long>(one),
                sweep.describe(sweep.cases()[one]).c_str(), progress.failure[0] ? progress.failure : "good");
    return progress.failure[0] != 0;
  }
  Runner runner(sweep, report, options.number("jobs", 2));
  runner.run(options.number("failures", 100));
  if (options.only.empty()) {
    report.expect_at_least("cases", sweep.cases().size() * 99 / 100);
    report.expect_at_least("cases", 20'000);
    report.expect_at_least("damaged frames caught", 500);
    report.expect_at_least("attaches refused", 500);
    report.expect_at_least("messages delivered", 50'000);
    report.expect_at_least("dead letters taken", 1000);
    report.expect_at_least("looks at the history", 1000);
  }
  return report.finish();
}

}  // namespace
}  // namespace dsline::robust

int main(int argc, char** argv) { return dsline::robust::run(dsline::robust::parse_options(argc, argv, 0)); }
