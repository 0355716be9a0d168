#pragma once

#include <cstdint>
#include <memory>
#include <string>

#include "dsline/channel.hpp"
#include "log.hpp"
#include "plan.hpp"

/// What a child process does until it is killed or leaves.
namespace dsline::kill {

/// Exit status: there was no number left for a new group.
inline constexpr int kRefused = 10;

struct Site {
  const Plan* plan;
  Log* log;
  std::string where;                ///< name or path
  int fd = -1;                      ///< of an anonymous channel
  std::shared_ptr<Channel> keeper;  ///< the supervisor's handle
};

/// A new handle of the round's channel.
std::shared_ptr<Channel> open_channel(const Site& site, OpenMode mode);

/// Group of the channel for a group as the harness counts it.
std::string group_name(std::uint32_t group);
SubscribeOptions subscription(const Plan& plan, std::uint32_t group);

/// Takes one message, or one dead letter, and releases it; the outcome of the taking. For the supervisor's last look.
Outcome take_one(Channel& channel, Life& life, std::uint32_t group);
Outcome take_one_letter(Channel& channel, Life& life);

[[noreturn]] void live(const Site& site, std::uint32_t index, std::uint64_t seed,
                       std::atomic<std::uint64_t>* hits);

}  // namespace dsline::kill
