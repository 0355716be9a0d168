#include "oracle.hpp"

#include <algorithm>
#include <bit>
#include <cstdio>
#include <map>
#include <vector>

#include "slots/claim.hpp"
#include "slots/position.hpp"
#include "slots/slot_word.hpp"

namespace dsline::kill {
namespace {

using slots::Claim;
using slots::SlotWord;

/// One delivery, and how it ended.
struct Delivery {
  std::uint32_t life;
  const Event* got;
  bool released = false;
  const Event* given_back = nullptr;  // or revived
};

struct Message {
  const Send* send;
  std::map<std::uint32_t, std::vector<Delivery>> by_group;
  std::uint64_t position = 0;
  bool has_position = false;
};

using Key = std::uint64_t;  // producer << 32 | sequence
Key key_of(const Event& event) { return Key{event.producer} << 32 | event.sequence; }

std::string text_of(Key key, const Message& message) {
  char line[200];
  std::snprintf(line, sizeof line, "message %u/%u (fate %d)", static_cast<std::uint32_t>(key >> 32),
                static_cast<std::uint32_t>(key), static_cast<int>(message.send->fate));
  std::string text = line;
  for (const auto& [group, deliveries] : message.by_group) {
    for (const Delivery& d : deliveries) {
      std::snprintf(line, sizeof line, "; life %u of group %u got %sposition %llu attempts %u%s%s", d.life,
                    group, d.got->is_letter ? "letter " : "",
                    static_cast<unsigned long long>(d.got->position), d.got->attempts,
                    d.released ? " released" : "",
                    d.given_back == nullptr                ? ""
                    : d.given_back->what == What::Reviving ? " revived"
                                                           : " given back");
      text += line;
    }
  }
  return text;
}

class Judge {
 public:
  Judge(const Plan& plan, const Log& log, const Counts& counts, Tally& tally, const Complain& complain)
      : plan_(plan), log_(log), counts_(counts), tally_(tally), complain_(complain) {}

  void run() {
    collect_sends();
    for (std::uint32_t i = 0; i < kMostLives; ++i) collect_events(i);
    for (auto& [key, message] : messages_) {
      for (auto& [group, deliveries] : message.by_group) judge(key, message, deliveries);
    }
    judge_positions();
    std::uint32_t nth = 0;
    for (std::uint32_t g = plan_.options.default_group == 0 ? 1 : 0; g <= plan_.durable; ++g) {
      judge_losses(g, counts_.dropped_oldest[nth++]);
    }
    for (std::uint32_t i = 0; i < kMostLives; ++i) {
      if (log_.life[i].role == Role::Viewer && log_.life[i].joined_ns != 0) judge_viewer(i);
    }
  }

 private:
  void collect_sends() {
    for (std::uint32_t p = 0; p < kMostLives; ++p) {
      const Life& life = log_.life[p];
      deaths_ += life.end == End::Killed;
      tally_.looks += life.looks;
      for (std::uint32_t i = 0; i < life.sends.load(); ++i) {
        messages_[Key{p} << 32 | i].send = &life.sent[i];
        tally_.sent += life.sent[i].fate == Fate::Returned;
      }
    }
  }

  void collect_events(std::uint32_t index) {
    const Life& life = log_.life[index];
    const std::uint32_t count = life.events.load();
    std::map<std::uint32_t, std::uint64_t> last_position;
    for (std::uint32_t i = 0; i < count; ++i) {
      const Event& event = life.seen[i];
      auto found = messages_.find(key_of(event));
      if (found == messages_.end()) {
        complain_(Fault::Torn,
                  "life " + std::to_string(index) + " got a message that nobody sent: producer " +
                      std::to_string(event.producer) + " sequence " + std::to_string(event.sequence));
        continue;
      }
      auto& deliveries = found->second.by_group[event.group];
      if (event.what == What::Got) {
        deliveries.push_back({index, &event});
        ++tally_.received;
        tally_.letters += event.is_letter;
        tally_.redelivered += event.attempts != 0 && !event.is_letter;
        // A dead letter that was sent to its group again starts anew, where it stands.
        if (event.attempts != 0 || plan_.options.max_deliveries == 1) continue;
        auto last = last_position.find(event.group);
        if (last != last_position.end() && event.position <= last->second) {
          complain_(Fault::Disordered, "life " + std::to_string(index) + " got position " +
                                           std::to_string(event.position) + " after " +
                                           std::to_string(last->second));
        }
        last_position[event.group] = event.position;
        continue;
      }
      auto mine = std::find_if(deliveries.rbegin(), deliveries.rend(),
                               [index](const Delivery& d) { return d.life == index; });
      if (mine == deliveries.rend()) continue;
      if (event.what == What::Released) {
        mine->released = true;
      } else {
        mine->given_back = &event;
        ++tally_.given_back;
      }
    }
  }

