#include "oracle.hpp"

#include <algorithm>
#include <cstdio>
#include <map>
#include <vector>

#include "slots/claim.hpp"
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
  const Event* given_back = nullptr;
};

struct Message {
  Fate fate;
  std::vector<Delivery> deliveries;
};

using Key = std::uint64_t;  // producer << 32 | sequence
Key key_of(const Event& event) { return Key{event.producer} << 32 | event.sequence; }

std::string text_of(Key key, const Message& message) {
  char line[160];
  std::snprintf(line, sizeof line, "message %u/%u (fate %d)", static_cast<std::uint32_t>(key >> 32),
                static_cast<std::uint32_t>(key), static_cast<int>(message.fate));
  std::string text = line;
  for (const Delivery& d : message.deliveries) {
    std::snprintf(line, sizeof line, "; life %u got position %llu attempts %u%s%s", d.life,
                  static_cast<unsigned long long>(d.got->position), d.got->attempts, d.released ? " released" : "",
                  d.given_back != nullptr ? " given back" : "");
    text += line;
  }
  return text;
}

class Judge {
 public:
  Judge(const Plan& plan, const Log& log, Tally& tally, const Complain& complain)
      : plan_(plan), log_(log), tally_(tally), complain_(complain) {}

  void run(std::uint64_t dropped_oldest) {
    collect_sends();
    for (std::uint32_t i = 0; i < kMostLives; ++i) collect_events(i);
    std::uint64_t missing = 0;
    for (auto& [key, message] : messages_) {
      judge(key, message);
      missing += message.fate == Fate::Returned && message.deliveries.empty();
    }
    judge_losses(missing, dropped_oldest);
    judge_positions();
  }

 private:
  void collect_sends() {
    for (std::uint32_t p = 0; p < kMostLives; ++p) {
      const Life& life = log_.life[p];
      deaths_ += life.end == End::Killed;
      for (std::uint32_t i = 0; i < life.sends.load(); ++i) {
        messages_[Key{p} << 32 | i].fate = life.sent[i].fate;
        tally_.sent += life.sent[i].fate == Fate::Returned;
      }
    }
  }

  void collect_events(std::uint32_t index) {
    const Life& life = log_.life[index];
    const std::uint32_t count = life.events.load();
    std::uint64_t last_position = 0;
    bool any = false;
    for (std::uint32_t i = 0; i < count; ++i) {
      const Event& event = life.seen[i];
      auto found = messages_.find(key_of(event));
      if (found == messages_.end()) {
        complain_(Fault::Torn, "life " + std::to_string(index) + " got a message that nobody sent: producer " +
                                   std::to_string(event.producer) + " sequence " + std::to_string(event.sequence));
        continue;
      }
      Message& message = found->second;
      if (event.what == What::Got) {
        message.deliveries.push_back({index, &event});
        ++tally_.received;
        tally_.redelivered += event.attempts != 0;
        if (event.attempts != 0) continue;
        if (any && event.position <= last_position) {
          complain_(Fault::Disordered, "life " + std::to_string(index) + " got position " +
                                           std::to_string(event.position) + " after " + std::to_string(last_position));
        }
        any = true;
        last_position = event.position;
        continue;
      }
      auto mine = std::find_if(message.deliveries.rbegin(), message.deliveries.rend(),
                               [index](const Delivery& d) { return d.life == index; });
      if (mine == message.deliveries.rend()) continue;
      if (event.what == What::Released) {
        mine->released = true;
      } else {
        mine->given_back = &event;
        ++tally_.given_back;
      }
    }
  }

  void judge(Key key, Message& message) {
    auto& deliveries = message.deliveries;
    if (deliveries.empty()) return;
    tally_.rolled_forward += message.fate == Fate::Intended;
    if (message.fate == Fate::Refused) {
      complain_(Fault::Other, "delivered although send() refused it: " + text_of(key, message));
    }
    std::stable_sort(deliveries.begin(), deliveries.end(), [](const Delivery& a, const Delivery& b) {
      return a.got->attempts != b.got->attempts ? a.got->attempts < b.got->attempts : a.got->at_ns < b.got->at_ns;
    });
    for (std::size_t i = 0; i < deliveries.size(); ++i) {
      if (deliveries[i].got->position != deliveries[0].got->position) {
        complain_(Fault::Disordered, "one message at two positions: " + text_of(key, message));
      }
      if (i > 0) judge_repeat(key, message, deliveries[i - 1], deliveries[i]);
    }
    if (deliveries[0].got->attempts > 0 && deaths_ == 0 && plan_.give_back_one_in == 0) {
      complain_(Fault::Duplicated, "flagged though nobody died: " + text_of(key, message));
    }
  }

