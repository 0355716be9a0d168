#include "plan.hpp"

#include "payload.hpp"

namespace dsline::kill {
namespace {

constexpr const char* kShapeNames[kShapes] = {
    "one to one", "work queue",   "drop oldest", "drop newest",  "both sides killed", "steady",
    "broadcast",  "slow viewers", "history",     "dead letters", "drop on death",     "creators"};
constexpr const char* kPlaceNames[] = {"memfd", "shm", "file"};

// Positions are compared modulo 2^44, and one value is skipped there.
std::uint64_t first_position(Random& random) {
  switch (random.below(3)) {
    case 0:
      return 0;
    case 1:
      return (std::uint64_t{1} << 44) - random.below(400);
    default:
      return (std::uint64_t{1} << 63) + random.next() % 100000;
  }
}

void choose_channel(Plan& plan, Random& random) {
  plan.place = static_cast<Place>(random.below(3));
  if (plan.shape == Shape::Reattach && plan.place == Place::Shm) plan.place = Place::File;
  if (plan.shape == Shape::Creators) plan.place = random.one_in(3) ? Place::File : Place::Shm;
  constexpr std::uint32_t kCapacities[] = {1, 2, 3, 4, 8, 16, 70};
  plan.options.capacity = kCapacities[random.below(7)];
  plan.options.slot_size = 256;
  const bool elastic = random.one_in(3);
  plan.options.max_message_size = elastic ? 16384 : 512;
  plan.largest = elastic ? (random.one_in(2) ? 12000 : 2000) : 500;
  plan.options.max_handles = random.one_in(2) ? 24 : 70;
  plan.options.history = 0;
  plan.options.default_group = 1;
  plan.options.checksum = static_cast<int>(random.below(3));
  plan.options.first_position = first_position(random);
  plan.options.max_deliveries = 15;
  plan.has_keeper = plan.shape != Shape::Reattach && plan.shape != Shape::Creators &&
                    (plan.place == Place::Shm || random.one_in(2));
  plan.inherits = plan.has_keeper && random.one_in(3);
}

}  // namespace

const char* shape_name(std::uint32_t shape) noexcept { return kShapeNames[shape]; }
const char* place_name(Place place) noexcept { return kPlaceNames[static_cast<std::uint32_t>(place)]; }

Plan make_plan(std::uint64_t seed, std::uint64_t round, std::uint32_t only) {
  Plan plan{};
  plan.seed = mix(mix(seed) + round);
  plan.round = round;
  Random random(plan.seed);
  plan.shape = static_cast<Shape>(only < kShapes ? only : random.below(kShapes));
  choose_channel(plan, random);

  plan.policy = Backpressure::Block;
  const auto want = [&plan](Role role, std::uint32_t n) {
    plan.wanted[static_cast<std::uint32_t>(role)] = n;
  };
  want(Role::Producer, 1);
  want(Role::Consumer, 1);
  plan.most_held = random.between(1, 4);
  plan.kills = random.between(12, 40);
  plan.life_us = random.one_in(3) ? 3'000 : 12'000;
  plan.respawn_delay_us = random.one_in(3) ? 120'000 : 5'000;
  plan.send_pause_us = random.one_in(2) ? 0 : random.between(20, 600);
  plan.hold_pause_us = random.one_in(2) ? 0 : random.between(20, 400);
  plan.give_back_one_in = random.one_in(3) ? 10 : 0;
  plan.leave_one_in = random.one_in(2) ? 60 : 0;
  plan.delay_one_in = random.one_in(2) ? 0 : random.between(20, 200);
  plan.stops = random.one_in(4);
  plan.ends_by_kill = random.one_in(2);
  switch (plan.shape) {
    case Shape::OneToOne:
      break;
    case Shape::WorkQueue:
      want(Role::Producer, random.between(1, 3));
      want(Role::Consumer, random.between(1, 3));
      break;
    case Shape::DropOldest:
      plan.policy = Backpressure::DropOldest;
      want(Role::Producer, random.between(1, 2));
      want(Role::Consumer, random.between(1, 2));
      plan.hold_pause_us = random.between(200, 2000);
      break;
    case Shape::DropNewest:
      plan.policy = Backpressure::DropNewest;
      want(Role::Producer, random.between(1, 2));
      want(Role::Consumer, random.between(1, 2));
      break;
    case Shape::Reattach:
      want(Role::Producer, random.between(1, 2));
      want(Role::Consumer, random.between(1, 2));
      plan.ends_by_kill = true;
      plan.respawn_delay_us = 5'000;
      break;
    case Shape::Steady:  // nobody is ever idle for long, no slot is ever missing, and nobody joins
      plan.options.capacity = 64;
      plan.options.max_message_size = plan.largest = 500;
      want(Role::Consumer, random.between(2, 3));
      plan.kills = 3;
      plan.send_pause_us = random.between(1000, 45000);
      plan.hold_pause_us = 0;
      plan.life_us = 600'000;
      plan.leave_one_in = 0;
      plan.give_back_one_in = 0;
      plan.respawn_least_us = 700'000;
      plan.stops = false;
      break;
    case Shape::Broadcast:
      plan.options.default_group = random.one_in(2) ? 1 : 0;
      plan.durable = random.between(plan.options.default_group == 0 ? 1 : 0, 2);
      want(Role::Producer, random.between(1, 2));
      want(Role::Consumer, plan.durable + (plan.options.default_group == 1 ? 1 : 0));
      want(Role::Viewer, random.between(1, 2));
      plan.start = random.one_in(2) ? Start::Next : Start::Oldest;
      break;
    case Shape::SlowViewers:
      plan.policy = Backpressure::DropOldest;
      plan.options.default_group = 0;
      plan.durable = random.below(2);
      want(Role::Producer, random.between(1, 2));
      want(Role::Consumer, plan.durable);
      want(Role::Viewer, random.between(1, 3));
      plan.hold_pause_us = random.between(200, 2000);
      if (random.one_in(3)) plan.options.history = static_cast<int>(plan.options.capacity / 2);
      break;
    case Shape::History:
      plan.options.capacity = random.one_in(2) ? 16 : 70;
      plan.options.history = static_cast<int>(random.between(1, 8));
      plan.options.default_group = random.one_in(2) ? 1 : 0;
      want(Role::Consumer, plan.options.default_group == 1 ? 1 : 0);
      want(Role::Viewer, random.between(1, 2));
      want(Role::Looker, 1);
      plan.start = random.one_in(4) ? Start::Latest : Start::Oldest;
      plan.send_pause_us = random.between(50, 1000);
      break;
    case Shape::DeadLetters:
      plan.options.max_deliveries = random.between(1, 3);
      plan.options.dead_letters = static_cast<int>(random.below(6));
      plan.options.capacity += 2;
      plan.durable = random.below(2);
      want(Role::Consumer, 1 + plan.durable + random.below(2));
      want(Role::Undertaker, 1);
      plan.give_back_one_in = random.between(2, 6);
      break;
    case Shape::DropOnDeath:
      plan.options.default_group = 0;
      plan.durable = 1;
      plan.drops = true;
      want(Role::Producer, random.between(1, 2));
      want(Role::Consumer, random.between(1, 3));
      break;
    case Shape::Creators:
      want(Role::Producer, 0);
      want(Role::Consumer, 0);
      want(Role::Peer, random.between(2, 4));
      plan.leave_one_in = 6;
      plan.life_us = 3'000;
      plan.respawn_delay_us = 2'000;
      plan.delay_one_in = random.between(5, 60);
      break;
  }
  const std::uint32_t viewers = plan.wanted[static_cast<std::uint32_t>(Role::Viewer)];
  if (viewers != 0) plan.options.max_groups = plan.durable + viewers + random.between(1, 3);
  return plan;
}

}  // namespace dsline::kill