  /// One message, one group: who had it one after the other.
  void judge(Key key, Message& message, std::vector<Delivery>& deliveries) {
    if (deliveries.empty()) return;
    tally_.rolled_forward += message.send->fate == Fate::Intended;
    if (message.send->fate == Fate::Refused) {
      complain_(Fault::Other, "delivered although send() refused it: " + text_of(key, message));
    }
    std::stable_sort(deliveries.begin(), deliveries.end(),
                     [](const Delivery& a, const Delivery& b) { return a.got->at_ns < b.got->at_ns; });
    if (!message.has_position) message.position = deliveries[0].got->position;
    message.has_position = true;
    for (std::size_t i = 0; i < deliveries.size(); ++i) {
      const Event& got = *deliveries[i].got;
      if (got.position != message.position) {
        complain_(Fault::Disordered, "one message at two positions: " + text_of(key, message));
      }
      if (!got.is_letter && got.attempts >= plan_.options.max_deliveries) {
        complain_(Fault::Other, "delivered more often than allowed: " + text_of(key, message));
      }
      if (got.is_letter && got.attempts < plan_.options.max_deliveries) {
        complain_(Fault::Other, "a dead letter too early: " + text_of(key, message));
      }
      if (i > 0) judge_repeat(key, message, deliveries[i - 1], deliveries[i]);
    }
    if (deliveries[0].got->attempts > 0 && deaths_ == 0 && plan_.give_back_one_in == 0) {
      complain_(Fault::Duplicated, "flagged though nobody died: " + text_of(key, message));
    }
  }

  void judge_repeat(Key key, const Message& message, const Delivery& before, const Delivery& after) {
    const Life& holder = log_.life[before.life];
    const bool revived = before.given_back != nullptr && before.given_back->what == What::Reviving;
    const bool letters = before.got->is_letter && after.got->is_letter;
    if (!revived && !letters && after.got->attempts <= before.got->attempts) {
      complain_(Fault::Duplicated, "again without a higher number of attempts: " + text_of(key, message));
      return;
    }
    if (before.got->is_letter && !after.got->is_letter && !revived) {
      complain_(Fault::Duplicated, "a dead letter was delivered again: " + text_of(key, message));
      return;
    }
    if (before.released) {
      complain_(Fault::Duplicated, "again after its release: " + text_of(key, message));
      return;
    }
    std::int64_t let_go_ns = 0;
    if (before.given_back != nullptr) {
      let_go_ns = before.given_back->at_ns;
    } else if (holder.end == End::Killed) {
      let_go_ns = holder.killed_ns;
    } else {
      complain_(Fault::Duplicated, "again though its holder lived: " + text_of(key, message));
      return;
    }
    if (after.got->at_ns < let_go_ns) {
      complain_(Fault::Duplicated, "two holders at a time: " + text_of(key, message));
    }
    if (plan_.drops && before.given_back == nullptr && before.got->group != kDefaultGroup &&
        !before.got->is_letter) {
      complain_(Fault::Duplicated, "again where the dead's messages are dropped: " + text_of(key, message));
    }
    // How long it took, for the waiting: as long as somebody was there who was not being stopped.
    if (before.given_back == nullptr && after.got->attempts == before.got->attempts + 1 && !plan_.stops &&
        !after.got->is_letter && after.life != kMostLives - 1) {
      const Life& taker = log_.life[after.life];
      tally_.redelivery.add(after.got->at_ns - std::max(let_go_ns, taker.joined_ns));
    }
  }

