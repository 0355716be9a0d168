#include "engine.hpp"

#include <setjmp.h>
#include <sys/mman.h>
#include <time.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>

#include "fiber.hpp"

namespace dsline::model {

std::uintptr_t shared_begin = 0;
std::size_t shared_bytes = 0;
World world;
Aside aside;
int current = 0;

namespace {

constexpr std::size_t kMostWords = 16 * 1024;
// An operation that makes so many accesses between two steps, or alone, spins for ever.
constexpr std::uint64_t kEndless = 100'000;

alignas(64) std::byte stacks[kMaxProcesses][kStackBytes];

struct WordClass {
  std::uint16_t users = 0;  // bit per process
  bool written = false;
  bool shared = false;  // used by two, written by one: an access is a step
  bool ignored = false;
  std::uint64_t tells = ~std::uint64_t{0};  // bits that make states different
};

struct Range {
  std::byte* begin;
  std::size_t bytes;
};

enum class Mode { Setup, Fibers, Alone };

Subject* subject = nullptr;
Bounds bounds;
std::vector<Range> ranges;
WordClass classes[kMostWords];
bool newly_shared = false;
Mode mode = Mode::Setup;
void* scheduler_sp = nullptr;
bool first_access_is_free = false;
int chosen = 0;
std::uint64_t accesses = 0;
std::uint64_t most_accesses = kEndless;
sigjmp_buf endless;
const char* broken = nullptr;
bool tracing = false;
bool others_changed = false;  // a step woke somebody
std::vector<std::string> trace;

std::byte* top_of(int p) noexcept { return stacks[p] + kStackBytes; }

std::uint32_t word_index(const void* at) noexcept {
  return static_cast<std::uint32_t>((reinterpret_cast<std::uintptr_t>(at) - shared_begin) / 4);
}

inline std::uint64_t mix(std::uint64_t a, std::uint64_t b) noexcept {
  unsigned __int128 product =
      static_cast<unsigned __int128>(a ^ 0x9E3779B97F4A7C15ull) * (b ^ 0xD1B54A32D192ED03ull);
  return static_cast<std::uint64_t>(product) ^ static_cast<std::uint64_t>(product >> 64);
}

std::uint64_t hash_bytes(const void* begin, std::size_t bytes, std::uint64_t seed) noexcept {
  const unsigned char* at = static_cast<const unsigned char*>(begin);
  std::uint64_t a = seed, b = seed ^ 0x8EBC6AF09C88C6E3ull;
  while (bytes >= 32) {
    std::uint64_t v[4];
    std::memcpy(v, at, 32);
    a = mix(a ^ v[0], v[1]);
    b = mix(b ^ v[2], v[3]);
    at += 32;
    bytes -= 32;
  }
  while (bytes >= 8) {
    std::uint64_t v;
    std::memcpy(&v, at, 8);
    a = mix(a ^ v, bytes);
    at += 8;
    bytes -= 8;
  }
  if (bytes != 0) {
    std::uint64_t v = 0;
    std::memcpy(&v, at, bytes);
    a = mix(a ^ v, bytes);
  }
  return mix(a, b);
}

[[gnu::noinline]] void switch_to_scheduler() noexcept {
  dsline_model_switch(&aside.sp[current], scheduler_sp);
}

void note_use(std::uint32_t i, bool wrote) noexcept {
  WordClass& c = classes[i];
  c.users = static_cast<std::uint16_t>(c.users | 1u << current);
  c.written |= wrote;
  if (!c.shared && c.written && (c.users & (c.users - 1)) != 0) {
    c.shared = true;
    newly_shared = true;
  }
}

void count_access() noexcept {
  if (++accesses <= most_accesses) return;
  if (mode == Mode::Alone) siglongjmp(endless, 1);
  violate("an operation goes on for ever");
  for (;;) switch_to_scheduler();
}

// The set of visited states: fingerprints of 64 bits in one open-addressed table.
class Visited {
 public:
  Visited() : table_(allocate(size_)) {}
  ~Visited() { munmap(table_, size_ * 8); }
  Visited(const Visited&) = delete;
  Visited& operator=(const Visited&) = delete;

