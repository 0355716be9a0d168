#include "simulation.hpp"

#include <bit>
#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "delivery/publication.hpp"
#include "liveness/participants.hpp"
#include "liveness/recovery.hpp"
#include "memory/storage.hpp"
#include "order/group.hpp"
#include "order/order_ring.hpp"
#include "slots/slot_pool.hpp"
#include "waiting/futex.hpp"

namespace dsline::model {
namespace {

using delivery::Publication;
using liveness::Membership;
using liveness::Participants;
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
constexpr std::uint8_t kHolding = 1;    // a loan, or a message
constexpr std::uint8_t kHoldingOn = 2;  // has left its group, and holds a message of it
constexpr std::uint8_t kLeaving = 3;    // has left its group
constexpr std::uint8_t kOutside = 8;    // not attached yet
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
  std::uint64_t read_start(void*, std::uint64_t) const noexcept override { return 0; }
  bool sync() noexcept override { return true; }
  std::unique_ptr<memory::Storage> again() const override { return nullptr; }

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
  const std::uint32_t count = static_cast<std::uint32_t>(setup.roles.size());
  memory::Geometry g =
      memory::plan_geometry(setup.slots, 8, 8, count + 1 + setup.spare_numbers, setup.groups);
  if (setup.cells != 0) g.order_cells = setup.cells;
  if (count > kMaxProcesses || setup.slots > kMaxSlots || setup.groups > kMaxGroups) std::abort();
  const std::uint64_t first = setup.first_position;
  memory::Rules rules{};
  rules.history = setup.history;
  rules.max_deliveries = setup.max_deliveries;
  rules.dead_letters = setup.dead_letters;
  rules.default_group = setup.default_group ? 1 : 0;

  shared_begin = reinterpret_cast<std::uintptr_t>(shared);
  shared_bytes = sizeof shared;
  region_ = memory::Region::create(std::make_unique<SimulatedStorage>(), g, rules, first);
  pool_ = std::make_unique<SlotPool>(*region_);
  letters_ = std::make_unique<delivery::DeadLetters>(*region_, *pool_);
  SlotPool::initialise(*region_);
  OrderRing::initialise(*region_, first);
  for (std::uint32_t n = 0; n < setup.groups; ++n) region_->group(n).cursor.store(first);
  std::uint64_t active = rules.default_group;
  if (region_->keeps_history()) active |= std::uint64_t{1} << region_->retention_group();
  region_->header().active.store(active);

  std::memset(static_cast<void*>(&world), 0, sizeof world);
  int message = 1;
  for (std::uint32_t p = 0; p < count; ++p) {
    const Role& role = setup.roles[p];
    Process& process = world.process[p];
    process.alive = 1;
    process.left = static_cast<std::uint8_t>(role.nacks);
    first_message_[p] = message;
    if (role.kind == Kind::Producer) message += role.messages;
    process.phase = kOutside;
    current = static_cast<int>(p);
    if (!role.succeeds && !role.joins) join(current);
  }
  messages_ = message - 1;
  if (messages_ >= kMaxMessages) std::abort();  // the surgeon sends one more
  world.kills_left = static_cast<std::uint8_t>(setup.kills);