  /// For a group that was there all the time.
  void judge_losses(std::uint32_t group, std::uint64_t dropped) {
    std::uint64_t missing = 0;
    std::uint64_t intended = 0;
    const Message* example = nullptr;
    Key example_key = 0;
    for (const auto& [key, message] : messages_) {
      auto found = message.by_group.find(group);
      if (found != message.by_group.end() && !found->second.empty()) continue;
      intended += message.send->fate == Fate::Intended;
      if (message.send->fate != Fate::Returned) continue;
      ++missing;
      if (example == nullptr) {
        example = &message;
        example_key = key;
      }
    }
    tally_.dropped += dropped;
    // Whoever takes something to drop it, and dies, may leave it uncounted.
    std::uint64_t most = 0;
    if (plan_.policy == Backpressure::DropOldest) {
      most = dropped + deaths_;
      if (dropped > missing + deaths_ + intended) {
        complain_(Fault::Other, "group " + std::to_string(group) + ": " + std::to_string(missing) +
                                    " messages are missing, " + std::to_string(dropped) +
                                    " are counted as dropped");
      }
    } else if (plan_.shape == Shape::DeadLetters) {
      most = counts_.letters_dropped == 0 && deaths_ == 0 ? 0 : counts_.letters_dropped + dropped + deaths_;
    } else if (plan_.drops && group != kDefaultGroup) {
      for (const Life& life : log_.life) {
        if (life.end == End::Killed && life.role == Role::Consumer && life.group == group)
          most += plan_.most_held + 1;
      }
    }
    if (missing <= most) return;
    complain_(Fault::Lost, "group " + std::to_string(group) + " lacks " + std::to_string(missing) +
                               " messages, " + std::to_string(most) + " may be; send() had returned for " +
                               text_of(example_key, *example));
  }

  /// A viewer gets every message that was sent after it had joined, up to the last that it got.
  void judge_viewer(std::uint32_t index) {
    const Life& life = log_.life[index];
    std::vector<std::uint64_t> positions;
    std::uint64_t begin = 0;
    bool has_begun = false;
    std::uint64_t uncertain = 0;  // messages whose senders may have looked at the groups before it joined
    for (const auto& [key, message] : messages_) {
      const Send& send = *message.send;
      uncertain +=
          send.intended_ns <= life.joined_ns && (send.returned_ns == 0 || send.returned_ns >= life.asked_ns);
      auto found = message.by_group.find(life.group);
      if (found == message.by_group.end() || found->second.empty()) continue;
      positions.push_back(message.position);
      tally_.old_messages += send.returned_ns != 0 && send.returned_ns < life.asked_ns;
      if (send.intended_ns > life.joined_ns && (!has_begun || message.position < begin)) {
        begin = message.position;
        has_begun = true;
      }
    }
    if (!has_begun) return;
    std::sort(positions.begin(), positions.end());
    std::uint64_t gaps = 0;
    std::uint64_t expected = begin;
    for (std::uint64_t position : positions) {
      if (position < begin) continue;
      for (; expected < position && gaps < 1'000'000; expected = slots::next_position(expected)) ++gaps;
      expected = slots::next_position(position);
    }
    std::uint64_t most = uncertain;
    if (plan_.policy == Backpressure::DropOldest) {
      if (life.end != End::Left) return;  // what it had lost is not known
      most += life.lost + deaths_;
    }
    if (gaps > most) {
      complain_(Fault::Lost, "viewer " + std::to_string(index) + " got " + std::to_string(positions.size()) +
                                 " messages with " + std::to_string(gaps) +
                                 " gaps after it had joined, counted " + std::to_string(life.lost) +
                                 ", uncertain " + std::to_string(uncertain));
    }
  }

  // One position, one message; and what one producer sent one after the other stands in that order.
  void judge_positions() {
    if (plan_.shape == Shape::Creators) return;  // regions come and go under one name
    std::map<std::uint64_t, Key> at;
    std::uint32_t producer = kMostLives;
    std::uint64_t last = 0;
    for (const auto& [key, message] : messages_) {
      if (!message.has_position) continue;
      const std::uint64_t position = message.position;
      if (!at.emplace(position, key).second) {
        complain_(Fault::Disordered, "position " + std::to_string(position) +
                                         " has two messages: " + text_of(key, message) + " and " +
                                         text_of(at[position], messages_[at[position]]));
      }
      if (key >> 32 == producer && position <= last) {
        complain_(Fault::Disordered, "overtaken by a later one of its producer: " + text_of(key, message));
      }
      producer = static_cast<std::uint32_t>(key >> 32);
      last = position;
    }
  }