  bool insert(std::uint64_t fingerprint) {
    if (fingerprint == 0) fingerprint = 1;
    if (count_ * 10 >= size_ * 7) grow();
    if (!put(table_, size_, fingerprint)) return false;
    ++count_;
    return true;
  }
  std::uint64_t count() const noexcept { return count_; }
  void clear() {
    std::memset(table_, 0, size_ * 8);
    count_ = 0;
  }

 private:
  static std::uint64_t* allocate(std::size_t size) {
    void* at = mmap(nullptr, size * 8, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (at == MAP_FAILED) {
      std::fprintf(stderr, "no memory for %zu states; bound them with --max-states\n", size);
      std::exit(3);
    }
    madvise(at, size * 8, MADV_HUGEPAGE);  // every look is at another place
    return static_cast<std::uint64_t*>(at);
  }
  static bool put(std::uint64_t* table, std::size_t size, std::uint64_t fingerprint) noexcept {
    for (std::size_t i = fingerprint & (size - 1);; i = (i + 1) & (size - 1)) {
      if (table[i] == fingerprint) return false;
      if (table[i] == 0) {
        table[i] = fingerprint;
        return true;
      }
    }
  }
  void grow() {
    std::uint64_t* larger = allocate(size_ * 2);
    for (std::size_t i = 0; i < size_; ++i) {
      if (table_[i] != 0) put(larger, size_ * 2, table_[i]);
    }
    munmap(table_, size_ * 8);
    table_ = larger;
    size_ *= 2;
  }

  std::size_t size_ = 1 << 16;
  std::uint64_t* table_;
  std::uint64_t count_ = 0;
};

std::size_t snapshot_bytes() noexcept {
  std::size_t bytes = sizeof world + sizeof aside;
  for (const Range& range : ranges) bytes += range.bytes;
  for (int p = 0; p < kMaxProcesses; ++p) bytes += world.process[p].stack_used;
  return bytes;
}

void save(std::byte* to) noexcept {
  auto put = [&to](const void* from, std::size_t bytes) {
    std::memcpy(to, from, bytes);
    to += bytes;
  };
  put(&world, sizeof world);
  put(&aside, sizeof aside);
  for (const Range& range : ranges) put(range.begin, range.bytes);
  for (int p = 0; p < kMaxProcesses; ++p) {
    const std::size_t used = world.process[p].stack_used;
    if (used != 0) put(top_of(p) - used, used);
  }
}

void restore(const std::byte* from) noexcept {
  auto get = [&from](void* to, std::size_t bytes) {
    std::memcpy(to, from, bytes);
    from += bytes;
  };
  get(&world, sizeof world);
  get(&aside, sizeof aside);
  for (const Range& range : ranges) get(range.begin, range.bytes);
  for (int p = 0; p < kMaxProcesses; ++p) {
    const std::size_t used = world.process[p].stack_used;
    if (used != 0) get(top_of(p) - used, used);
  }
}

// Brings the parts up to date that the last step may have changed: those of process `p`, or of all (-1).
void update_parts(int p) noexcept {
  for (int i = 0; i < subject->processes(); ++i) {
    if (p >= 0 && i != p && world.process[i].alive != 0) continue;  // the dead change when they are buried
    const std::size_t used = bounds.compare_stacks ? world.process[i].stack_used : 0;
    aside.inside[i] = hash_bytes(&world.process[i], sizeof(Process), static_cast<std::uint64_t>(i) + 1);
    if (used != 0) aside.inside[i] = hash_bytes(top_of(i) - used, used, aside.inside[i]);
  }
  if (p < 0 || aside.wrote[p] != 0 || bounds.preemptions >= 0)
    aside.rest = hash_bytes(&world.ledger, sizeof world - offsetof(World, ledger), 99);
}

std::uint64_t fingerprint() noexcept {
  std::uint64_t h = mix(aside.memory, aside.rest);
  for (int i = 0; i < subject->processes(); ++i) h = mix(h, aside.inside[i]);
  return h;
}

std::uint64_t fingerprint_of_the_dead() noexcept {
  std::uint8_t numbers[kMaxProcesses];
  for (int p = 0; p < kMaxProcesses; ++p) numbers[p] = world.process[p].number;
  return hash_bytes(&world.ledger, sizeof world.ledger, hash_bytes(numbers, sizeof numbers, aside.memory));
}

constexpr int kKill = 255;
constexpr int kPick = 254;   // a wake that has to choose goes to this sleeper
constexpr int kSlice = 253;  // a sleeper's slice runs out

struct Choice {
  std::uint8_t process;
  std::uint8_t what;
};

bool is_inside(int p) noexcept { return world.process[p].stack_used != 0; }
bool is_able(int p) noexcept {
  const Process& process = world.process[p];
  if (process.alive == 0) return false;
  if (!is_inside(p)) return subject->choices(p) > 0;
  return process.asleep == 0 || process.woken != 0;
}

// Every choice of this state.
int list_choices(Choice* out) {
  int n = 0;
  auto add = [&](int p, int what) {
    out[n++] = {static_cast<std::uint8_t>(p), static_cast<std::uint8_t>(what)};
  };
  const int count = subject->processes();
  if (world.wakes_to_do != 0) {
    for (int p = 0; p < count; ++p) {
      const Process& process = world.process[p];
      if (process.alive != 0 && process.asleep != 0 && process.woken == 0 &&
          process.sleeps_on == world.wakes_at)
        add(p, kPick);
    }
    return n;
  }
  // Interrupting one who could go on is what is bounded.
  int only = -1;
  if (bounds.preemptions >= 0 && world.last_run != 0 && world.preemptions_left == 0) {
    const int last = world.last_run - 1;
    if (is_inside(last) && is_able(last)) only = last;
  }
  bool anybody = false;
  for (int p = 0; p < count; ++p) {
    if (!is_able(p)) continue;
    anybody = true;
    if (only >= 0 && p != only) continue;
    const int ways = is_inside(p) ? 1 : subject->choices(p);
    for (int way = 0; way < ways; ++way) add(p, way);
  }
  if (!anybody && subject->slices_end()) {
    for (int p = 0; p < count; ++p) {
      if (world.process[p].alive != 0 && world.process[p].asleep != 0) add(p, kSlice);
    }
  }
  if (world.kills_left != 0) {
    for (int p = 0; p < count; ++p) {
      // After steps that changed nothing a death is the same as before them.
      if (world.process[p].alive != 0 && aside.wrote[p] != 0) add(p, kKill);
    }
  }
  return n;
}

void fiber_main() {
  subject->run(current, chosen);
  Process& process = world.process[current];
  process.stack_used = 0;
  process.history = 0;
  process.ticks = 0;
  for (;;) switch_to_scheduler();
}

void resume(int p) {
  Process& process = world.process[p];
  current = p;
  accesses = 0;
  mode = Mode::Fibers;
  dsline_model_switch(&scheduler_sp, aside.sp[p]);
  mode = Mode::Setup;
  // fiber_main() has cleared it when the operation is over.
  if (process.stack_used != 0)
    process.stack_used = static_cast<std::uint32_t>(top_of(p) - static_cast<std::byte*>(aside.sp[p]));
}

void step(int p, int what) {
  Process& process = world.process[p];
  if (what == kKill) {
    if (tracing) trace_line(subject->name_of(p) + " is killed");
    const std::uint8_t number = process.number;
    process = Process{};
    process.number = number;
    for (std::uint8_t& owner : world.lock_owner) {
      if (owner == p + 1) owner = 0;
    }
    --world.kills_left;
    if (world.last_run == p + 1) world.last_run = 0;
    subject->on_death(p);
    return;
  }
  if (what == kPick) {
    process.woken = 1;
    --world.wakes_to_do;
    if (world.wakes_to_do == 0) world.wakes_at = 0;
    if (tracing) trace_line("the kernel wakes " + subject->name_of(p));
    return;
  }
  if (what == kSlice) {
    if (tracing) trace_line("slice of " + subject->name_of(p) + " ends");
    process.woken = 2;
  }
  if (bounds.preemptions >= 0) {
    const int last = world.last_run - 1;
    if (last >= 0 && last != p && is_inside(last) && is_able(last)) --world.preemptions_left;
    world.last_run = static_cast<std::uint8_t>(p + 1);
  }
  aside.wrote[p] = 0;
  if (process.stack_used == 0) {
    if (tracing) trace_line(subject->name_of(p) + " begins, way " + std::to_string(what));
    aside.sp[p] = prepare_stack(top_of(p), fiber_main);
    process.stack_used = 1;
    if (!bounds.compare_stacks) process.history = mix(static_cast<std::uint64_t>(what), 7);
    chosen = what;
    first_access_is_free = true;
  }
  resume(p);
  first_access_is_free = false;
  if (bounds.preemptions >= 0 && !is_inside(p)) world.last_run = 0;
}

// Of this process, so that the bounds do not depend on what else the machine does.
double now_seconds() {
  timespec now{};
  clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &now);
  return static_cast<double>(now.tv_sec) + static_cast<double>(now.tv_nsec) * 1e-9;
}

struct Frame {
  std::size_t snapshot;
  std::uint8_t count;
  std::uint8_t next;
  Choice choices[46];
};

class Search {
 public:
  Result run() {
    initial_.resize(snapshot_bytes());
    save(initial_.data());
    const double start = now_seconds();
    std::uint64_t patience = 2000;
    Result result;
    for (;;) {
      newly_shared = false;
      result = once(start, patience);
      if (!newly_shared || !result.violation.empty() || result.cut) break;
      patience *= 4;
    }
    if (!result.violation.empty()) result.trace = replay();
    for (const WordClass& c : classes) result.shared_words += c.shared;
    result.seconds = now_seconds() - start;
    return result;
  }

