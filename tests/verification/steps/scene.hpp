#pragma once

#include <sys/types.h>

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "cases.hpp"
#include "dsline/channel.hpp"

/// The channel, who is there, and what one process does that will be stepped through.
namespace dsline::steps {

inline constexpr int kAbsent = -1;
inline constexpr int kLetter = 100;
inline constexpr const char* kDurable = "durable";
inline constexpr const char* kOld = "old";  // what a late joiner finds when everybody else has had everything

/// One message, as one group has it: the number of deliveries before the one that a survivor gets, kAbsent when nobody gets it; as the
/// process goes on, forward through `path` and never back.
struct Item {
  std::uint64_t id;
  std::vector<int> path;
  std::string group{};
  bool with_bystander = false;  ///< comes to light when the bystander is dead as well
  bool in_turn = true;          ///< delivered in the order of ids
  bool may_go = false;          ///< one of these is dropped by the end
  std::size_t at = 0;           ///< how far it has come
};

class Scene {
 public:
  Scene(Act act, Start start);
  ~Scene();
  Scene(const Scene&) = delete;
  Scene& operator=(const Scene&) = delete;

  pid_t mover() const noexcept { return mover_; }
  int descriptor() const noexcept { return fd_; }
  const std::byte* bytes() const noexcept { return bytes_; }
  std::size_t size() const noexcept { return size_; }
  /// Number of the bystander in the region, -1 where there is none.
  int bystander() const noexcept { return bystander_number_; }
  void kill_bystander();
  void kill_mover();
  std::vector<Item> items() const { return items_; }
  bool has_group() const noexcept { return start_ == Start::Grouped || start_ == Start::GroupedFull; }
  bool has_dead_message() const noexcept {
    return start_ == Start::DeadHolding || start_ == Start::DeadCommitted || start_ == Start::DeadEntered;
  }
  bool has_history() const noexcept { return start_ == Start::Historic; }

 private:
  void put(Channel& channel, std::vector<int> path = {0});
  void put_and_consume(Channel& channel);
  void set_stage(Channel& channel);
  void place_bystander(bool waits);
  void place_mover();
  void place_dead();
  void plan_act();
  [[noreturn]] void be_mover();
  [[noreturn]] void be_bystander(bool waits);
  [[noreturn]] void be_dead();
  int number_of(pid_t pid) const;

  Act act_;
  Start start_;
  int fd_ = -1;
  std::byte* bytes_ = nullptr;
  std::size_t size_ = 0;
  pid_t mover_ = -1;
  pid_t bystander_ = -1;
  int bystander_number_ = -1;
  std::uint64_t next_id_ = 1;
  std::vector<Item> items_;
};

void send(Channel& channel, std::uint64_t id, Backpressure policy);
/// Takes the next message, or dead letter; its id, 0 when there is none.
std::uint64_t take(Channel& channel, Received& message);
std::uint64_t take_letter(Channel& channel, Received& message, std::string& group);
std::shared_ptr<Channel> subscribe(Channel& channel, const std::string& group, bool durable,
                                   dsline::Start start = dsline::Start::Next);

}  // namespace dsline::steps
