#include "simulation.hpp"

#include <bit>
#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "liveness/participants.hpp"
#include "liveness/recovery.hpp"
#include "memory/storage.hpp"
#include "order/group.hpp"
#include "order/order_ring.hpp"
#include "slots/slot_pool.hpp"
#include "waiting/futex.hpp"

namespace dsline::model {
namespace {

using order::Cell;
using order::Group;
using order::Held;
using order::OrderRing;
using slots::Claim;
using slots::kNoSlot;
using slots::SlotPhase;
using slots::SlotPool;
using slots::SlotWord;

// Phases of a role.
constexpr std::uint8_t kIdle = 0;
constexpr std::uint8_t kHolding = 1;  // a loan, or a message
constexpr std::uint8_t kOutside = 8;  // not attached yet
constexpr std::uint8_t kGone = 9;

constexpr std::uint64_t kMostSharedBytes = 32 * 1024;
// More than any end needs: recovery, draining and a look at everything.
constexpr std::uint64_t kMostAlone = 50'000;

alignas(4096) std::byte shared[kMostSharedBytes];
// Addresses that stand for the kernel's locks.
constexpr std::uint64_t kLockWords = kMostSharedBytes - kMaxLocks * 8;

/// Shared bytes of this process whose kernel locks are the model's: the lock of a killed process is free.
class SimulatedStorage final : public memory::Storage {
 public:
  memory::StorageKind kind() const noexcept override { return memory::StorageKind::Memfd; }
  std::string describe() const override { return "simulated memory"; }
  std::uint64_t size() const override { return kLockWords; }
  void resize(std::uint64_t bytes) override {
    if (bytes > kLockWords) std::abort();
    std::memset(shared, 0, sizeof shared);
  }
  void check_room(std::uint64_t, const std::string&) const override {}
  void reserve_checked(std::uint64_t, std::uint64_t, const std::string&) override {}
  void give_back(std::uint64_t, std::uint64_t) noexcept override {}
  std::byte* map(std::uint64_t offset, std::uint64_t, memory::Access) override { return shared + offset; }
  void unmap(std::byte*, std::uint64_t) noexcept override {}

  bool try_lock(std::uint32_t byte) noexcept override {
    kernel_step(word(byte));
    std::uint8_t& owner = world.lock_owner[byte];
    const bool got = owner == 0 || owner == current + 1;
    if (got) {
      owner = static_cast<std::uint8_t>(current + 1);
      kernel_changed(word(byte));
    }
    if (is_tracing()) trace_line("  lock " + std::to_string(byte) + (got ? " taken" : " is another's"));
    return got;
  }
  void unlock(std::uint32_t byte) noexcept override {
    kernel_step(word(byte));
    if (world.lock_owner[byte] != current + 1) return;
    world.lock_owner[byte] = 0;
    kernel_changed(word(byte));
    if (is_tracing()) trace_line("  lock " + std::to_string(byte) + " dropped");
  }
  bool is_locked(std::uint32_t byte) const noexcept override {
    kernel_step(word(byte));
    const std::uint8_t owner = world.lock_owner[byte];
    return owner != 0 && owner != current + 1;
  }
  void renew_locks() override {}
  void drop_locks() noexcept override {}
  int descriptor() const noexcept override { return -1; }