 private:
  Result once(double start, std::uint64_t patience) {
    Result result;
    visited_.clear();
    left_behind_.clear();
    frames_.clear();
    snapshots_.clear();
    restore(initial_.data());
    update_parts(-1);
    visited_.insert(fingerprint());
    push(result);
    bool is_current = !checks(result);
    while (broken == nullptr && !frames_.empty()) {
      Frame& frame = frames_.back();
      if (frame.next == frame.count) {
        snapshots_.resize(frame.snapshot);
        frames_.pop_back();
        is_current = false;
        continue;
      }
      if (!is_current) restore(snapshots_.data() + frame.snapshot);
      const Choice choice = frame.choices[frame.next++];
      others_changed = false;
      step(choice.process, choice.what);
      update_parts(others_changed || choice.what >= kSlice ? -1 : choice.process);
      ++result.steps;
      if (choice.what == kKill) ++result.kills;
      if (broken != nullptr) break;
      is_current = false;
      if (!visited_.insert(fingerprint())) continue;
      if ((visited_.count() & 0xFFF) == 0) {
        if ((bounds.max_states != 0 && visited_.count() >= bounds.max_states) ||
            (bounds.max_seconds > 0 && now_seconds() - start > bounds.max_seconds)) {
          result.cut = true;
          break;
        }
      }
      if (newly_shared && visited_.count() > patience) break;
      push(result);
      is_current = !checks(result);
    }
    result.states = visited_.count();
    result.ends = left_behind_.count();
    if (broken != nullptr) result.violation = broken;
    return result;
  }

