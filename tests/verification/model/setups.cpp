#include "simulation.hpp"
#include "slots/position.hpp"

namespace dsline::model {
namespace {

Role producer(int messages) { return {.kind = Kind::Producer, .messages = messages}; }
Role consumer(char group = 0, int nacks = 0) { return {.kind = Kind::Consumer, .group = group, .nacks = nacks}; }
Role recoverer() { return {.kind = Kind::Recoverer}; }

Role sleeping(Role role) {
  role.sleeps = true;
  return role;
}
Role impatient(Role role) {
  role.sleeps = role.gives_up = true;
  return role;
}
Role gives_back_and_goes() { return {.kind = Kind::Consumer, .nacks = 1, .goes = true}; }
Role keeper() { return {.kind = Kind::Consumer, .keeps = true}; }
Role successor(Role role) {
  role.succeeds = true;
  return role;
}

}  // namespace

const std::vector<Setup>& setups() {
  static const std::vector<Setup> list = {
      {.name = "one-to-one", .what = "1 producer x 2, 1 consumer", .roles = {producer(2), consumer()}},
      {.name = "two-consumers", .what = "1 producer x 2, 2 consumers", .roles = {producer(2), consumer(), consumer()}},
      {.name = "lap",
       .what = "2 producers, one of them laps the order, 1 consumer",
       .is_long = true,
       .roles = {producer(1), producer(5), consumer()}},
      {.name = "lap-held",
       .what = "2 producers, one of them laps the order, 1 consumer, one that keeps a message",
       .is_long = true,
       .roles = {producer(1), producer(5), consumer(), keeper()}},
      {.name = "sleep-one", .what = "1 producer x 2, 1 consumer that sleeps", .roles = {producer(2), sleeping(consumer())}},
      {.name = "wrap-64",
       .what = "1 producer x 4 from before the end of 64 bits, 1 consumer",
       .slots = 1,
       .first_position = slots::kNoPosition - 1,
       .roles = {producer(4), consumer()}},
      {.name = "sleep-nack",
       .what = "1 producer, 2 consumers that sleep, one gives back and goes",
       .roles = {producer(1), sleeping(consumer()), sleeping(gives_back_and_goes())}},
      {.name = "two-to-one", .what = "2 producers, 1 consumer", .roles = {producer(1), producer(1), consumer()}},
      {.name = "two-to-one-kill",
       .what = "2 producers, 1 consumer, recoverer, 1 kill",
       .kills = 1,
       .roles = {producer(1), producer(1), consumer(), recoverer()}},
      {.name = "two-consumers-kill",
       .what = "1 producer x 2, 2 consumers, recoverer, 1 kill",
       .kills = 1,
       .roles = {producer(2), consumer(), consumer(), recoverer()}},
      {.name = "two-by-two-kill",
       .what = "2 producers, 2 consumers, recoverer, 1 kill",
       .kills = 1,
       .is_long = true,
       .roles = {producer(1), producer(1), consumer(), consumer(), recoverer()}},
      {.name = "nack", .what = "1 producer x 2, 2 consumers that give back", .roles = {producer(2), consumer(0, 1), consumer(0, 1)}},
      {.name = "nack-kill",
       .what = "1 producer x 2, 2 consumers, one gives back, recoverer, 1 kill",
       .kills = 1,
       .is_long = true,
       .roles = {producer(2), consumer(0, 1), consumer(), recoverer()}},
      {.name = "two-recoverers",
       .what = "1 producer x 2, 1 consumer, 2 recoverers, 2 kills",
       .kills = 2,
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
       .roles = {sleeping(producer(2)), sleeping(producer(1)), sleeping(consumer())}},
      {.name = "sleep-give-up",
       .what = "1 producer x 2, 2 consumers that sleep, one may give up",
       .roles = {producer(2), sleeping(consumer()), impatient(consumer())}},
      {.name = "sleep-kill",
       .what = "1 producer x 2, 2 consumers that sleep, 1 kill",
       .kills = 1,
       .roles = {producer(2), sleeping(consumer()), sleeping(consumer())}},
      {.name = "two-groups",
       .what = "2 producers, two groups of 1 consumer, recoverer, one slot, 1 kill",
       .slots = 1,
       .groups = 2,
       .kills = 1,
       .is_long = true,
       .roles = {producer(1), producer(1), consumer(0), consumer('a'), recoverer()}},
  };
  return list;
}

}  // namespace dsline::model
