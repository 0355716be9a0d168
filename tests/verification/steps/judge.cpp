#include "judge.hpp"

#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <map>
#include <memory>
#include <stdexcept>

#include "memory/region.hpp"
#include "slots/slot_word.hpp"

namespace dsline::steps {
namespace {

struct Got {
  std::uint64_t id;
  int attempts;
};

std::vector<Got> drain(Channel& channel) {
  std::vector<Got> all;
  Received message;
  while (const std::uint64_t id = take(channel, message)) {
    all.push_back({id, static_cast<int>(message.attempts)});
    channel.release(message.slot, message.process, message.group);
    if (all.size() > 1000) throw std::runtime_error("it does not come to an end");
  }
  return all;
}

std::string compare(const std::vector<Got>& got, std::vector<Item>& items, bool bystander_lives) {
  std::map<std::uint64_t, int> seen;
  std::uint64_t last = 0;
  for (const Got& g : got) {
    if (!seen.emplace(g.id, g.attempts).second) return "message " + std::to_string(g.id) + " came twice";
    auto item = std::find_if(items.begin(), items.end(), [&g](const Item& i) { return i.id == g.id; });
    if (item == items.end()) return "message " + std::to_string(g.id) + " should not be there";
    if (g.attempts != 0 || !item->in_turn) continue;
    if (g.id < last) return "message " + std::to_string(g.id) + " came after " + std::to_string(last);
    last = g.id;
  }
  for (Item& item : items) {
    if (item.with_bystander && bystander_lives) {
      if (seen.count(item.id) != 0) return "the bystander lives, but another got its message";
      continue;
    }
    if (item.with_bystander != !bystander_lives) continue;
    auto found = seen.find(item.id);
    const int state = found == seen.end() ? kAbsent : found->second;
    auto at = std::find(item.path.begin() + static_cast<std::ptrdiff_t>(item.at), item.path.end(), state);
    if (at == item.path.end()) {
      return "message " + std::to_string(item.id) + " is " +
             (state == kAbsent ? "lost" : "delivered after " + std::to_string(state) + " other deliveries") +
             " where that cannot be (any more)";
    }
    item.at = static_cast<std::size_t>(at - item.path.begin());
  }
  return "";
}

std::string leftovers(int fd, std::uint32_t handles) {
  auto region = memory::Region::attach(memory::make_file_storage(dup(fd), memory::StorageKind::File, "the scene"));
  const memory::Geometry& g = region->geometry();
  for (std::uint32_t s = 0; s < g.slots; ++s) {
    slots::SlotWord word{region->slot(s).word.load()};
    if (!word.is_free()) {
      return "slot " + std::to_string(s) + " is not free: phase " + std::to_string(static_cast<int>(word.phase())) +
             ", pending " + std::to_string(word.pending());
    }
  }
  std::uint32_t used = 0;
  for (std::uint32_t i = 0; i < g.participants; ++i) used += (region->participant(i).word.load() & 0xFF) != 0;
  if (used != handles) return std::to_string(used) + " participants, " + std::to_string(handles) + " handles";
  std::uint64_t bits = 0;
  for (const auto& word : region->header().space.waiters) bits |= word.load();
  for (std::uint32_t i = 0; i < g.groups; ++i) {
    for (const auto& word : region->group(i).messages.waiters) bits |= word.load();
  }
  return bits == 0 ? "" : "a waiter bit of the dead is left";
}

/// The channel works: every slot can be filled, and comes out again in order.
std::string use(Channel& channel) {
  for (std::uint32_t round = 0; round < 3; ++round) {
    for (std::uint32_t i = 0; i < channel.capacity(); ++i) send(channel, 5000 + i, Backpressure::Raise);
    const std::vector<Got> got = drain(channel);
    if (got.size() != channel.capacity()) return "a slot cannot be used any more";
    for (std::uint32_t i = 0; i < got.size(); ++i) {
      if (got[i].id != 5000 + i || got[i].attempts != 0) return "the channel does not work any more";
    }
  }
  return "";
}

}  // namespace

std::string judge(int fd, std::vector<Item>& items, const std::function<void()>& bystander_dies, bool is_shut_down) {
  try {
    auto survivor = Channel::adopt_anonymous(dup(fd));
    std::string wrong = compare(drain(*survivor), items, true);
    if (!wrong.empty()) return wrong;
    bystander_dies();
    auto second = Channel::adopt_anonymous(dup(fd));  // recovers the bystander
    wrong = compare(drain(*second), items, false);
    if (!wrong.empty()) return wrong;
    wrong = leftovers(fd, 2);
    if (!wrong.empty()) return wrong;
    if (!is_shut_down && !second->is_shut_down()) wrong = use(*second);
    return wrong;
  } catch (const std::exception& error) {
    return error.what();
  }
}

std::string judge_copy(const std::vector<std::byte>& bytes, std::vector<Item>& items, int bystander,
                       bool is_shut_down) {
  const int fd = memfd_create("dsline-steps", MFD_CLOEXEC | MFD_ALLOW_SEALING);
  if (fd < 0 || ftruncate(fd, static_cast<off_t>(bytes.size())) != 0 ||
      pwrite(fd, bytes.data(), bytes.size(), 0) != static_cast<ssize_t>(bytes.size()) ||
      fcntl(fd, F_ADD_SEALS, F_SEAL_SHRINK | F_SEAL_GROW) != 0) {
    return "no copy of the region can be made";
  }
  auto life = memory::make_file_storage(dup(fd), memory::StorageKind::File, "the bystander");
  if (bystander >= 0 && !life->try_lock(memory::participant_lock(static_cast<std::uint32_t>(bystander)))) {
    return "the bystander's lock cannot be taken";
  }
  std::string wrong = judge(fd, items, [&life] { life->drop_locks(); }, is_shut_down);
  close(fd);
  return wrong;
}

std::string judge_end(const std::vector<Item>& items) {
  std::size_t gone = 0;
  bool any_may_go = false;
  for (const Item& item : items) {
    if (item.may_go) {
      any_may_go = true;
      gone += item.at + 1 == item.path.size();
    } else if (item.at + 1 != item.path.size()) {
      return "the act is over, but message " + std::to_string(item.id) + " is still as before";
    }
  }
  if (any_may_go && gone != 1) return std::to_string(gone) + " messages were dropped instead of one";
  return "";
}

}  // namespace dsline::steps
