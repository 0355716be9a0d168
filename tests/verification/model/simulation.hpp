#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "delivery/dead_letters.hpp"
#include "engine.hpp"
#include "liveness/membership.hpp"
#include "memory/region.hpp"
#include "slots/slot_pool.hpp"

/// A channel in simulated shared memory, the processes that use it, and the promises they are held to.
namespace dsline::model {

enum class Kind : std::uint8_t {
  Producer,   ///< sends `messages`, then is done
  Consumer,   ///< takes and releases for `group`, for ever
  Recoverer,  ///< looks after the dead whenever there are any
  Reader,     ///< takes dead letters and releases them
  Observer,  ///< sleeps as a consumer `messages` times, then once more unregistered, and takes nothing (channel/watcher.cpp)
};

struct Role {
  Kind kind = Kind::Producer;
  int messages = 0;
  bool drops_oldest = false;
  char group = 0;           ///< 0: the default group; otherwise the name of one
  std::uint32_t rules = 0;  ///< kGroupDurable, kGroupDrops
  liveness::JoinAt start = liveness::JoinAt::Next;
  bool joins = false;           ///< comes later, at any time
  int leaves_after = -1;        ///< so many messages
  bool leaves_holding = false;  ///< the last of them, which it releases afterwards
  int returns = 0;              ///< joins again so many times
  bool patient = false;         ///< waits for senders as long as it takes
  int nacks = 0;                ///< it may give back so many messages
  bool sleeps = false;          ///< waits in a futex instead of asking again
  bool gives_up = false;        ///< may stop waiting at any time, woken or not
  bool offers = false;          ///< looks for messages that its group's cursor has passed, at any time
  bool keeps = false;           ///< the one message that it takes
  bool goes = false;            ///< its last give-back is the last that it does
  bool succeeds = false;        ///< joins when somebody has died, under whatever number is free
  bool views = false;           ///< a Producer that looks at a message after publishing it, until any time
  bool revives = false;         ///< a Reader that sends the letter to its group again, once
};

struct Setup {
  std::string name;
  std::string what;  ///< for people
  std::uint32_t slots = 2;
  std::uint32_t cells = 0;   ///< 0: as the layout plans it
  std::uint32_t groups = 1;  ///< in the layout
  bool default_group = true;
  std::uint32_t history = 0;
  std::uint32_t max_deliveries = 15;
  std::uint32_t dead_letters = 16;
  std::uint32_t spare_numbers = 0;  ///< participants beyond the processes that begin attached
  std::uint64_t first_position = 0;
  int kills = 0;
  bool is_long = false;  ///< not in the short mode
  std::vector<Role> roles;
};

class Simulation final : public Subject {
 public:
  explicit Simulation(const Setup& setup);

  int processes() const override { return static_cast<int>(setup_.roles.size()); }
  int choices(int p) const override;
  void run(int p, int choice) override;
  void on_death(int p) override;
  void on_write(const void* at, std::uint64_t before, std::uint64_t after) override;
  void check_after_all_died() override;
  void check_at_rest() override;
  void check_blocked() override;
  bool slices_end() const override;
  bool is_patient(int p) const override { return role(p).patient; }
  std::string describe(const void* at) const override;
  std::string name_of(int p) const override;

 private:
  enum class Word : std::uint8_t { Other, Slot, Claim, Cell, Entry, Tail, Joined };
  struct Place {
    Word kind = Word::Other;
    std::uint8_t slot = 0;  // or cell
    std::uint8_t group = 0;
  };

  // Ledger.
  void on_slot_word(std::uint32_t s, std::uint64_t before, std::uint64_t after);
  void on_claim(std::uint32_t s, std::uint32_t g, std::uint64_t before, std::uint64_t after);
  void on_tail(std::uint64_t tail);
  void on_cell(std::uint64_t before, std::uint64_t after);
  void on_bit_cleared(std::uint32_t s, std::uint32_t g, int message);
  void on_joined(std::uint32_t g);
  bool is_alive(int p) const { return world.process[p].alive != 0; }
  /// Process that has or had a participant number last.
  int process_of(std::uint32_t participant) const;

  // Roles.
  const Role& role(int p) const { return setup_.roles[static_cast<std::size_t>(p < processes() ? p : 0)]; }
  void produce(int p);
  std::uint32_t alloc(int p);
  std::uint32_t publish(int p, std::uint32_t s, std::uint64_t word, int message, bool keep = false);
  void end_view(int p);
  void consume(int p, int choice);
  void read_letters(int p);
  void join(int p);
  void leave(int p);
  void leave_group(int p);
  bool may_receive(int p) const;
  void tidy(int p);
  void observe(int p);
  void sleep_for_message(int p, std::uint32_t group);
  void sleep_for_space(int p);
  void end_slice(int p);
  bool anybody_to_bury() const;
  bool is_everything_held() const;
  enum class Letters { No, Yes };
  bool take(int p, std::uint32_t group, Letters letters);
  void release(int p);
  void give_back(int p, bool undelivered);
  void let_go(int p);
  std::uint32_t number(int p) const { return world.process[p].number - 1u; }

  // Ends.
  void drain(int p);
  void go_on_to_the_end();
  void check_everything_delivered(std::uint32_t groups);
  void check_everything_free(int p);
  void check_sending(int p);
  void check_groups(std::uint32_t active);
  void check_history();

  int message_of(int p, int count) const { return first_message_[p] + count; }

  Setup setup_;
  std::unique_ptr<memory::Region> region_;
  std::unique_ptr<slots::SlotPool> pool_;  // without a state of its own, like the others
  std::unique_ptr<delivery::DeadLetters> letters_;
  std::vector<Place> places_;
  int first_message_[kMaxProcesses] = {};
  int messages_ = 0;
};

const std::vector<Setup>& setups();

}  // namespace dsline::model
