#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "life.hpp"
#include "log.hpp"
#include "memory/region.hpp"
#include "oracle.hpp"
#include "payload.hpp"
#include "plan.hpp"

namespace dsline::kill {

/// One channel, its processes, and their ends.
class Round {
 public:
  Round(const Plan& plan, const std::string& folder, Log& log, Tally& tally, Shared& shared);
  void run();

 private:
  struct Child {
    std::uint32_t index;
    std::int32_t pid;
    std::int64_t kill_at_ns;
    std::int64_t stop_at_ns;   // 0: not
    std::int64_t go_on_at_ns;  // 0: runs
  };
  struct Dead {
    std::int32_t pid;
    std::int64_t since_ns;
  };

  void create();
  void spawn_missing();
  void spawn(Role role);
  std::uint32_t group_for(Role role, std::uint32_t index);
  void choose_point(Life& life);
  void reap();
  void act();
  void watch_recovery();
  void supervise();
  void finish();
  void final_look();
  void judge_late_joiner(Channel& channel, const memory::Region& region);
  void kill_now(const Child& child);
  void complain(Fault fault, const std::string& text);
  bool is_over() const;
  std::string dump() const;

  Plan plan_;
  Log& log_;
  Tally& tally_;
  Shared& shared_;
  Site site_;
  Random random_;
  std::unique_ptr<memory::Region> watch_;  // without a handle of its own
  std::vector<Child> children_;
  std::vector<Dead> unrecovered_;
  std::int64_t next_spawn_ns_[kRoles] = {};
  std::int64_t started_ns_ = 0;
  std::int64_t last_spawn_ns_ = 0;
  std::int64_t somebody_since_ns_ = 0;  // from when on a child has been at work all the time; 0: none
  std::uint32_t kills_ = 0;
  bool is_ending_ = false;
};

/// Path that a killed lane has to remove.
extern char path_to_remove[200];

}  // namespace dsline::kill