  const Plan& plan_;
  const Log& log_;
  const Counts& counts_;
  Tally& tally_;
  const Complain& complain_;
  std::map<Key, Message> messages_;
  std::uint64_t deaths_ = 0;
};

}  // namespace

void judge_messages(const Plan& plan, const Log& log, const Counts& counts, Tally& tally,
                    const Complain& complain) {
  Judge(plan, log, counts, tally, complain).run();
}

std::uint32_t kept_messages(const memory::Region& region) {
  if (!region.keeps_history()) return 0;
  std::uint32_t kept = 0;
  for (std::uint32_t s = 0; s < region.geometry().slots; ++s) {
    const SlotWord word{region.slot(s).word.load()};
    kept += word.is(slots::SlotPhase::Committed) && word.pending() == 1u << region.retention_group();
  }
  return kept;
}

void judge_region(const memory::Region& region, std::uint32_t handles, std::uint32_t durable,
                  std::uint32_t history, const Complain& complain) {
  const memory::Geometry& g = region.geometry();
  const std::uint32_t retained = region.keeps_history() ? 1u << region.retention_group() : 0;
  bool clean = true;
  for (std::uint32_t s = 0; s < g.slots; ++s) {
    const SlotWord word{region.slot(s).word.load()};
    const bool is_history =
        word.is(slots::SlotPhase::Committed) && word.pending() == retained && retained != 0;
    clean = clean && (word.is_free() || is_history);
  }
  if (!clean || kept_messages(region) > history)
    complain(Fault::Leaked, "slots are not free: " + dump_region(region));
  std::uint32_t used = 0;
  for (std::uint32_t i = 0; i < g.participants; ++i) used += (region.participant(i).word.load() & 0xFF) != 0;
  if (used != handles) {
    complain(Fault::Leaked, std::to_string(used) + " participants, " + std::to_string(handles) + " handles");
  }
  const auto groups = static_cast<std::uint32_t>(region.header().active.load()) & region.group_bits();
  const std::uint32_t wanted =
      (region.rules().default_group != 0 ? 1 : 0) + (retained != 0 ? 1 : 0) + durable;
  if (static_cast<std::uint32_t>(std::popcount(groups)) != wanted) {
    complain(Fault::Leaked, "groups of the dead: " + dump_region(region));
  }
  std::uint64_t bits = 0;
  for (const auto& word : region.header().space.waiters) bits |= word.load();
  for (std::uint32_t i = 0; i < g.groups; ++i) {
    for (const auto& word : region.group(i).messages.waiters) bits |= word.load();
  }
  if (bits != 0) complain(Fault::Leaked, "waiter bits of the dead: " + dump_region(region));
}

std::string dump_region(const memory::Region& region) {
  const memory::Geometry& g = region.geometry();
  char line[200];
  std::snprintf(line, sizeof line, "active %llx tail %llu cursor %llu redeliver %llu;",
                static_cast<unsigned long long>(region.header().active.load()),
                static_cast<unsigned long long>(region.order().tail.load()),
                static_cast<unsigned long long>(region.group(0).cursor.load()),
                static_cast<unsigned long long>(region.group(0).redeliver.load()));
  std::string text = line;
  for (std::uint32_t s = 0; s < g.slots; ++s) {
    SlotWord word{region.slot(s).word.load()};
    if (word.is_free()) continue;
    std::snprintf(line, sizeof line, " slot %u gen %u owner %u phase %u pending %x position %llu", s,
                  word.generation(), word.owner(), static_cast<std::uint32_t>(word.phase()), word.pending(),
                  static_cast<unsigned long long>(region.slot(s).position.load()));
    text += line;
    for (std::uint32_t group = 0; group < g.groups; ++group) {
      Claim claim{region.claim(s, group).load()};
      if ((word.pending() >> group & 1) == 0) continue;
      std::snprintf(line, sizeof line, " claim[%u] %llu/%u/%x", group,
                    static_cast<unsigned long long>(claim.position_low()), claim.attempts(), claim.who());
      text += line;
    }
  }
  for (std::uint32_t i = 0; i < g.participants; ++i) {
    if ((region.participant(i).word.load() & 0xFF) == 0) continue;
    std::snprintf(line, sizeof line, " participant %u pid %u waits %llu", i, region.participant(i).pid.load(),
                  static_cast<unsigned long long>(region.participant(i).waiting_on.load()));
    text += line;
  }
  return text;
}

}  // namespace dsline::kill