  void push(Result& result) {
    Frame frame;
    frame.snapshot = snapshots_.size();
    frame.next = 0;
    frame.count = static_cast<std::uint8_t>(list_choices(frame.choices));
    snapshots_.resize(frame.snapshot + snapshot_bytes());
    save(snapshots_.data() + frame.snapshot);
    frames_.push_back(frame);
    result.depth = std::max<std::uint64_t>(result.depth, frames_.size());
  }

  // True when they changed the state, which is saved on top of the stack.
  bool checks(Result& result) {
    bool rests = true, blocked = true;
    for (int p = 0; p < subject->processes(); ++p) {
      if (world.process[p].alive == 0) continue;
      if (is_inside(p)) rests = false;
      if (is_able(p)) blocked = false;
    }
    blocked = blocked && !rests;
    bool changed = false;
    auto begin = [&] {
      if (changed) restore(snapshots_.data() + frames_.back().snapshot);
      changed = true;
    };
    if (rests && broken == nullptr) {
      begin();
      ++result.checks_at_rest;
      subject->check_at_rest();
    }
    if (blocked && broken == nullptr) {
      begin();
      subject->check_blocked();
    }
    // What the dead leave is the shared memory: it is enough to look at each once.
    if (bounds.kill_everybody && broken == nullptr && left_behind_.insert(fingerprint_of_the_dead())) {
      begin();
      subject->check_after_all_died();
    }
    return changed;
  }