  memory::RegionHeader& header = region_->header();
  std::byte* control = reinterpret_cast<std::byte*>(&header);
  add_range(&header.active, sizeof(std::uint64_t));
  add_range(&header.space, sizeof header.space);
  add_range(control + g.participants_offset, g.notes_offset - g.participants_offset);
  ignore(header.dropped_newest);
  ignore(header.unheard);
  ignore(header.corrupted);
  ignore(header.deaths);
  ignore(header.buried);
  ignore(header.letters_dropped);
  ignore(header.death);
  ignore_word(control + g.notes_offset, g.arena_offset - g.notes_offset);
  for (std::uint32_t s = 0; s < g.slots; ++s) ignore(region_->slot(s).notes);
  for (std::uint32_t i = 0; i < g.participants; ++i) {
    memory::ParticipantState& entry = region_->participant(i);
    ignore(entry.pid);
    ignore(entry.start_time);
    ignore(entry.joined_ns);
    ignore(entry.waiting_on);
    ignore(entry.left_writing);
    ignore(entry.left_held);
  }
  for (std::uint32_t n = 0; n < g.groups; ++n) {
    count_modulo(&region_->group(n).redeliver, 0xF);  // raised, and three bits of how often
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
  for (std::uint32_t n = 0; n < g.groups; ++n) place(&region_->group(n).state, Word::Joined, 0, n);
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
    if (at == &group.joined) return "joined" + suffix;
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
  static const char* const kNames[] = {"producer", "consumer", "recoverer", "reader", "observer"};
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
    case Word::Joined:
      if (at == &region_->group(place.group).joined) on_joined(place.group);
      return;
    case Word::Other:
      return;
  }
}

void Simulation::on_tail(std::uint64_t tail) {
  std::uint64_t last = tail - 1;
  if ((last & slots::kPositionMask) == slots::kNoPositionLow) --last;
  if (Cell{region_->cell(last).load()}.ahead_of(last) < 0) violate("N1: the hint of the tail is beyond it");
}

// A number is given to a new group: what an old one had is history, unless a word still has its bit.
void Simulation::on_joined(std::uint32_t g) {
  Ledger& ledger = world.ledger;
  for (int m = 1; m <= messages_; ++m) {
    bool pending = false;
    for (std::uint32_t s = 0; s < setup_.slots; ++s) {
      const SlotWord word{region_->slot(s).word.load()};
      pending = pending ||
                (ledger.content[s] == m && word.is(SlotPhase::Committed) && (word.pending() >> g & 1) != 0);
    }
    if (pending) continue;
    ledger.status[m][g] = Status::NotEntitled;
    ledger.holder[m][g] = ledger.attempts[m][g] = 0;
  }
}

void Simulation::on_bit_cleared(std::uint32_t s, std::uint32_t g, int message) {
  static_cast<void>(s);
  Ledger& ledger = world.ledger;
  Status& status = ledger.status[message][g];
  const int holder = ledger.holder[message][g] - 1;
  const bool drops = (region_->group(g).state.load() & memory::kGroupDrops) != 0;
  const bool active = (region_->header().active.load() >> g & 1) != 0;
  if (status == Status::Held && holder == current) {
    status = Status::Done;
  } else if (status == Status::Discarding && (holder == current || !is_alive(holder))) {
    status = Status::Dropped;
    if (active && ledger.dropped[g] < 255) ++ledger.dropped[g];
  } else if (status == Status::Held && !is_alive(holder) && (drops || !active)) {
    status = Status::Dropped;
  } else {
    return violate("N2: a pending bit is cleared by one who does not hold the message");
  }
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
    for (int p = 0; p < processes(); ++p) {
      if (is_alive(p) && world.process[p].kept == s + 1)
        violate("N3: a slot is allocated while its living publisher looks at it");
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
    if (pending && status != Status::Waiting)
      return violate("N2: the claim of a delivered message is overwritten");
    return;
  }
  if (!pending) {
    // A compare-and-swap that was late: harmless only if nobody believes that he holds it.
    return violate("N3: a message is claimed that is not there for the group");
  }
  if (message == 0) return violate("N3: a half written message is claimed");
  std::uint8_t& attempts = ledger.attempts[message][g];
  std::uint8_t& holder = ledger.holder[message][g];
  if (after.position_low() != before.position_low()) return violate("N2: a claim changes its position");
  if (after.who() == Claim::kRedeliver || after.who() == Claim::kDead) {
    if (status == Status::Waiting && before.who() == Claim::kNobody && after.who() == Claim::kRedeliver &&
        after.attempts() == 0) {  // offered again because the cursor had passed it
      status = Status::Back;
      return;
    }
    if (status != Status::Held) return violate("N2: a message that nobody holds is given back");
    if (holder - 1 != current && is_alive(holder - 1))
      return violate("N2: a message is taken away from its living holder");
    const bool letter = before.attempts() >= setup_.max_deliveries;
    if (after.who() == Claim::kDead) {
      if (!letter) return violate("N2: a message that may still be delivered becomes a dead letter");
      status = Status::DeadLetter;
    } else {
      const bool counted =
          after.attempts() == before.attempts() + 1u || after.attempts() == Claim::kMaxAttempts;
      const bool unseen = holder - 1 == current && after.attempts() == before.attempts();
      const bool revived = holder - 1 == current && letter;
      if (!counted && !unseen && !revived) return violate("N2: a delivery is not counted");
      if (holder - 1 != current && (region_->group(g).state.load() & memory::kGroupDrops) != 0)
        return violate("N2: a group that drops gets a message again");
      status = Status::Back;
    }
    holder = 0;
    attempts = static_cast<std::uint8_t>(after.attempts());
    return;
  }
  const std::uint8_t me = world.process[current].number;
  const bool discards = after.who() >= Claim::kDiscard;
  if ((after.who() & ~Claim::kDiscard) != me) return violate("N2: a message is claimed for somebody else");
  if (status == Status::Held) {
    return violate(is_alive(holder - 1) ? "N2: two living holders" : "N2: taken again without a flag");
  }
  if (after.attempts() != attempts) {
    return violate(status == Status::Waiting ? "N2: a first delivery is flagged"
                                             : "N2: a wrong number of attempts");
  }
  const bool swept_again =
      status == Status::Discarding && !is_alive(holder - 1) && before.who() == Claim::kDiscard;
  if (status != Status::Waiting && status != Status::Back && status != Status::DeadLetter && !swept_again)
    return violate("N2: delivered again after its release");
  status = discards ? Status::Discarding : Status::Held;
  holder = static_cast<std::uint8_t>(current + 1);
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
          claim.position_low() == before.position_low() && !word.is_entering())
        violate("N5: a cell is overwritten that a group needs");
    }
  }
  const int message = ledger.content[after.slot()];
  const SlotWord entered{region_->slot(after.slot()).word.load()};
  if (!entered.is(SlotPhase::Committed) || message == 0)
    return violate("N3: a message enters that is not committed");
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
  const Role& role = this->role(p);
  if (process.phase == kGone) return 0;
  if (process.phase == kOutside) return !role.succeeds || anybody_to_bury() ? 1 : 0;
  switch (role.kind) {
    case Kind::Producer:
      return (process.phase == kHolding || process.done < role.messages ? 1 : 0) +
             (process.kept != 0 ? 1 : 0);
    case Kind::Consumer:
      if (process.phase == kHolding) return role.keeps ? 0 : process.left != 0 ? 2 : 1;
      return process.phase == kIdle && (role.gives_up || role.offers) ? 2 : 1;
    case Kind::Recoverer:
      return anybody_to_bury() ? 1 : 0;
    case Kind::Reader:
    case Kind::Observer:
      return 1;
  }
  return 0;
}