 private:
  static const void* word(std::uint32_t byte) noexcept { return shared + kLockWords + byte * 8; }
};

template <class T>
void ignore(const T& word) {
  ignore_word(&word, sizeof word);
}

}  // namespace

// --- the channel ---------------------------------------------------------------------------------------------------

Simulation::Simulation(const Setup& setup) : setup_(setup) {
  const std::uint32_t attached = static_cast<std::uint32_t>(setup.roles.size());
  memory::Geometry g =
      memory::plan_geometry(setup.slots, 8, 8, attached + 1 + setup.spare_numbers, setup.groups);
  g.order_cells = setup.cells;
  if (attached > kMaxProcesses || setup.slots > kMaxSlots || setup.groups > kMaxGroups) std::abort();
  const std::uint64_t first = setup.first_position;

  shared_begin = reinterpret_cast<std::uintptr_t>(shared);
  shared_bytes = sizeof shared;
  region_ = memory::Region::create(std::make_unique<SimulatedStorage>(), g, base::Checksum::None, first);
  SlotPool::initialise(*region_);
  OrderRing::initialise(*region_, first);
  for (std::uint32_t n = 0; n < setup.groups; ++n) {
    region_->group(n).cursor.store(first);
    region_->group(n).state.store(setup.active >> n & 1);
  }
  region_->header().active.store(setup.active);

  std::memset(static_cast<void*>(&world), 0, sizeof world);
  int message = 1;
  for (std::uint32_t p = 0; p < attached; ++p) {
    const Role& role = setup.roles[p];
    Process& process = world.process[p];
    process.alive = 1;
    process.left = static_cast<std::uint8_t>(role.nacks);
    first_message_[p] = message;
    if (role.kind == Kind::Producer) message += role.messages;
    if (role.succeeds) {
      process.phase = kOutside;
      continue;
    }
    current = static_cast<int>(p);
    process.number = static_cast<std::uint8_t>(liveness::Participants(*region_).try_join() + 1);
  }
  messages_ = message - 1;
  if (messages_ >= kMaxMessages) std::abort();  // the surgeon sends one more
  world.kills_left = static_cast<std::uint8_t>(setup.kills);

  memory::RegionHeader& header = region_->header();
  std::byte* control = reinterpret_cast<std::byte*>(&header);
  add_range(&header.active, sizeof(std::uint64_t));
  add_range(&header.space, sizeof header.space);
  add_range(control + g.participants_offset, g.arena_offset - g.participants_offset);
  ignore(header.dropped_newest);
  ignore(header.recovered);
  ignore(header.corrupted);
  for (std::uint32_t i = 0; i < g.participants; ++i) {
    memory::ParticipantState& entry = region_->participant(i);
    ignore(entry.pid);
    ignore(entry.start_time);
    ignore(entry.joined_ns);
    ignore(entry.waiting_on);
  }
  for (std::uint32_t n = 0; n < g.groups; ++n) {
    ignore(region_->group(n).redelivered);
    ignore(region_->group(n).dropped_oldest);
  }

  places_.resize(kMostSharedBytes / 8);
  auto place = [this](const void* at, Word kind, std::uint32_t slot, std::uint32_t group) {
    places_[static_cast<std::size_t>(static_cast<const std::byte*>(at) - shared) / 8] =
        Place{kind, static_cast<std::uint8_t>(slot), static_cast<std::uint8_t>(group)};
  };
  for (std::uint32_t s = 0; s < g.slots; ++s) {
    place(&region_->slot(s).word, Word::Slot, s, 0);
    for (std::uint32_t n = 0; n < g.groups; ++n) place(&region_->claim(s, n), Word::Claim, s, n);
  }
  for (std::uint32_t k = 0; k < g.order_cells; ++k) place(&region_->cell(k), Word::Cell, k, 0);
  for (std::uint32_t i = 0; i < g.participants; ++i) place(&region_->participant(i).word, Word::Entry, i, 0);
  place(&region_->order().tail, Word::Tail, 0, 0);
}

std::string Simulation::describe(const void* at) const {
  const std::size_t offset = static_cast<std::size_t>(static_cast<const std::byte*>(at) - shared);
  const Place& place = places_[offset / 8];
  const memory::Geometry& g = region_->geometry();
  if (place.kind == Word::Slot) return "word[" + std::to_string(place.slot) + "]";
  if (place.kind == Word::Claim)
    return "claim[" + std::to_string(place.slot) + "][" + std::to_string(place.group) + "]";
  if (place.kind == Word::Cell) return "cell[" + std::to_string(place.slot) + "]";
  for (std::uint32_t s = 0; s < g.slots; ++s) {
    if (at == &region_->slot(s).position) return "position[" + std::to_string(s) + "]";
  }
  for (std::uint32_t n = 0; n < g.groups; ++n) {
    const memory::GroupState& group = region_->group(n);
    const std::string suffix = "[" + std::to_string(n) + "]";
    if (at == &group.cursor) return "cursor" + suffix;
    if (at == &group.redeliver) return "redeliver" + suffix;
    if (at == &group.state) return "group state" + suffix;
    if (at == &group.messages.sequence) return "message sequence" + suffix;
    if (at >= &group.messages && at < &group.messages + 1) return "message waiters" + suffix;
  }
  for (std::uint32_t i = 0; i < g.participants; ++i) {
    const memory::ParticipantState& entry = region_->participant(i);
    if (at == &entry.word) return "entry[" + std::to_string(i) + "]";
    if (at == &entry.group) return "entry group[" + std::to_string(i) + "]";
  }
  const memory::RegionHeader& header = region_->header();
  if (at == &region_->order().tail) return "tail";
  if (at == &header.active) return "active";
  if (at == &header.space.sequence) return "space sequence";
  if (at >= &header.space && at < &header.space + 1) return "space waiters";
  if (at == &region_->free_map(0)) return "free map";
  return "+" + std::to_string(offset);
}

std::string Simulation::name_of(int p) const {
  if (p == kSurgeon) return "surgeon";
  static const char* const kNames[] = {"producer", "consumer", "recoverer"};
  return std::string(kNames[static_cast<int>(setup_.roles[static_cast<std::size_t>(p)].kind)]) +
         std::to_string(p);
}

// --- the ledger ----------------------------------------------------------------------------------------------------

int Simulation::process_of(std::uint32_t participant) const {
  for (int p = 0; p < kAllProcesses; ++p) {
    if (world.process[p].number == participant + 1 && world.process[p].alive != 0) return p;
  }
  for (int p = 0; p < kAllProcesses; ++p) {
    if (world.process[p].number == participant + 1) return p;
  }
  return -1;
}

void Simulation::on_write(const void* at, std::uint64_t before, std::uint64_t after) {
  const Place& place = places_[static_cast<std::size_t>(static_cast<const std::byte*>(at) - shared) / 8];
  switch (place.kind) {
    case Word::Slot:
      return on_slot_word(place.slot, before, after);
    case Word::Claim:
      return on_claim(place.slot, place.group, before, after);
    case Word::Cell:
      return on_cell(before, after);
    case Word::Entry:
      // Recovered: the number may be given to another.
      if (liveness::EntryWord{after}.state() == liveness::EntryState::Free) {
        for (Process& process : world.process) {
          if (process.alive == 0 && process.number == place.slot + 1) process.number = 0;
        }
      }
      return;
    case Word::Tail:
      return on_tail(after);
    case Word::Other:
      return;
  }
}

void Simulation::on_tail(std::uint64_t tail) {
  std::uint64_t last = tail - 1;
  if ((last & slots::kPositionMask) == slots::kNoPositionLow) --last;
  if (Cell{region_->cell(last).load()}.ahead_of(last) < 0) violate("N1: the hint of the tail is beyond it");
}

void Simulation::on_bit_cleared(std::uint32_t s, std::uint32_t g, int message) {
  Ledger& ledger = world.ledger;
  Status& status = ledger.status[message][g];
  const Claim claim{region_->claim(s, g).load()};
  static_cast<void>(claim);
  const bool mine = ledger.holder[message][g] == current + 1;
  if (!mine || (status != Status::Held && status != Status::Discarding)) {
    return violate("N2: a pending bit is cleared by one who does not hold the message");
  }
  status = status == Status::Held ? Status::Done : Status::Dropped;
  ledger.holder[message][g] = 0;
}

void Simulation::on_slot_word(std::uint32_t s, std::uint64_t before_bits, std::uint64_t after_bits) {
  const SlotWord before{before_bits}, after{after_bits};
  Ledger& ledger = world.ledger;
  const int message = ledger.content[s];
  if (after.is(SlotPhase::Writing)) {
    if (!before.is_free()) violate("N3: a slot in use is allocated");
    for (std::uint32_t g = 0; message != 0 && g < setup_.groups; ++g) {
      const Status status = ledger.status[message][g];
      if (status == Status::Held && is_alive(ledger.holder[message][g] - 1))
        violate("N3: a slot is allocated while a living holder reads it");
      if (status != Status::NotEntitled && status != Status::Done && status != Status::Dropped)
        violate("N1: a slot is allocated before its message was delivered");
    }
    ledger.content[s] = 0;
    return;
  }
  if (before.is(SlotPhase::Writing)) {
    const int owner = process_of(before.owner());
    if (owner != current && owner >= 0 && is_alive(owner))
      violate("N3: a slot is taken away from its living writer");
    if (!after.is(SlotPhase::Committed)) return;
    if (message == 0) return violate("N3: a half written message is committed");
    ledger.committed[message] = 1;
    for (std::uint32_t g = 0; g < setup_.groups; ++g) {
      if ((after.pending() >> g & 1) != 0) ledger.status[message][g] = Status::Waiting;
    }
    return;
  }
  if (!before.is(SlotPhase::Committed)) return;
  if (!after.is(SlotPhase::Committed)) return violate("N3: a committed word changes its state");
  const std::uint32_t cleared = before.pending() & ~after.pending();
  const std::uint32_t set = after.pending() & ~before.pending();
  if ((cleared & slots::kEnqueueing) != 0) {
    const int owner = process_of(before.owner());
    if (owner != current && owner >= 0 && is_alive(owner))
      violate("N1: ENQ is cleared under a living publisher");
  }
  for (std::uint32_t g = 0; g < setup_.groups; ++g) {
    if ((cleared >> g & 1) != 0) on_bit_cleared(s, g, message);
    if ((set >> g & 1) != 0) {
      if (before.pending() == 0) violate("N4: a pending bit is set on a free slot");
      if (ledger.status[message][g] != Status::NotEntitled) violate("N2: a group gets a message twice");
      ledger.status[message][g] = Status::Waiting;
    }
  }
}

void Simulation::on_claim(std::uint32_t s, std::uint32_t g, std::uint64_t before_bits,
                          std::uint64_t after_bits) {
  const Claim before{before_bits}, after{after_bits};
  const SlotWord word{region_->slot(s).word.load()};
  Ledger& ledger = world.ledger;
  const int message = ledger.content[s];
  const bool pending = word.is(SlotPhase::Committed) && (word.pending() >> g & 1) != 0;
  Status& status = ledger.status[message][g];

  if (after.who() == Claim::kNobody) {
    if (pending && status != Status::Waiting) return violate("N2: the claim of a delivered message is overwritten");
    if (word.is_free()) violate("N3: the claim of a free slot is written");
    return;
  }
  if (!pending) {
    // A compare-and-swap that was late: harmless only if nobody believes that he holds it.
    return violate("N3: a message is claimed that is not there for the group");
  }
  if (message == 0) return violate("N3: a half written message is claimed");
  if (after.who() == Claim::kRedeliver) {
    const int holder = ledger.holder[message][g] - 1;
    if (status != Status::Held) return violate("N2: a message that nobody holds is given back");
    if (holder != current && is_alive(holder)) return violate("N2: a message is taken away from its living holder");
    if (after.attempts() != before.attempts() + 1) return violate("N2: a delivery is not counted");
    status = Status::Back;
    ledger.holder[message][g] = 0;
    ++ledger.backs[message][g];
    return;
  }
  if (after.who() != Claim::holder(number(current))) return violate("N2: a message is claimed for somebody else");
  if (status == Status::Held) {
    return violate(is_alive(ledger.holder[message][g] - 1) ? "N2: two living holders"
                                                            : "N2: taken again without a flag");
  }
  if (status == Status::Waiting && after.attempts() != 0) return violate("N2: a first delivery is flagged");
  if (status == Status::Back && after.attempts() != ledger.backs[message][g])
    return violate("N2: a wrong number of attempts");
  if (status != Status::Waiting && status != Status::Back) return violate("N2: delivered again after its release");
  status = Status::Held;
  ledger.holder[message][g] = static_cast<std::uint8_t>(current + 1);
}

void Simulation::on_cell(std::uint64_t before_bits, std::uint64_t after_bits) {
  const Cell before{before_bits}, after{after_bits};
  Ledger& ledger = world.ledger;
  const std::uint32_t old = before.slot();
  const SlotWord word{region_->slot(old).word.load()};
  if (word.is(SlotPhase::Committed) &&
      (region_->slot(old).position.load() & slots::kPositionMask) == before.position_low()) {
    const std::uint64_t active = region_->header().active.load();
    for (std::uint32_t g = 0; g < setup_.groups; ++g) {
      const Claim claim{region_->claim(old, g).load()};
      if ((word.pending() >> g & 1) != 0 && (active >> g & 1) != 0 && claim.who() == Claim::kNobody &&
          claim.position_low() == before.position_low() && (word.pending() & slots::kEnqueueing) == 0)
        violate("N5: a cell is overwritten that a group needs");
    }
  }
  const int message = ledger.content[after.slot()];
  const SlotWord entered{region_->slot(after.slot()).word.load()};
  if (!entered.is(SlotPhase::Committed) || message == 0) return violate("N3: a message enters that is not committed");
  if (ledger.entered[message] != 0) violate("N2: a message enters the order twice");
  ledger.entered[message] = 1;
}

// --- the roles -----------------------------------------------------------------------------------------------------

bool Simulation::anybody_to_bury() const {
  for (int p = 0; p < processes(); ++p) {
    const Process& process = world.process[p];
    if (process.alive == 0 && process.number != 0) return true;
  }
  return false;
}

void Simulation::on_death(int) {}

int Simulation::choices(int p) const {
  const Process& process = world.process[p];
  const Role& role = setup_.roles[static_cast<std::size_t>(p)];
  if (process.phase == kGone) return 0;
  if (process.phase == kOutside) return anybody_to_bury() ? 1 : 0;
  switch (role.kind) {
    case Kind::Producer:
      return process.done < role.messages ? 1 : 0;
    case Kind::Consumer:
      if (process.phase == kHolding) return role.keeps ? 0 : process.left != 0 ? 2 : 1;
      return role.gives_up ? 2 : 1;
    case Kind::Recoverer:
      return anybody_to_bury() ? 1 : 0;
  }
  return 0;
}

void Simulation::run(int p, int choice) {
  if (world.process[p].phase == kOutside) return join(p);
  switch (setup_.roles[static_cast<std::size_t>(p)].kind) {
    case Kind::Producer:
      return produce(p);
    case Kind::Consumer:
      return consume(p, choice);
    case Kind::Recoverer:
      return recover(p);
  }
}

// As attaching does.
void Simulation::join(int p) {
  if (!region_->storage().try_lock(memory::kControlLock)) return;
  liveness::recover_the_dead(*region_, liveness::Participants::kNobody);
  const std::uint32_t me = liveness::Participants(*region_).try_join();
  if (me != liveness::Participants::kNobody) {
    world.process[p].number = static_cast<std::uint8_t>(me + 1);
    world.process[p].phase = kIdle;
    liveness::recover_leftovers(*region_, me);
  }
  region_->storage().unlock(memory::kControlLock);
}

// As Channel::Impl::wait() does, without the spinning before it.
void Simulation::sleep_for_message(int p, std::uint32_t number_of_group) {
  Group group(*region_, number_of_group);
  waiting::WaitPoint& point = group.messages();
  point.add(number(p));
  const std::uint32_t sequence = point.sequence();
  waiting::Wake wake = waiting::Wake::Woken;
  if (!group.anything_waiting()) wake = point.sleep(sequence, 0);
  point.remove(number(p));
  if (wake == waiting::Wake::TimedOut) end_slice(p);
}

void Simulation::sleep_for_space(int p) {
  SlotPool pool(*region_);
  waiting::WaitPoint& point = pool.space();
  point.add(number(p));
  const std::uint32_t sequence = point.sequence();
  waiting::Wake wake = waiting::Wake::Woken;
  if (!pool.anything_free() && !pool.anything_free_by_scan()) wake = point.sleep(sequence, 0);
  point.remove(number(p));
  if (wake == waiting::Wake::TimedOut) end_slice(p);
}

void Simulation::end_slice(int p) { liveness::recover_the_dead(*region_, number(p)); }

void Simulation::produce(int p) {
  Process& me = world.process[p];
  const Role& role = setup_.roles[static_cast<std::size_t>(p)];
  SlotPool pool(*region_);
  if (me.phase == kIdle) {
    std::uint32_t s = pool.try_alloc(number(p));
    if (s == kNoSlot) s = pool.try_alloc_by_scan(number(p));
    if (s == kNoSlot && role.sleeps) sleep_for_space(p);
    if (s == kNoSlot) return;
    me.word = region_->slot(s).word.load();
    me.slot = static_cast<std::uint8_t>(s + 1);
    me.phase = kHolding;
    return;
  }
  publish(p, me.slot - 1u, me.word, message_of(p, me.done));
  me.phase = kIdle;
  me.slot = 0;
  me.word = 0;
  ++me.done;
}

// As Channel::Impl::publish() does, behind the frame. The groups that it was for.
std::uint32_t Simulation::publish(int p, std::uint32_t s, std::uint64_t word, int message) {
  static_cast<void>(p);
  SlotPool pool(*region_);
  world.ledger.content[s] = static_cast<std::uint8_t>(message);
  const std::uint32_t groups =
      static_cast<std::uint32_t>(region_->header().active.load() & memory::kActiveGroupsMask);
  if (!pool.commit(s, SlotWord{word}, groups)) {
    violate("N3: a living writer has lost its slot");
    return 0;
  }
  if (groups != 0) {
    OrderRing ring(*region_);
    OrderRing::Entered entered = ring.enter(s, groups);
    pool.clear_pending(s, slots::kEnqueueing);
    ring.advance_tail(entered);
    for (std::uint32_t g = 0; g < setup_.groups; ++g) {
      if ((groups >> g & 1) != 0) Group(*region_, g).messages().wake_one_if_anyone();
    }
  }
  return groups;
}

bool Simulation::take(int p, std::uint32_t group) {
  Process& me = world.process[p];
  Held held{};
  if (!Group(*region_, group).try_take(number(p), held)) return false;
  const int message = world.ledger.content[held.slot];
  if (message == 0 || world.ledger.status[message][group] != Status::Held ||
      world.ledger.holder[message][group] != p + 1) {
    violate("N2: a message is handed out that was not claimed");
    return false;
  }
  if (held.attempts != world.ledger.backs[message][group]) violate("N2: the flag of a delivery is wrong");
  me.slot = static_cast<std::uint8_t>(held.slot + 1);
  me.position = held.position;
  me.attempts = static_cast<std::uint8_t>(held.attempts);
  me.group = static_cast<std::uint8_t>(group + 1);
  me.word = static_cast<std::uint64_t>(message);
  return true;
}

void Simulation::release(int p) {
  Process& me = world.process[p];
  if (world.ledger.content[me.slot - 1] != me.word) violate("N3: the payload changed under its holder");
  SlotPool(*region_).clear_pending(me.slot - 1u, 1u << (me.group - 1));
  me.slot = me.attempts = me.group = 0;
  me.position = me.word = 0;
}

void Simulation::consume(int p, int choice) {
  Process& me = world.process[p];
  const Role& role = setup_.roles[static_cast<std::size_t>(p)];
  const std::uint32_t group = static_cast<std::uint32_t>(role.group);
  if (me.phase == kIdle && choice == 1) {
    // Gives up: a wake-up that it may have got goes on to another.
    if (Group(*region_, group).anything_waiting()) Group(*region_, group).messages().wake_one_if_anyone();
    me.phase = kGone;
    return;
  }
  if (me.phase == kIdle) {
    if (take(p, group)) {
      me.phase = kHolding;
    } else if (role.sleeps) {
      sleep_for_message(p, group);
    }
    return;
  }
  if (choice == 0) {
    release(p);
  } else {
    --me.left;
    Group(*region_, group).give_back(Held{me.slot - 1u, me.position, me.attempts}, number(p));
    me.slot = me.attempts = me.group = 0;
    me.position = me.word = 0;
  }
  me.phase = role.goes && choice == 1 && me.left == 0 ? kGone : kIdle;
}

void Simulation::recover(int p) { liveness::recover_the_dead(*region_, number(p)); }

// --- the ends ------------------------------------------------------------------------------------------------------

void Simulation::drain(int p) {
  const std::uint64_t active = region_->header().active.load();
  for (std::uint32_t g = 0; g < setup_.groups; ++g) {
    if ((active >> g & 1) == 0) continue;
    while (!is_violated() && take(p, g)) release(p);
  }
}

void Simulation::check_everything_delivered(std::uint32_t groups) {
  for (int m = 1; m <= messages_; ++m) {
    if (world.ledger.committed[m] == 0) continue;
    for (std::uint32_t g = 0; g < setup_.groups; ++g) {
      if ((groups >> g & 1) == 0) continue;
      const Status status = world.ledger.status[m][g];
      if (status != Status::NotEntitled && status != Status::Done && status != Status::Dropped)
        violate("N1: a committed message is lost or stuck");
    }
  }
}

void Simulation::check_everything_free(int p) {
  SlotPool pool(*region_);
  for (std::uint32_t s = 0; s < setup_.slots; ++s) {
    if (!pool.word(s).is_free()) return violate("N4: a slot has leaked");
  }
  std::uint32_t taken[kMaxSlots];
  for (std::uint32_t n = 0; n < setup_.slots; ++n) {
    taken[n] = pool.try_alloc_by_scan(number(p));
    if (taken[n] == kNoSlot) return violate("N4: a free slot cannot be allocated");
  }
  for (std::uint32_t n = 0; n < setup_.slots; ++n) pool.abort(taken[n], pool.word(taken[n]));
}

// The channel still works, and the hint of the tail has not frozen.
void Simulation::check_sending(int p) {
  SlotPool pool(*region_);
  const std::uint32_t s = pool.try_alloc(number(p));
  if (s == kNoSlot) return violate("N4: the free map shows nothing though everything is free");
  const std::uint32_t groups = publish(p, s, pool.word(s).bits, messages_ + 1);
  if (is_violated() || groups == 0) return;
  const std::uint64_t position = region_->slot(s).position.load();
  if (region_->order().tail.load() != slots::next_position(position)) violate("N1: the hint of the tail has frozen");
  drain(p);
  for (std::uint32_t g = 0; g < setup_.groups; ++g) {
    if ((groups >> g & 1) != 0 && world.ledger.status[messages_ + 1][g] != Status::Done)
      violate("N1: a message sent after the recovery does not arrive");
  }
}

void Simulation::check_after_all_died() {
  for (int p = 0; p < processes(); ++p) {
    const std::uint8_t number = world.process[p].number;
    world.process[p] = Process{};
    world.process[p].number = number;
  }
  std::memset(world.lock_owner, 0, sizeof world.lock_owner);
  world.process[kSurgeon].alive = 1;
  auto work = [](void* self) {
    Simulation& sim = *static_cast<Simulation*>(self);
    memory::Region& region = *sim.region_;
    liveness::recover_the_dead(region, liveness::Participants::kNobody);
    const std::uint32_t me = liveness::Participants(region).try_join();
    if (me == liveness::Participants::kNobody) return violate("N4: no participant number is free");
    world.process[kSurgeon].number = static_cast<std::uint8_t>(me + 1);
    liveness::recover_leftovers(region, me);
    sim.drain(kSurgeon);
    sim.check_everything_delivered(~0u);
    sim.check_everything_free(kSurgeon);
    if (!is_violated()) sim.check_sending(kSurgeon);
  };
  if (!run_alone(kSurgeon, work, this, kMostAlone)) violate("recovery or draining goes on for ever");
}

// Every living process goes on alone, one operation after another, until nothing can change any more.
void Simulation::go_on_to_the_end() {
  struct Turn {
    Simulation* self;
    int p;
  };
  auto work = [](void* context) {
    Turn& turn = *static_cast<Turn*>(context);
    turn.self->run(turn.p, 0);
  };
  std::uint32_t served = 0;
  bool can_bury = false;
  for (int round = 0; round < 6 * (messages_ + 1); ++round) {
    for (int p = 0; p < processes() && !is_violated(); ++p) {
      const Role& role = setup_.roles[static_cast<std::size_t>(p)];
      const bool lets_go = role.keeps && world.process[p].phase == kHolding;
      if (!is_alive(p) || (choices(p) == 0 && !lets_go)) continue;
      if (role.kind == Kind::Consumer && world.process[p].phase != kOutside) served |= 1u << role.group;
      can_bury |= role.kind == Kind::Recoverer || role.sleeps;
      Turn turn{this, p};
      if (!run_alone(p, work, &turn, kMostAlone)) violate("an operation goes on for ever");
    }
  }
  if (is_violated() || (anybody_to_bury() && !can_bury)) return;
  check_everything_delivered(served);
  const std::uint32_t active = static_cast<std::uint32_t>(region_->header().active.load());
  if ((active & ~served & memory::kActiveGroupsMask) != 0) return;
  for (int p = 0; p < processes(); ++p) {
    const Role& role = setup_.roles[static_cast<std::size_t>(p)];
    if (role.kind == Kind::Producer && is_alive(p) && world.process[p].done < role.messages)
      violate("N4: a producer stands still though everything was taken");
  }
  for (std::uint32_t s = 0; s < setup_.slots; ++s) {
    if (!SlotPool(*region_).word(s).is_free()) violate("N4: a slot has leaked");
  }
}

void Simulation::check_at_rest() { go_on_to_the_end(); }

void Simulation::check_blocked() {
  if (!slices_end()) {
    // Nobody has died, so no wake-up may depend on the end of a slice.
    for (int p = 0; p < processes(); ++p) {
      const Role& role = setup_.roles[static_cast<std::size_t>(p)];
      if (world.process[p].asleep == 0) continue;
      if (role.kind == Kind::Producer && SlotPool(*region_).anything_free_by_scan())
        violate("a producer sleeps though a slot is free");
      if (role.kind == Kind::Consumer && Group(*region_, static_cast<std::uint32_t>(role.group)).anything_waiting())
        violate("a consumer sleeps though a message waits");
    }
  }
  // At the end of their slices they look again.
  for (Process& process : world.process) {
    process.stack_used = 0;
    process.asleep = process.woken = 0;
  }
  go_on_to_the_end();
}

bool Simulation::slices_end() const { return world.kills_left < setup_.kills; }

}  // namespace dsline::model
