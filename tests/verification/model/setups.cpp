#include "simulation.hpp"
#include "slots/position.hpp"

namespace dsline::model {
namespace {

Role producer(int messages) { return {.kind = Kind::Producer, .messages = messages}; }
Role consumer(char group = 0, int nacks = 0) {
  return {.kind = Kind::Consumer, .group = group, .nacks = nacks};
}
Role recoverer() { return {.kind = Kind::Recoverer}; }

Role joining(Role role, liveness::JoinAt start = liveness::JoinAt::Next) {
  role.joins = true;
  role.start = start;
  return role;
}
Role leaving(Role role, int after, int returns = 0) {
  role.leaves_after = after;
  role.returns = returns;
  return role;
}
Role leaving_with_it(Role role, int after) {
  role.leaves_after = after;
  role.leaves_holding = true;
  return role;
}
Role with_rules(Role role, std::uint32_t rules) {
  role.rules = rules;
  return role;
}
Role patient(Role role) {
  role.patient = true;
  return role;
}
Role dropper(int messages) { return {.kind = Kind::Producer, .messages = messages, .drops_oldest = true}; }
Role reader(bool revives = false) { return {.kind = Kind::Reader, .revives = revives}; }
Role sleeping(Role role) {
  role.sleeps = true;
  return role;
}
Role impatient(Role role) {
  role.sleeps = role.gives_up = true;
  return role;
}
Role observer(int rounds) { return {.kind = Kind::Observer, .messages = rounds}; }
Role gives_back_and_goes() { return {.kind = Kind::Consumer, .nacks = 1, .goes = true}; }
Role offering(Role role) {
  role.offers = true;
  return role;
}
Role viewing(Role role) {
  role.views = true;
  return role;
}
Role keeper() { return {.kind = Kind::Consumer, .keeps = true}; }
Role successor(Role role) {
  role.succeeds = true;
  return role;
}

}  // namespace

const std::vector<Setup>& setups() {
  static const std::vector<Setup> list = {
      {.name = "one-to-one", .what = "1 producer x 2, 1 consumer", .roles = {producer(2), consumer()}},
      {.name = "two-consumers",
       .what = "1 producer x 2, 2 consumers",
       .roles = {producer(2), consumer(), consumer()}},
      {.name = "lap",
       .what = "2 producers, one of them laps the order, 1 consumer",
       .cells = 2,
       .is_long = true,
       .roles = {producer(1), producer(3), consumer()}},
      {.name = "lap-held",
       .what = "2 producers, one of them laps the order, 1 consumer, one that keeps a message",
       .cells = 2,
       .is_long = true,
       .roles = {producer(1), producer(3), consumer(), keeper()}},
      {.name = "sleep-one",
       .what = "1 producer x 2, 1 consumer that sleeps",
       .roles = {producer(2), sleeping(consumer())}},
      {.name = "wrap-64",
       .what = "1 producer x 4 from before the end of 64 bits, 1 consumer",
       .slots = 1,
       .first_position = slots::kNoPosition - 1,
       .roles = {producer(4), consumer()}},
      {.name = "sleep-nack",
       .what = "1 producer, 2 consumers that sleep, one gives back and goes",
       .roles = {producer(1), sleeping(consumer()), sleeping(gives_back_and_goes())}},
      {.name = "sleep-watched",
       .what = "1 producer x 2, 1 consumer that sleeps, an observer that takes nothing",
       .roles = {producer(2), sleeping(consumer()), observer(1)}},
      {.name = "sleep-watched-twice",
       .what = "1 producer x 2, 1 consumer that sleeps, 2 observers that take nothing",
       .is_long = true,
       .roles = {producer(2), sleeping(consumer()), observer(1), observer(1)}},
      {.name = "sleep-watched-nack",
       .what = "1 producer, 1 consumer that sleeps, one that gives back and goes, an observer",
       .is_long = true,
       .roles = {producer(1), sleeping(consumer()), sleeping(gives_back_and_goes()), observer(1)}},
      {.name = "sleep-watched-kill",
       .what = "1 producer x 2, 1 consumer that sleeps, an observer, 1 kill",
       .kills = 1,
       .is_long = true,
       .roles = {producer(2), sleeping(consumer()), observer(1)}},
      {.name = "one-slot-kill",
       .what = "2 producers, 1 consumer, recoverer, one slot, 1 kill",
       .slots = 1,
       .kills = 1,
       .roles = {producer(1), producer(1), consumer(), recoverer()}},
      {.name = "two-to-one",
       .what = "2 producers, 1 consumer",
       .roles = {producer(1), producer(1), consumer()}},
      {.name = "two-to-one-kill",
       .what = "2 producers, 1 consumer, recoverer, 1 kill",
       .kills = 1,
       .is_long = true,
       .roles = {producer(1), producer(1), consumer(), recoverer()}},
      {.name = "two-consumers-kill",
       .what = "1 producer x 2, 2 consumers, recoverer, 1 kill",
       .kills = 1,
       .is_long = true,
       .roles = {producer(2), consumer(), consumer(), recoverer()}},
      {.name = "two-by-two-kill",
       .what = "2 producers, 2 consumers, recoverer, 1 kill",
       .kills = 1,
       .is_long = true,
       .roles = {producer(1), producer(1), consumer(), consumer(), recoverer()}},
      {.name = "nack",
       .what = "1 producer x 2, 2 consumers that give back",
       .is_long = true,
       .roles = {producer(2), consumer(0, 1), consumer(0, 1)}},
      {.name = "nack-kill",
       .what = "1 producer x 2, 2 consumers, one gives back, recoverer, 1 kill",
       .kills = 1,
       .is_long = true,
       .roles = {producer(2), consumer(0, 1), consumer(), recoverer()}},
      {.name = "two-recoverers",
       .what = "1 producer x 2, 1 consumer, 2 recoverers, 2 kills",
       .kills = 2,
       .is_long = true,
       .roles = {producer(2), consumer(), recoverer(), recoverer()}},
      {.name = "successor",
       .what = "1 producer x 2, 1 consumer, one that joins after a death, 2 kills",
       .kills = 2,
       .roles = {producer(2), consumer(), successor(consumer())}},
      {.name = "wrap",
       .what = "1 producer x 4 from before the end of positions, 1 consumer, recoverer, 1 kill",
       .slots = 1,
       .first_position = slots::kNoPositionLow - 1,
       .kills = 1,
       .roles = {producer(4), consumer(), recoverer()}},
      {.name = "sleep-message",
       .what = "2 producers, 2 consumers that sleep",
       .is_long = true,
       .roles = {producer(1), producer(1), sleeping(consumer()), sleeping(consumer())}},
      {.name = "sleep-space",
       .what = "2 producers that sleep, 1 consumer, one slot",
       .slots = 1,
       .is_long = true,
       .roles = {sleeping(producer(2)), sleeping(producer(1)), sleeping(consumer())}},
      {.name = "sleep-give-up",
       .what = "1 producer x 2, 2 consumers that sleep, one may give up",
       .is_long = true,
       .roles = {producer(2), sleeping(consumer()), impatient(consumer())}},
      {.name = "sleep-kill",
       .what = "1 producer x 2, 2 consumers that sleep, 1 kill",
       .kills = 1,
       .is_long = true,
       .roles = {producer(2), sleeping(consumer()), sleeping(consumer())}},
      {.name = "two-groups",
       .what = "2 producers, two groups of 1 consumer, recoverer, one slot, 1 kill",
       .slots = 1,
       .groups = 2,
       .kills = 1,
       .is_long = true,
       .roles = {producer(1), producer(1), consumer(0), consumer('a'), recoverer()}},
      {.name = "offer",
       .what = "1 producer x 3, 1 consumer that looks for what was passed at any time",
       .roles = {producer(3), offering(consumer())}},
      {.name = "offer-kill",
       .what = "2 producers, 1 consumer that looks for what was passed, recoverer, one slot, 1 kill",
       .slots = 1,
       .kills = 1,
       .roles = {producer(1), producer(1), offering(consumer()), recoverer()}},
      // --- groups that come and go
      {.name = "late-group",
       .what = "1 producer x 2, 1 consumer, a group that joins",
       .groups = 2,
       .roles = {producer(2), consumer(), joining(consumer('a'))}},
      {.name = "late-group-kill",
       .what = "1 producer x 2, 1 consumer, a group that joins, 1 kill",
       .groups = 2,
       .kills = 1,
       .is_long = true,
       .roles = {producer(2), consumer(), joining(consumer('a')), recoverer()}},
      {.name = "group-leaves",
       .what = "1 producer x 3, 1 consumer, a group that leaves and comes back under the same number",
       .groups = 2,
       .is_long = true,
       .roles = {producer(3), consumer(), leaving(consumer('a'), 1, 1)}},
      {.name = "group-leaves-holding",
       .what = "2 producers, 1 consumer, a group whose member leaves with a message, one slot",
       .slots = 1,
       .groups = 2,
       .is_long = true,
       .roles = {producer(1), producer(1), consumer(), leaving_with_it(consumer('a'), 1)}},
      {.name = "group-dies",
       .what = "1 producer x 2, 1 consumer, a group whose member dies, recoverer, 1 kill",
       .groups = 2,
       .kills = 1,
       .is_long = true,
       .roles = {producer(2), consumer(), consumer('a'), recoverer()}},
      {.name = "only-group-leaves",
       .what = "broadcast: 2 producers, the only group leaves and comes back, one slot",
       .slots = 1,
       .groups = 2,
       .default_group = false,
       .roles = {producer(1), producer(1), leaving(consumer('a'), 0, 1)}},
      {.name = "only-group-leaves-kill",
       .what = "broadcast: 2 producers, the only group leaves and comes back, recoverer, one slot, 1 kill",
       .slots = 1,
       .groups = 2,
       .default_group = false,
       .kills = 1,
       .is_long = true,
       .roles = {producer(1), producer(1), leaving(consumer('a'), 0, 1), recoverer()}},
      {.name = "two-join",
       .what = "1 producer, two groups join at once, each leaves",
       .slots = 1,
       .groups = 3,
       .default_group = false,
       .roles = {producer(1), joining(leaving(consumer('a'), 0)), joining(leaving(consumer('b'), 0))}},
      {.name = "group-member-joins",
       .what = "1 producer x 2, a group with a member that leaves and one that joins",
       .slots = 1,
       .groups = 2,
       .default_group = false,
       .roles = {producer(2), leaving(consumer('a'), 0), joining(consumer('a'))}},
      {.name = "drop-policy",
       .what = "1 producer x 2, a durable group with the drop policy, 2 members, recoverer, 1 kill",
       .slots = 1,
       .groups = 2,
       .default_group = false,
       .kills = 1,
       .is_long = true,
       .roles = {producer(2), with_rules(consumer('a'), memory::kGroupDrops | memory::kGroupDurable),
                 with_rules(consumer('a'), memory::kGroupDrops | memory::kGroupDurable), recoverer()}},
      {.name = "drop-policy-two-recoverers",
       .what = "the same with 2 recoverers, 2 kills",
       .slots = 1,
       .groups = 2,
       .default_group = false,
       .kills = 2,
       .roles = {producer(1), with_rules(consumer('a'), memory::kGroupDrops | memory::kGroupDurable),
                 recoverer(), recoverer()}},
      {.name = "group-returns-holding",
       .what = "1 producer x 2, a group whose member leaves with a message, another that joins",
       .groups = 2,
       .default_group = false,
       .roles = {producer(2), leaving_with_it(consumer('a'), 1), joining(consumer('b'))}},
      // --- late joiners that want what is there
      {.name = "join-oldest",
       .what = "1 producer x 2, 1 consumer, a group that joins at the oldest message",
       .groups = 2,
       .roles = {producer(2), consumer(), joining(consumer('a'), liveness::JoinAt::Oldest)}},
      {.name = "join-oldest-patient",
       .what = "the same, waiting for senders",
       .groups = 2,
       .roles = {producer(2), consumer(), patient(joining(consumer('a'), liveness::JoinAt::Oldest))}},
      {.name = "join-latest-history",
       .what = "history of 1: 1 producer x 3, a group that joins at the latest message",
       .groups = 3,
       .default_group = false,
       .history = 1,
       .roles = {producer(3), joining(consumer('a'), liveness::JoinAt::Latest)}},
      {.name = "join-oldest-drop",
       .what = "1 producer x 3 that drops the oldest, 1 consumer, a group that joins at the oldest message",
       .groups = 2,
       .is_long = true,
       .roles = {dropper(3), consumer(), joining(consumer('a'), liveness::JoinAt::Oldest)}},
      // --- history
      {.name = "history",
       .what = "history of 1: 2 producers, 1 consumer",
       .groups = 2,
       .history = 1,
       .is_long = true,
       .roles = {producer(2), producer(1), consumer()}},
      {.name = "history-kill",
       .what = "history of 1: 1 producer x 3, 1 consumer, recoverer, 1 kill",
       .groups = 2,
       .history = 1,
       .kills = 1,
       .roles = {producer(3), consumer(), recoverer()}},
      // --- drop oldest
      {.name = "drop-oldest",
       .what = "1 producer x 3 that drops the oldest, 1 consumer, one slot",
       .slots = 1,
       .roles = {dropper(3), consumer()}},
      {.name = "drop-oldest-two",
       .what = "2 producers that drop the oldest, 1 consumer, one slot",
       .slots = 1,
       .is_long = true,
       .roles = {dropper(2), dropper(1), consumer()}},
      {.name = "drop-oldest-kill",
       .what = "1 producer x 3 that drops the oldest, 1 consumer, recoverer, one slot, 1 kill",
       .slots = 1,
       .kills = 1,
       .roles = {dropper(3), consumer(), recoverer()}},
      {.name = "drop-oldest-groups",
       .what = "1 producer x 2 that drops the oldest, two groups, one gives back, one slot",
       .slots = 1,
       .groups = 2,
       .roles = {dropper(2), consumer(), consumer('a', 1)}},
      {.name = "drop-oldest-leave",
       .what = "1 producer x 2 that drops the oldest, two groups, one of which leaves, one slot",
       .slots = 1,
       .groups = 2,
       .roles = {dropper(2), consumer(), leaving(consumer('a'), 0)}},
      // --- dead letters
      {.name = "dead-letters",
       .what = "1 producer x 2, 2 consumers that give back, one delivery, a reader that revives",
       .max_deliveries = 1,
       .roles = {producer(2), consumer(0, 1), reader(true)}},
      {.name = "dead-letters-kill",
       .what = "1 producer, 1 consumer that gives back, one delivery, a reader, recoverer, 1 kill",
       .max_deliveries = 1,
       .kills = 1,
       .roles = {producer(1), consumer(0, 1), reader(), recoverer()}},
      {.name = "dead-letters-full",
       .what = "1 producer x 2, 2 consumers that give back, no dead letter is kept",
       .max_deliveries = 1,
       .dead_letters = 0,
       .is_long = true,
       .roles = {producer(2), consumer(0, 1), consumer(0, 1)}},
      {.name = "dead-letters-two-readers",
       .what = "1 producer, 1 consumer that gives back, one delivery, 2 readers",
       .max_deliveries = 1,
       .roles = {producer(1), consumer(0, 1), reader(), reader()}},
      // --- a publisher that keeps looking at its message
      {.name = "kept-view",
       .what =
           "1 producer x 2 that looks at the first until any time, another producer, 1 consumer, one slot",
       .slots = 1,
       .roles = {viewing(producer(2)), producer(1), consumer()}},
      {.name = "kept-view-kill",
       .what = "1 producer x 2 that looks at the first until any time, 1 consumer, recoverer, 1 kill",
       .kills = 1,
       .roles = {viewing(producer(2)), consumer(), recoverer()}},
      {.name = "kept-view-sleep",
       .what =
           "1 producer that looks until any time, one that sleeps for room, 1 consumer that sleeps, one slot",
       .slots = 1,
       .roles = {viewing(producer(1)), sleeping(producer(1)), sleeping(consumer())}},
      {.name = "kept-view-join",
       .what = "1 producer that looks until any time, 1 consumer, a group that joins at the oldest message, "
               "1 kill",
       .slots = 1,
       .groups = 2,
       .kills = 1,
       .is_long = true,
       .roles = {viewing(producer(1)), consumer(), joining(consumer('a'), liveness::JoinAt::Oldest)}},
      {.name = "kept-view-group-leaves",
       .what = "broadcast: 1 producer x 2 that looks until any time, the only group leaves and comes back, "
               "one slot",
       .slots = 1,
       .groups = 2,
       .default_group = false,
       .roles = {viewing(producer(2)), leaving(consumer('a'), 0, 1)}},
      {.name = "kept-view-unheard",
       .what = "broadcast without a group: 1 producer that looks until any time, another, recoverer, one "
               "slot, 1 kill",
       .slots = 1,
       .groups = 2,
       .default_group = false,
       .kills = 1,
       .roles = {viewing(producer(1)), producer(1), recoverer()}},
      {.name = "kept-view-drop-oldest",
       .what = "1 producer x 3 that drops the oldest and looks at one until any time, 1 consumer",
       .roles = {viewing(dropper(3)), consumer()}},
      // --- the tail's hint after many deaths
      {.name = "deaths-in-a-row",
       .what = "4 producers, each dies before the next comes, 1 consumer, one slot, two cells, 3 kills",
       .slots = 1,
       .cells = 2,
       .kills = 3,
       .roles = {producer(1), successor(producer(1)), successor(producer(1)), successor(producer(1)),
                 consumer()}},
  };
  return list;
}

}  // namespace dsline::model