void Simulation::run(int p, int choice) {
  if (world.process[p].phase == kOutside) return join(p);
  switch (role(p).kind) {
    case Kind::Producer:
      return choice == 0 && world.process[p].kept != 0 ? end_view(p) : produce(p);
    case Kind::Consumer:
      return consume(p, choice);
    case Kind::Recoverer:
      liveness::recover_the_dead(*region_, number(p), false);
      return;
    case Kind::Reader:
      return read_letters(p);
    case Kind::Observer:
      return observe(p);
  }
}

// As attaching and subscribing do.
void Simulation::join(int p) {
  const Role& role = this->role(p);
  Process& me = world.process[p];
  if (!region_->storage().try_lock(memory::kControlLock)) return;
  liveness::recover_the_dead(*region_, Participants::kNobody, true);
  Participants participants(*region_);
  const std::uint32_t number = participants.try_join();
  if (number != Participants::kNobody) {
    me.number = static_cast<std::uint8_t>(number + 1);
    liveness::recover_leftovers(*region_, number);
    me.phase = kIdle;
    if (role.group == 0) {
      region_->participant(number).group.store(setup_.default_group ? 1 : 0);
      me.member = setup_.default_group ? 1 : 0;
    } else {
      Membership membership(*region_, *pool_);
      const std::string_view name(&role.group, 1);
      std::uint32_t group = membership.find(name);
      if (group != Membership::kNoGroup) {
        membership.enter(group, number);
      } else {
        group = membership.make(name, role.rules, role.start, number);
      }
      if (group == Membership::kNoGroup) {
        participants.leave(number);  // as the error that says so
        me.number = 0;
        me.phase = kGone;
      } else {
        me.member = static_cast<std::uint8_t>(group + 1);
        me.joined = static_cast<std::uint8_t>(region_->group(group).joined.load());
      }
    }
  }
  region_->storage().unlock(memory::kControlLock);
}

// As closing does: the membership ends at once, the participant when it holds nothing any more.
void Simulation::leave_group(int p) {
  if (!region_->storage().try_lock(memory::kControlLock)) return;
  Membership(*region_, *pool_).leave(number(p));
  region_->storage().unlock(memory::kControlLock);
  Process& me = world.process[p];
  me.member = me.joined = 0;
  me.phase = me.slot != 0 ? kHoldingOn : kLeaving;
}