  std::vector<std::string> replay() {
    std::vector<Choice> path;
    for (const Frame& frame : frames_) {
      if (frame.next != 0) path.push_back(frame.choices[frame.next - 1]);
    }
    broken = nullptr;
    trace.clear();
    tracing = true;
    restore(initial_.data());
    for (const Choice& choice : path) {
      step(choice.process, choice.what);
      if (broken != nullptr) break;
    }
    if (broken == nullptr) {
      Result ignored;
      snapshots_.assign(snapshot_bytes(), std::byte{});
      save(snapshots_.data());
      frames_.assign(1, Frame{});
      trace_line("check");
      checks(ignored);
    }
    tracing = false;
    return trace;
  }

  std::vector<std::byte> initial_;
  std::vector<Frame> frames_;
  std::vector<std::byte> snapshots_;
  Visited visited_;
  Visited left_behind_;
};

}  // namespace

bool before_access(const void* at) noexcept {
  const std::uint32_t i = word_index(at);
  if (classes[i].ignored) return false;
  if (mode != Mode::Fibers) {
    if (mode == Mode::Alone) count_access();
    return true;
  }
  count_access();
  if (!classes[i].shared) return true;
  if (first_access_is_free) {
    first_access_is_free = false;
    return true;
  }
  switch_to_scheduler();
  return true;
}

void after_access(const void* at, std::uint64_t before, std::uint64_t after, bool wrote) noexcept {
  if (mode == Mode::Setup) return;
  note_use(word_index(at), wrote && before != after);  // a write that changes nothing is a load to the others
  if (mode == Mode::Fibers && !bounds.compare_stacks)
    world.process[current].history = mix(world.process[current].history, before + 0x51ull * wrote);
  if (tracing) {
    char text[160];
    if (wrote) {
      std::snprintf(text, sizeof text, "%s: %s %016llx -> %016llx", subject->name_of(current).c_str(),
                    subject->describe(at).c_str(), static_cast<unsigned long long>(before),
                    static_cast<unsigned long long>(after));
    } else {
      std::snprintf(text, sizeof text, "%s: %s is %016llx", subject->name_of(current).c_str(),
                    subject->describe(at).c_str(), static_cast<unsigned long long>(before));
    }
    trace_line(text);
  }
  if (!wrote || before == after) return;
  aside.wrote[current] = 1;
  const std::uint64_t where = word_index(at) * 0xA24BAED4963EE407ull;
  const std::uint64_t tells = classes[word_index(at)].tells;
  aside.memory ^= mix(before & tells, where) ^ mix(after & tells, where);
  const Mode outer = mode;
  mode = Mode::Setup;  // what the ledger looks at is no step
  subject->on_write(at, before, after);
  mode = outer;
}

void violate(const char* promise) noexcept {
  if (broken == nullptr) broken = promise;
  if (tracing) trace_line(std::string("VIOLATION ") + promise);
}
bool is_violated() noexcept { return broken != nullptr; }

void add_range(void* begin, std::size_t bytes) { ranges.push_back({static_cast<std::byte*>(begin), bytes}); }

void ignore_word(const void* at, std::size_t bytes) {
  for (std::size_t b = 0; b < bytes; b += 4)
    classes[word_index(static_cast<const std::byte*>(at) + b)].ignored = true;
}

void count_modulo(const void* at, std::uint64_t tells) { classes[word_index(at)].tells = tells; }

void kernel_step(const void* at) noexcept { before_access(at); }
void kernel_changed(const void* at) noexcept {
  if (mode == Mode::Setup) return;
  note_use(word_index(at), true);
  aside.wrote[current] = 1;
}

bool fall_asleep(const void* at) noexcept {
  if (mode != Mode::Fibers) return false;
  note_use(word_index(at), true);  // who sleeps is part of what the kernel keeps under the word
  Process& process = world.process[current];
  process.asleep = 1;
  process.woken = 0;
  process.sleeps_on = word_index(at);
  aside.wrote[current] = 1;
  if (tracing) trace_line(subject->name_of(current) + " sleeps on " + subject->describe(at));
  switch_to_scheduler();
  Process& again = world.process[current];
  const bool woken = again.woken == 1;
  again.asleep = again.woken = 0;
  again.sleeps_on = 0;
  return woken;
}

void wake_sleepers(const void* at, int count) noexcept {
  int sleepers = 0;
  const std::uint32_t on = word_index(at);
  if (mode != Mode::Setup) note_use(on, true);
  auto is_sleeper = [on](const Process& p) {
    return p.alive != 0 && p.asleep != 0 && p.woken == 0 && p.sleeps_on == on;
  };
  for (const Process& p : world.process) sleepers += is_sleeper(p);
  if (sleepers == 0) return;
  aside.wrote[current] = 1;
  others_changed = true;
  if (sleepers <= count) {
    for (Process& p : world.process) {
      if (is_sleeper(p)) p.woken = 1;
    }
    if (tracing) trace_line(subject->name_of(current) + " wakes all on " + subject->describe(at));
    return;
  }
  if (mode != Mode::Fibers) return;
  world.wakes_to_do = static_cast<std::uint8_t>(count);
  world.wakes_at = on;
  switch_to_scheduler();
}

bool runs_alone() noexcept { return mode == Mode::Alone; }

bool run_alone(int p, void (*work)(void*), void* context, std::uint64_t most) {
  const int before = current;
  const std::uint64_t most_before = most_accesses;
  const Mode mode_before = mode;
  current = p;
  accesses = 0;
  most_accesses = most;
  mode = Mode::Alone;
  bool ended = false;
  if (sigsetjmp(endless, 0) == 0) {
    work(context);
    ended = true;
  }
  mode = mode_before;
  most_accesses = most_before;
  current = before;
  return ended;
}

Result explore(Subject& what, const Bounds& limits) {
  subject = &what;
  bounds = limits;
  broken = nullptr;
  world.preemptions_left = static_cast<std::uint8_t>(std::max(0, limits.preemptions));
  for (int p = 0; p < what.processes(); ++p) aside.wrote[p] = 1;
  auto search = std::make_unique<Search>();
  return search->run();
}

std::int64_t look_at_clock() noexcept {
  if (mode == Mode::Fibers && subject->is_patient(current)) return 0;
  std::uint8_t& ticks = world.process[current].ticks;
  if (ticks < 3) ++ticks;
  return ticks * std::int64_t{1'000'000'000};
}

void trace_line(const std::string& text) { trace.push_back(text); }
bool is_tracing() noexcept { return tracing; }

}  // namespace dsline::model