  void judge_repeat(Key key, const Message& message, const Delivery& before, const Delivery& after) {
    const Life& holder = log_.life[before.life];
    if (after.got->attempts == before.got->attempts && after.got->attempts < Claim::kMaxAttempts) {
      complain_(Fault::Duplicated, "twice with one number of attempts: " + text_of(key, message));
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
    // How long it took, for the waiting: as long as somebody was there who was not being stopped.
    if (before.given_back == nullptr && after.got->attempts == before.got->attempts + 1 && !plan_.stops) {
      const Life& taker = log_.life[after.life];
      tally_.redelivery.add(after.got->at_ns - std::max(let_go_ns, taker.joined_ns));
    }
  }

  void judge_losses(std::uint64_t missing, std::uint64_t dropped_oldest) {
    if (plan_.shape == Shape::DropOldest) {
      tally_.dropped += dropped_oldest;
      // A producer that dies between taking the oldest and counting it, or between counting and releasing it.
      if (missing > dropped_oldest + deaths_ || dropped_oldest > missing + deaths_ + intended()) {
        complain_(Fault::Lost, std::to_string(missing) + " messages are missing, " +
                                   std::to_string(dropped_oldest) + " are counted as dropped, " +
                                   std::to_string(deaths_) + " processes died");
      }
      return;
    }
    if (missing == 0) return;
    for (const auto& [key, message] : messages_) {
      if (message.fate == Fate::Returned && message.deliveries.empty()) {
        complain_(Fault::Lost, "send() had returned, and nobody got it: " + text_of(key, message));
      }
    }
  }

  std::uint64_t intended() const {
    return static_cast<std::uint64_t>(std::count_if(messages_.begin(), messages_.end(), [](const auto& entry) {
      return entry.second.fate == Fate::Intended && entry.second.deliveries.empty();
    }));
  }

  // One position, one message; and what one producer sent one after the other stands in that order.
  void judge_positions() {
    if (plan_.shape == Shape::Creators) return;  // regions come and go under one name
    std::map<std::uint64_t, Key> at;
    std::uint32_t producer = kMostLives;
    std::uint64_t last = 0;
    for (const auto& [key, message] : messages_) {
      if (message.deliveries.empty()) continue;
      const std::uint64_t position = message.deliveries[0].got->position;
      if (!at.emplace(position, key).second) {
        complain_(Fault::Disordered, "position " + std::to_string(position) + " has two messages: " +
                                         text_of(key, message) + " and " + text_of(at[position], messages_[at[position]]));
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
  Tally& tally_;
  const Complain& complain_;
  std::map<Key, Message> messages_;
  std::uint64_t deaths_ = 0;
};

}  // namespace

void judge_messages(const Plan& plan, const Log& log, std::uint64_t dropped_oldest, Tally& tally,
                    const Complain& complain) {
  Judge(plan, log, tally, complain).run(dropped_oldest);
}

void judge_region(const memory::Region& region, std::uint32_t handles, const Complain& complain) {
  const memory::Geometry& g = region.geometry();
  bool clean = true;
  for (std::uint32_t s = 0; s < g.slots; ++s) {
    clean = clean && SlotWord{region.slot(s).word.load()}.is_free();
  }
  if (!clean) complain(Fault::Leaked, "slots are not free: " + dump_region(region));
  std::uint32_t used = 0;
  for (std::uint32_t i = 0; i < g.participants; ++i) used += (region.participant(i).word.load() & 0xFF) != 0;
  if (used != handles) {
    complain(Fault::Leaked, std::to_string(used) + " participants, " + std::to_string(handles) + " handles");
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