void Simulation::leave(int p) {
  Process& me = world.process[p];
  if (!region_->storage().try_lock(memory::kControlLock)) return;
  pool_->space().remove(number(p));
  for (std::uint32_t g = 0; g < setup_.groups; ++g) Group(*region_, g).messages().remove(number(p));
  Participants(*region_).leave(number(p));
  region_->storage().unlock(memory::kControlLock);
  me.number = 0;
  const int rounds = me.left >> 4;
  me.phase = rounds < role(p).returns ? kOutside : kGone;
  me.left = static_cast<std::uint8_t>((me.left & 0xF) | (rounds + 1) << 4);
  me.done = 0;
}

// As Channel::Impl::may_receive().
bool Simulation::may_receive(int p) const {
  const Process& me = world.process[p];
  if (me.member == 1) return true;
  return me.member != 0 && region_->group(me.member - 1u).joined.load() == me.joined &&
         (region_->header().active.load() >> (me.member - 1) & 1) != 0;
}

// As Channel::Impl::tidy().
void Simulation::tidy(int p) {
  Membership membership(*region_, *pool_);
  if (!membership.anything_stale()) return;
  if (!region_->storage().try_lock(memory::kControlLock)) return;
  membership.remove_abandoned(Membership::kNoGroup, number(p));
  membership.sweep(number(p));
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

// The thread of channel/watcher.cpp: a watch that is armed, told of, and not armed again for a while.
void Simulation::observe(int p) {
  Process& me = world.process[p];
  Group group(*region_, 0);
  waiting::WaitPoint& point = group.messages();
  const bool is_armed = me.done < role(p).messages;
  if (is_armed) {
    point.add(number(p));
    me.phase = kHolding;
  }
  const std::uint32_t sequence = point.sequence();
  const bool is_ready = is_armed && group.anything_waiting() && group.anything_to_take();
  waiting::Wake wake = waiting::Wake::TimedOut;
  if (!is_ready) wake = point.sleep(sequence, 0);
  if (is_armed) point.remove(number(p));
  me.phase = kIdle;
  if (wake == waiting::Wake::Woken) group.pass_on();
  if (is_armed) {
    ++me.done;
  } else {
    me.phase = kGone;
  }
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

void Simulation::end_slice(int p) {
  liveness::recover_the_dead(*region_, number(p), false);
  if (world.process[p].member != 0) Group(*region_, world.process[p].member - 1u).offer_what_was_passed();
}

// As Channel::Impl::try_alloc() and take_slot_when_full() do.
std::uint32_t Simulation::alloc(int p) {
  std::uint32_t s = pool_->try_alloc(number(p));
  if (s != kNoSlot) return s;
  tidy(p);
  s = pool_->try_alloc_by_scan(number(p));
  Publication publication(*region_, *pool_);
  const std::uint32_t tries = 2 * setup_.slots;
  for (std::uint32_t i = 0; s == kNoSlot && i < tries && publication.drop_history(number(p)); ++i)
    s = pool_->try_alloc(number(p));
  if (!role(p).drops_oldest) return s;
  for (std::uint32_t i = 0; s == kNoSlot && i < tries && publication.drop_oldest(number(p)); ++i)
    s = pool_->try_alloc(number(p));
  return s;
}

bool Simulation::is_everything_held() const {
  for (std::uint32_t s = 0; s < setup_.slots; ++s) {
    bool held = pool_->word(s).is(SlotPhase::Writing) || pool_->word(s).is_kept();
    for (std::uint32_t g = 0; g < setup_.groups; ++g) {
      const Status status = world.ledger.status[world.ledger.content[s]][g];
      held = held || status == Status::Held || status == Status::DeadLetter;
    }
    if (!held) return false;
  }
  return true;
}

void Simulation::produce(int p) {
  Process& me = world.process[p];
  if (me.phase == kIdle) {
    const std::uint32_t s = alloc(p);
    if (s == kNoSlot && role(p).drops_oldest && runs_alone() && !anybody_to_bury() && !is_everything_held())
      violate("N4: a sender that drops the oldest finds no room though not everything is held");
    if (s == kNoSlot && role(p).sleeps) sleep_for_space(p);
    if (s == kNoSlot) return;
    me.word = region_->slot(s).word.load();
    me.slot = static_cast<std::uint8_t>(s + 1);
    me.phase = kHolding;
    return;
  }
  const bool keep = role(p).views && me.kept == 0;
  if (keep) {
    me.kept = me.slot;
    me.kept_message = static_cast<std::uint8_t>(message_of(p, me.done));
  }
  publish(p, me.slot - 1u, me.word, message_of(p, me.done), keep);
  me.phase = kIdle;
  me.slot = 0;
  me.word = 0;
  ++me.done;
}

// As Channel::Impl::end_keeping() does.
void Simulation::end_view(int p) {
  Process& me = world.process[p];
  const std::uint32_t s = me.kept - 1u;
  if (world.ledger.content[s] != me.kept_message) violate("N3: the payload changed under its publisher");
  const SlotWord word = pool_->word(s);
  if (word.owner() != number(p) || !word.is_kept())
    return violate("N3: a living publisher has lost its view");
  me.kept = me.kept_message = 0;
  Publication(*region_, *pool_).end_keeping(s, word);
}

// As Channel::Impl::publish() does, behind the frame. The groups that it was for.
std::uint32_t Simulation::publish(int p, std::uint32_t s, std::uint64_t word, int message, bool keep) {
  world.ledger.content[s] = static_cast<std::uint8_t>(message);
  const std::uint32_t groups =
      static_cast<std::uint32_t>(region_->header().active.load()) & region_->group_bits();
  if (!Publication(*region_, *pool_).publish(s, SlotWord{word}, groups, number(p), keep)) {
    violate("N3: a living writer has lost its slot");
    return 0;
  }
  if ((groups & ~static_cast<std::uint32_t>(region_->header().active.load())) != 0) tidy(p);
  return groups;
}

bool Simulation::take(int p, std::uint32_t number_of_group, Letters letters) {
  Process& me = world.process[p];
  Held held{};
  std::uint32_t group = number_of_group;
  if (letters == Letters::Yes) {
    if (!letters_->try_take_letter(number(p), held, group)) return false;
  } else {
    Group from(*region_, group);
    if (!letters_->try_take(from, number(p), held)) return false;
  }
  const int message = world.ledger.content[held.slot];
  if (message == 0 || world.ledger.status[message][group] != Status::Held ||
      world.ledger.holder[message][group] != p + 1) {
    violate("N2: a message is handed out that was not claimed");
    return false;
  }
  if (held.attempts != world.ledger.attempts[message][group]) violate("N2: the flag of a delivery is wrong");
  const bool is_letter = held.attempts >= setup_.max_deliveries;
  if (is_letter != (letters == Letters::Yes)) violate("N2: a message is delivered more often than it may");
  me.slot = static_cast<std::uint8_t>(held.slot + 1);
  me.position = held.position;
  me.attempts = static_cast<std::uint8_t>(held.attempts);
  me.group = static_cast<std::uint8_t>(group + 1);
  me.word = static_cast<std::uint64_t>(message);
  return true;
}

void Simulation::let_go(int p) {
  Process& me = world.process[p];
  me.slot = me.attempts = me.group = 0;
  me.position = me.word = 0;
}

void Simulation::release(int p) {
  Process& me = world.process[p];
  if (world.ledger.content[me.slot - 1] != me.word) violate("N3: the payload changed under its holder");
  const std::uint32_t s = me.slot - 1u, group = me.group - 1u;
  const SlotWord word = pool_->word(s);
  if (Group(*region_, group).claim(s).who() != Claim::holder(number(p)))
    return violate("N2: a living holder has lost its claim");
  pool_->clear_pending_of(s, word, 1u << group);
  let_go(p);
}

// As Channel::Impl::give_back().
void Simulation::give_back(int p, bool undelivered) {
  Process& me = world.process[p];
  const std::uint32_t group = me.group - 1u;
  if ((region_->header().active.load() >> group & 1) == 0) return release(p);
  Group from(*region_, group);
  const Held held{me.slot - 1u, me.position, me.attempts};
  if (me.attempts >= setup_.max_deliveries) {
    letters_->put_back(from, held, number(p));
  } else if (undelivered) {
    from.put_back(held, number(p));
  } else {
    from.give_back(held, number(p), 1);
  }
  let_go(p);
  if ((region_->header().active.load() >> group & 1) == 0) tidy(p);
}

void Simulation::consume(int p, int choice) {
  Process& me = world.process[p];
  const Role& role = this->role(p);
  const bool leaves = role.leaves_after >= 0 && me.done >= role.leaves_after;
  if (me.phase == kLeaving) return leave(p);
  if (me.phase == kHoldingOn) {
    release(p);
    me.phase = kLeaving;
    return;
  }
  if (me.phase == kIdle) {
    const std::uint32_t group = me.member - 1u;
    if (leaves) return leave_group(p);
    if (choice == 1 && role.offers) return Group(*region_, group).offer_what_was_passed();
    if (choice == 1) {
      // Gives up: a wake-up that it may have got goes on to another.
      Group(*region_, group).pass_on();
      me.phase = kGone;
      return;
    }
    if (!may_receive(p)) return violate("N1: a group ends under its living member");
    if (take(p, group, Letters::No)) {
      if (group != 0 && !may_receive(p)) return give_back(p, true);
      me.phase = kHolding;
    } else if (role.sleeps) {
      sleep_for_message(p, group);
    }
    return;
  }
  if (role.leaves_holding && me.done + 1 >= role.leaves_after) return leave_group(p);
  if (choice == 0) {
    release(p);
  } else {
    --me.left;
    give_back(p, false);
  }
  if (role.leaves_after >= 0) ++me.done;
  me.phase = role.goes && choice == 1 && (me.left & 0xF) == 0 ? kGone : kIdle;
}

void Simulation::read_letters(int p) {
  Process& me = world.process[p];
  if (me.phase == kIdle) {
    if (take(p, 0, Letters::Yes)) me.phase = kHolding;
    return;
  }
  me.phase = kIdle;
  if (!role(p).revives || me.done != 0) return release(p);
  me.done = 1;
  Group to(*region_, me.group - 1u);
  letters_->revive(to, Held{me.slot - 1u, me.position, me.attempts}, number(p));
  let_go(p);
}

// --- the ends ------------------------------------------------------------------------------------------------------

void Simulation::drain(int p) {
  const std::uint64_t active = region_->header().active.load();
  for (std::uint32_t g = 0; g < setup_.groups; ++g) {
    if ((active >> g & 1) == 0 || (region_->keeps_history() && g == region_->retention_group())) continue;
    while (!is_violated() && take(p, g, Letters::No)) release(p);
  }
  while (!is_violated() && take(p, 0, Letters::Yes)) release(p);
  Publication publication(*region_, *pool_);
  while (!is_violated() && publication.drop_history(number(p))) {
  }
}

void Simulation::check_everything_delivered(std::uint32_t groups) {
  for (int m = 1; m <= messages_; ++m) {
    if (world.ledger.committed[m] == 0) continue;
    for (std::uint32_t g = 0; g < setup_.groups; ++g) {
      if ((groups >> g & 1) == 0) continue;
      const Status status = world.ledger.status[m][g];
      if (status != Status::NotEntitled && status != Status::Done && status != Status::Dropped &&
          status != Status::DeadLetter)
        violate("N1: a committed message is lost or stuck");
    }
  }
}

void Simulation::check_everything_free(int p) {
  SlotPool& pool = *pool_;
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
  if (region_->order().tail.load() != slots::next_position(position))
    violate("N1: the hint of the tail has frozen");
  drain(p);
  for (std::uint32_t g = 0; g < setup_.groups; ++g) {
    const Status status = world.ledger.status[messages_ + 1][g];
    if ((groups >> g & 1) != 0 && status != Status::Done && status != Status::Dropped)
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
    region.storage().try_lock(memory::kControlLock);
    liveness::recover_the_dead(region, Participants::kNobody, true);
    const std::uint32_t me = Participants(region).try_join();
    if (me == Participants::kNobody) return violate("N4: no participant number is free");
    world.process[kSurgeon].number = static_cast<std::uint8_t>(me + 1);
    liveness::recover_leftovers(region, me);
    Membership membership(region, *sim.pool_);
    membership.remove_abandoned(Membership::kNoGroup, me);
    membership.sweep(me);
    region.storage().unlock(memory::kControlLock);
    if (membership.anything_stale()) return violate("N4: a group that is gone is not swept");
    sim.drain(kSurgeon);
    sim.check_everything_delivered(~0u);
    sim.check_everything_free(kSurgeon);
    if (!is_violated()) sim.check_sending(kSurgeon);
  };
  if (!run_alone(kSurgeon, work, this, kMostAlone)) violate("recovery or draining goes on for ever");
}

// A group that is not durable goes with its last member.
void Simulation::check_groups(std::uint32_t active) {
  for (std::uint32_t g = 1; g < setup_.groups; ++g) {
    if ((active >> g & 1) == 0 || (region_->group(g).state.load() & memory::kGroupDurable) != 0) continue;
    bool has_members = false;
    for (std::uint32_t i = 0; i < region_->geometry().participants; ++i) {
      has_members = has_members || (Participants(*region_).entry(i).state() == liveness::EntryState::Used &&
                                    region_->participant(i).group.load() == g + 1);
    }
    if (!has_members) violate("N4: a group without members stays");
  }
}

// As long as its rule says, while nobody died between publishing and cutting it.
void Simulation::check_history() {
  if (!region_->keeps_history() || slices_end()) return;
  std::uint32_t kept = 0;
  for (std::uint32_t s = 0; s < setup_.slots; ++s) {
    const SlotWord word = pool_->word(s);
    kept += word.is(SlotPhase::Committed) && (word.pending() >> region_->retention_group() & 1) != 0;
  }
  if (kept > setup_.history) violate("N4: the history is longer than its rule");
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
  std::uint32_t served = 0, listening = 0;
  bool can_bury = false;
  int sweeper = -1;
  for (int round = 0; round < 6 * (messages_ + 1); ++round) {
    served = 0;
    for (int p = 0; p < processes() && !is_violated(); ++p) {
      const Role& role = this->role(p);
      const bool lets_go = role.keeps && world.process[p].phase == kHolding;
      if (!is_alive(p)) continue;
      if (world.process[p].number != 0) sweeper = p;
      if (choices(p) == 0 && !lets_go) continue;
      can_bury |= role.kind == Kind::Recoverer || role.sleeps;
      Turn turn{this, p};
      if (!run_alone(p, work, &turn, kMostAlone)) violate("an operation goes on for ever");
      world.process[p].ticks = 0;
      if (role.kind == Kind::Consumer && world.process[p].member != 0 && choices(p) > 0)
        served |= 1u << (world.process[p].member - 1);
    }
  }
  if (is_violated() || sweeper < 0 || (anybody_to_bury() && !can_bury)) return;
  check_everything_delivered(served);
  if (is_violated()) return;
  listening = static_cast<std::uint32_t>(region_->header().active.load()) & region_->group_bits();
  if (region_->keeps_history()) listening &= ~(1u << region_->retention_group());
  if (anybody_to_bury()) return;
  check_groups(listening);
  if (is_violated() || (listening & ~served) != 0) return;
  check_history();
  for (int p = 0; p < processes(); ++p) {
    if (role(p).kind == Kind::Producer && is_alive(p) && choices(p) > 0)
      return violate("N4: a producer stands still though everything was taken");
  }
  Turn last{this, sweeper};
  run_alone(
      sweeper,
      [](void* context) {
        Turn& turn = *static_cast<Turn*>(context);
        turn.self->tidy(turn.p);
        while (!is_violated() && turn.self->take(turn.p, 0, Letters::Yes)) turn.self->release(turn.p);
        while (Publication(*turn.self->region_, *turn.self->pool_).drop_history(turn.self->number(turn.p))) {
        }
      },
      &last, kMostAlone);
  for (std::uint32_t s = 0; s < setup_.slots && !is_violated(); ++s) {
    if (!pool_->word(s).is_free()) violate("N4: a slot has leaked");
  }
}

void Simulation::check_at_rest() { go_on_to_the_end(); }

void Simulation::check_blocked() {
  if (!slices_end()) {
    // Nobody has died, so no wake-up may depend on the end of a slice.
    for (int p = 0; p < processes(); ++p) {
      const Role& role = this->role(p);
      if (world.process[p].asleep == 0) continue;
      if (role.kind == Kind::Producer && pool_->anything_free_by_scan())
        violate("a producer sleeps though a slot is free");
      if (role.kind == Kind::Consumer && Group(*region_, world.process[p].member - 1u).anything_waiting())
        violate("a consumer sleeps though a message waits");
      if (role.kind == Kind::Observer && world.process[p].phase == kHolding &&
          Group(*region_, 0).anything_waiting())
        violate("an armed watch sleeps though a message waits");
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
