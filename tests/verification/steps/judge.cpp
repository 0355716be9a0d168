#include "judge.hpp"

#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <bit>
#include <map>
#include <memory>
#include <set>
#include <stdexcept>

#include "memory/region.hpp"
#include "slots/slot_word.hpp"

namespace dsline::steps {
namespace {

struct Got {
  std::uint64_t id;
  int attempts;  // or kLetter
  std::string group;
};

void drain(Channel& channel, const std::string& group, std::vector<Got>& all) {
  Received message;
  while (const std::uint64_t id = take(channel, message)) {
    all.push_back({id, static_cast<int>(message.attempts), group});
    channel.release(message.slot, message.process, message.group);
    if (all.size() > 1000) throw std::runtime_error("it does not come to an end");
  }
}

/// Everything that there is for anybody, and then what a late joiner finds.
std::vector<Got> drain_all(Channel& channel, const Scene& scene) {
  std::vector<Got> all;
  drain(channel, "", all);
  if (scene.has_group()) {
    auto member = subscribe(channel, kDurable, true);
    drain(*member, kDurable, all);
    member->close();
  }
  Received message;
  std::string group;
  while (const std::uint64_t id = take_letter(channel, message, group)) {
    all.push_back({id, kLetter, group});
    channel.release(message.slot, message.process, message.group);
    if (all.size() > 1000) throw std::runtime_error("it does not come to an end");
  }
  if (scene.has_history()) {
    auto late = subscribe(channel, "late", false, dsline::Start::Oldest);
    drain(*late, kOld, all);
    late->close();
  }
  return all;
}

std::string compare(const std::vector<Got>& got, std::vector<Item>& items, bool bystander_lives) {
  std::map<std::pair<std::string, std::uint64_t>, int> seen;
  std::map<std::string, std::uint64_t> last;
  for (const Got& g : got) {
    const std::string name =
        "message " + std::to_string(g.id) + (g.group.empty() ? "" : " of group " + g.group);
    if (!seen.emplace(std::pair(g.group, g.id), g.attempts).second) return name + " came twice";
    auto item = std::find_if(items.begin(), items.end(),
                             [&g](const Item& i) { return i.id == g.id && i.group == g.group; });
    if (item == items.end()) return name + " should not be there";
    if (g.attempts != 0 || !item->in_turn) continue;
    if (g.id < last[g.group]) return name + " came after " + std::to_string(last[g.group]);
    last[g.group] = g.id;
  }
  for (Item& item : items) {
    if (item.with_bystander && bystander_lives) {
      if (seen.count({item.group, item.id}) != 0) return "the bystander lives, but another got its message";
      continue;
    }
    // The history is still there for the second one.
    if (item.with_bystander != !bystander_lives && item.group != kOld) continue;
    auto found = seen.find({item.group, item.id});
    const int state = found == seen.end() ? kAbsent : found->second;
    auto at = std::find(item.path.begin() + static_cast<std::ptrdiff_t>(item.at), item.path.end(), state);
    if (at == item.path.end()) {
      return "message " + std::to_string(item.id) + (item.group.empty() ? "" : " of group " + item.group) +
             " is " +
             (state == kAbsent   ? "lost"
              : state == kLetter ? "a dead letter"
                                 : "delivered after " + std::to_string(state) + " other deliveries") +
             " where that cannot be (any more)";
    }
    item.at = static_cast<std::size_t>(at - item.path.begin());
  }
  return "";
}

std::string leftovers(int fd, std::uint32_t handles, const Scene& scene) {
  auto region =
      memory::Region::attach(memory::make_file_storage(dup(fd), memory::StorageKind::File, "the scene"));
  const memory::Geometry& g = region->geometry();
  for (std::uint32_t s = 0; s < g.slots; ++s) {
    slots::SlotWord word{region->slot(s).word.load()};
    const bool is_history = scene.has_history() && word.is(slots::SlotPhase::Committed) &&
                            word.pending() == 1u << region->retention_group();
    if (!word.is_free() && !is_history) {
      return "slot " + std::to_string(s) + " is not free: phase " +
             std::to_string(static_cast<int>(word.phase())) + ", pending " + std::to_string(word.pending());
    }
  }
  std::uint32_t used = 0;
  for (std::uint32_t i = 0; i < g.participants; ++i) used += (region->participant(i).word.load() & 0xFF) != 0;
  if (used != handles) return std::to_string(used) + " participants, " + std::to_string(handles) + " handles";
  const auto groups = static_cast<std::uint32_t>(region->header().active.load()) & region->group_bits();
  if (std::popcount(groups) != 1 + scene.has_group() + scene.has_history())
    return "a group of the dead is left";
  std::uint64_t bits = 0;
  for (const auto& word : region->header().space.waiters) bits |= word.load();
  for (std::uint32_t i = 0; i < g.groups; ++i) {
    for (const auto& word : region->group(i).messages.waiters) bits |= word.load();
  }
  return bits == 0 ? "" : "a waiter bit of the dead is left";
}

/// The channel works: every slot can be filled, and comes out again in order.
std::string use(Channel& channel, const Scene& scene) {
  for (std::uint32_t round = 0; round < 3; ++round) {
    for (std::uint32_t i = 0; i < channel.capacity(); ++i) send(channel, 5000 + i, Backpressure::Raise);
    std::vector<Got> got;
    drain(channel, "", got);
    if (scene.has_group()) {
      auto member = subscribe(channel, kDurable, true);
      std::vector<Got> other;
      drain(*member, kDurable, other);
      member->close();
      if (other.size() != got.size()) return "the groups do not get the same";
    }
    if (got.size() != channel.capacity()) return "a slot cannot be used any more";
    for (std::uint32_t i = 0; i < got.size(); ++i) {
      if (got[i].id != 5000 + i || got[i].attempts != 0) return "the channel does not work any more";
    }
  }
  return "";
}

}  // namespace

std::string judge(int fd, std::vector<Item>& items, const std::function<void()>& bystander_dies,
                  const Scene& scene) {
  try {
    auto survivor = Channel::adopt_anonymous(dup(fd));
    std::string wrong = compare(drain_all(*survivor, scene), items, true);
    if (!wrong.empty()) return wrong;
    bystander_dies();
    auto second = Channel::adopt_anonymous(dup(fd));  // recovers the bystander
    wrong = compare(drain_all(*second, scene), items, false);
    if (!wrong.empty()) return wrong;
    wrong = leftovers(fd, 2, scene);
    if (!wrong.empty() || second->is_shut_down()) return wrong;
    return use(*second, scene);
  } catch (const std::exception& error) {
    return error.what();
  }
}

std::string judge_copy(const std::vector<std::byte>& bytes, std::vector<Item>& items, const Scene& scene) {
  const int bystander = scene.bystander();
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
  std::string wrong = judge(
      fd, items, [&life] { life->drop_locks(); }, scene);
  close(fd);
  return wrong;
}

std::string judge_end(const std::vector<Item>& items) {
  std::set<std::uint64_t> gone;
  bool any_may_go = false;
  for (const Item& item : items) {
    if (item.may_go) {
      any_may_go = true;
      if (item.at + 1 == item.path.size()) gone.insert(item.id);
    } else if (item.at + 1 != item.path.size()) {
      return "the act is over, but message " + std::to_string(item.id) + " is still as before";
    }
  }
  if (any_may_go && gone.size() != 1)
    return std::to_string(gone.size()) + " messages were dropped instead of one";
  return "";
}

}  // namespace dsline::steps
