// Many messages between many members, each proving itself. What these tests show is that the counts come out for the
// interleavings that occurred; they cannot show that a rare one occurred.
#include <gtest/gtest.h>
#include <signal.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <cstring>
#include <functional>
#include <memory>
#include <new>
#include <random>
#include <thread>
#include <tuple>
#include <vector>

#include "base/atomic.hpp"
#include "base/crc32c.hpp"
#include "slots/position.hpp"
#include "support/channels.hpp"

namespace dsline {
namespace {

using support::adopt;
using support::patience;

#if defined(__SANITIZE_THREAD__) || defined(__SANITIZE_ADDRESS__)
constexpr std::uint32_t kSlowDown = 10;
#else
constexpr std::uint32_t kSlowDown = 1;
#endif

constexpr std::uint64_t kNearTheWrap = (std::uint64_t{1} << 44) - 700;

struct Payload {
  std::uint32_t producer;
  std::uint32_t sequence;
  unsigned char filling[40];
  std::uint32_t crc;

  static Payload make(std::uint32_t producer, std::uint32_t sequence) {
    Payload payload{};
    payload.producer = producer;
    payload.sequence = sequence;
    for (std::size_t i = 0; i < sizeof payload.filling; ++i) {
      payload.filling[i] = static_cast<unsigned char>(producer * 31 + sequence * 7 + i);
    }
    payload.crc = base::crc32c(&payload, offsetof(Payload, crc));
    return payload;
  }
};

/// What was sent and what arrived, in memory that processes share.
struct Ledger {
  static constexpr std::uint32_t kProducers = 160;
  static constexpr std::uint32_t kMessages = 100000;

  base::Atomic<std::uint32_t> committed[kProducers];  // messages that send() confirmed
  base::Atomic<std::uint32_t> arrived[kProducers][kMessages];
  base::Atomic<std::uint32_t> torn;
  base::Atomic<std::uint32_t> twice_without_mark;
  base::Atomic<std::uint32_t> out_of_order;
  base::Atomic<std::uint32_t> stuck;

  static Ledger* make() {
    void* at = mmap(nullptr, sizeof(Ledger), PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    return at == MAP_FAILED ? nullptr : new (at) Ledger{};
  }
};

struct Unmap {
  void operator()(Ledger* ledger) const { munmap(ledger, sizeof(Ledger)); }
};
using LedgerPtr = std::unique_ptr<Ledger, Unmap>;

ChannelOptions shape(std::uint32_t capacity) {
  ChannelOptions options = support::small(capacity);
  options.first_position = kNearTheWrap;
  options.checksum = 2;
  return options;
}

void produce(Channel& channel, Ledger& ledger, std::uint32_t producer, std::uint32_t count) {
  for (std::uint32_t i = 0; i < count; ++i) {
    Payload payload = Payload::make(producer, i);
    if (channel.send(&payload, sizeof payload, Backpressure::Block, patience()) != Outcome::Ok) {
      ++ledger.stuck;
      return;
    }
    ledger.committed[producer].store(i + 1);
  }
}

/// Until the channel is shut down and drained.
void consume(Channel& channel, Ledger& ledger, bool check_order = true) {
  std::vector<std::int64_t> last(Ledger::kProducers, -1);
  Received message;
  for (;;) {
    Outcome outcome = channel.recv(message, patience());
    if (outcome == Outcome::Closed) return;
    if (outcome != Outcome::Ok) {
      ++(outcome == Outcome::Corrupted ? ledger.torn : ledger.stuck);
      if (outcome == Outcome::Corrupted) continue;
      return;
    }
    Payload payload;
    if (message.payload_bytes == sizeof payload) std::memcpy(&payload, message.payload, sizeof payload);
    if (message.payload_bytes != sizeof payload ||
        payload.crc != base::crc32c(&payload, offsetof(Payload, crc)) ||
        payload.producer >= Ledger::kProducers || payload.sequence >= Ledger::kMessages) {
      ++ledger.torn;
    } else {
      if (ledger.arrived[payload.producer][payload.sequence].fetch_add(1) != 0 && message.attempts == 0) {
        ++ledger.twice_without_mark;
      }
      if (message.attempts == 0) {
        if (check_order && payload.sequence <= last[payload.producer]) ++ledger.out_of_order;
        last[payload.producer] = payload.sequence;
      }
    }
    channel.release(message);
  }
}

void expect_no_fault(const Ledger& ledger) {
  EXPECT_EQ(ledger.torn.load(), 0u);
  EXPECT_EQ(ledger.twice_without_mark.load(), 0u);
  EXPECT_EQ(ledger.out_of_order.load(), 0u);
  EXPECT_EQ(ledger.stuck.load(), 0u);
}

void expect_each_once(const Ledger& ledger, std::uint32_t producers, std::uint32_t count) {
  std::uint32_t wrong = 0;
  for (std::uint32_t p = 0; p < producers; ++p) {
    for (std::uint32_t i = 0; i < count; ++i) wrong += ledger.arrived[p][i].load() != 1;
  }
  EXPECT_EQ(wrong, 0u) << "of " << producers * count << " messages did not arrive exactly once";
}

struct Cast {
  std::uint32_t capacity;
  std::uint32_t producers;
  std::uint32_t consumers;
  std::uint32_t messages;  // per producer
  friend std::ostream& operator<<(std::ostream& out, const Cast& cast) {
    return out << cast.producers << " to " << cast.consumers << " through " << cast.capacity;
  }
};

class Stress : public testing::TestWithParam<Cast> {
 protected:
  void SetUp() override { ASSERT_NE(ledger, nullptr); }
  std::uint32_t messages() const { return GetParam().messages / kSlowDown; }
  void expect_all(Channel& channel) {
    expect_no_fault(*ledger);
    expect_each_once(*ledger, GetParam().producers, messages());
    EXPECT_EQ(channel.stats().free_slots, GetParam().capacity);
    EXPECT_EQ(channel.stats().corrupted, 0u);
    EXPECT_EQ(channel.stats().redelivered, 0u);
  }
  LedgerPtr ledger{Ledger::make()};
};

TEST_P(Stress, ThreadsThatShareOneHandle) {
  auto channel = Channel::create_heap(shape(GetParam().capacity));
  std::vector<std::thread> producers, consumers;
  for (std::uint32_t c = 0; c < GetParam().consumers; ++c)
    consumers.emplace_back([&] { consume(*channel, *ledger); });
  for (std::uint32_t p = 0; p < GetParam().producers; ++p) {
    producers.emplace_back([&, p] { produce(*channel, *ledger, p, messages()); });
  }
  for (std::thread& each : producers) each.join();
  channel->shutdown(false);
  for (std::thread& each : consumers) each.join();
  expect_all(*channel);
}

TEST_P(Stress, ThreadsWithHandlesOfTheirOwn) {
  auto channel = Channel::create_anonymous(shape(GetParam().capacity));
  std::vector<std::thread> producers, consumers;
  for (std::uint32_t c = 0; c < GetParam().consumers; ++c) {
    consumers.emplace_back([&] { consume(*adopt(*channel), *ledger); });
  }
  for (std::uint32_t p = 0; p < GetParam().producers; ++p) {
    producers.emplace_back([&, p] { produce(*adopt(*channel), *ledger, p, messages()); });
  }
  for (std::thread& each : producers) each.join();
  channel->shutdown(false);
  for (std::thread& each : consumers) each.join();
  EXPECT_EQ(channel->stats().participants, 1u);
  expect_all(*channel);
}

pid_t fork_to(const std::function<void()>& work) {
  pid_t child = fork();
  if (child == 0) {
    try {
      work();
    } catch (...) {
      _exit(1);
    }
    _exit(0);
  }
  return child;
}

void expect_success(pid_t child) {
  int status = -1;
  EXPECT_EQ(waitpid(child, &status, 0), child);
  EXPECT_EQ(status, 0);
}

TEST_P(Stress, Processes) {
  auto channel = Channel::create_anonymous(shape(GetParam().capacity));
  std::vector<pid_t> producers, consumers;
  for (std::uint32_t c = 0; c < GetParam().consumers; ++c) {
    consumers.push_back(fork_to([&] { consume(*channel, *ledger); }));
  }
  for (std::uint32_t p = 0; p < GetParam().producers; ++p) {
    producers.push_back(fork_to([&, p] { produce(*channel, *ledger, p, messages()); }));
  }
  for (pid_t each : producers) expect_success(each);
  channel->shutdown(false);
  for (pid_t each : consumers) expect_success(each);
  adopt(*channel);  // the children ended without closing
  expect_all(*channel);
  EXPECT_EQ(channel->stats().participants, 1u);
}

INSTANTIATE_TEST_SUITE_P(Casts, Stress,
                         testing::Values(Cast{1, 1, 1, 15000}, Cast{1, 2, 2, 8000}, Cast{2, 2, 2, 20000},
                                         Cast{3, 3, 2, 20000}, Cast{3, 1, 3, 40000}, Cast{64, 1, 1, 100000},
                                         Cast{64, 3, 3, 50000}));

TEST(StressDropOldest, EveryMessageArrivesOrIsCountedAsDropped) {
  for (std::uint32_t capacity : {1u, 3u, 64u}) {
    LedgerPtr ledger(Ledger::make());
    auto channel = Channel::create_anonymous(shape(capacity));
    const std::uint32_t count = 60000 / kSlowDown;
    base::Atomic<std::uint64_t> missed{0}, received{0}, end{kNearTheWrap};
    std::thread consumer([&] {
      auto mine = adopt(*channel);
      Received message;
      std::uint64_t expected = kNearTheWrap;
      for (;;) {
        Outcome outcome = mine->recv(message, patience());
        if (outcome == Outcome::Closed) break;
        if (outcome != Outcome::Ok) {
          ++ledger->stuck;
          break;
        }
        if (message.sequence < expected) ++ledger->out_of_order;
        for (; expected < message.sequence; expected = slots::next_position(expected)) ++missed;
        expected = slots::next_position(expected);
        ++received;
        mine->release(message);
      }
      end = expected;
    });
    std::vector<std::thread> producers;
    base::Atomic<std::uint64_t> entered{0}, discarded{0};
    for (std::uint32_t p = 0; p < 2; ++p) {
      producers.emplace_back([&, p] {
        auto mine = adopt(*channel);
        for (std::uint32_t i = 0; i < count; ++i) {
          Payload payload = Payload::make(p, i);
          Outcome outcome = mine->send(&payload, sizeof payload, Backpressure::DropOldest, 0);
          entered += outcome == Outcome::Ok;
          discarded += outcome == Outcome::Dropped;
        }
      });
    }
    for (std::thread& each : producers) each.join();
    channel->shutdown(false);
    consumer.join();
    ChannelStats stats = channel->stats();
    for (std::uint64_t p = end; p < stats.next_sequence; p = slots::next_position(p)) ++missed;
    EXPECT_EQ(entered + discarded, 2u * count) << capacity;
    EXPECT_EQ(discarded.load(), stats.dropped_newest) << capacity;
    EXPECT_EQ(missed.load(), stats.dropped_oldest) << capacity;
    EXPECT_EQ(received + missed, entered.load()) << capacity;
    EXPECT_EQ(ledger->out_of_order.load() + ledger->stuck.load(), 0u) << capacity;
    EXPECT_EQ(stats.free_slots, capacity);
  }
}

// Threads as peers over one mapping, so that ThreadSanitizer sees all of it: senders, a group of two members, a group
// that gives messages back, a history, and visitors that come late, read a little, and leave in various ways.
class GroupStress : public testing::TestWithParam<std::tuple<Backpressure, std::uint32_t>> {
 protected:
  static constexpr std::uint32_t kSenders = 2;
  static constexpr std::uint32_t kGroups = 2;
  // A sender that stands still keeps the numbers of groups that have ended: more than the four that are there at a time.
  static constexpr std::uint32_t kNumbers = 16;

  Backpressure policy() const { return std::get<0>(GetParam()); }
  std::uint32_t capacity() const { return std::get<1>(GetParam()); }

  void SetUp() override {
    count = (policy() == Backpressure::Block ? 12000 : 60000) / kSlowDown;
    ChannelOptions options = shape(capacity());
    options.default_group = 0;
    options.history = 2;
    options.max_groups = kNumbers;
    options.max_handles = kNumbers + 1;
    options.max_deliveries = 15;
    channel = Channel::create_heap(options);
    seen = std::vector<base::Atomic<std::uint32_t>>(std::size_t{kGroups} * kSenders * count);
  }

  static SubscribeOptions to(const char* group, Start start = Start::Next) {
    SubscribeOptions options;
    options.group = group;
    options.start = start;
    return options;
  }

  /// False, and counted, when the payload is not what its sender wrote.
  bool read(const Received& message, Payload& payload) {
    const bool whole = message.payload_bytes == sizeof payload;
    if (whole) std::memcpy(&payload, message.payload, sizeof payload);
    if (whole && payload.crc == base::crc32c(&payload, offsetof(Payload, crc)) &&
        payload.producer < kSenders && payload.sequence < count)
      return true;
    ++torn;
    return false;
  }

  void send_all(std::uint32_t sender) {
    auto mine = channel->again();
    for (std::uint32_t i = 0; i < count; ++i) {
      Payload payload = Payload::make(sender, i);
      const Outcome outcome = mine->send(&payload, sizeof payload, policy(), patience());
      entered += outcome == Outcome::Ok;
      refused += outcome == Outcome::Dropped;
      if (outcome != Outcome::Ok && outcome != Outcome::Dropped) {
        ++stuck;
        return;
      }
    }
  }

  /// A member of a group that is there from the first message to the last.
  void receive_all(Channel& mine, std::uint32_t group, bool gives_back) {
    Received message;
    std::uint64_t last = 0;
    for (std::uint32_t n = 0;; ++n) {
      const Outcome outcome = mine.recv(message, patience());
      if (outcome == Outcome::Closed) return;
      if (outcome != Outcome::Ok) {
        ++stuck;
        return;
      }
      if (message.attempts == 0) {
        disorder += message.sequence <= last;
        last = message.sequence;
      }
      Payload payload;
      if (!read(message, payload)) {
        mine.release(message);
      } else if (gives_back && message.attempts == 0 && n % 7 == 0) {
        given_back += 1;
        mine.give_back(message);
      } else {
        seen[(std::size_t{group} * kSenders + payload.producer) * count + payload.sequence].fetch_add(1);
        mine.release(message);
      }
    }
  }

  void visit(std::uint32_t seed) {
    std::mt19937 random(seed);
    static constexpr Start kStarts[] = {Start::Oldest, Start::Latest, Start::Next};
    Received message;
    do {
      auto mine =
          channel->subscribe(to(seed == 1 ? "first visitor" : "second visitor", kStarts[random() % 3]));
      arrivals += 1;
      std::uint64_t expected = 0;
      std::uint32_t gaps = 0;
      Outcome outcome = Outcome::Ok;
      for (std::uint32_t n = 1 + random() % 40;
           n > 0 && (outcome = mine->recv(message, patience())) == Outcome::Ok; --n) {
        Payload payload;
        read(message, payload);
        if (expected != 0) {
          disorder += message.sequence < expected;
          gaps += message.sequence != expected;
        }
        expected = slots::next_position(message.sequence);
        visited += 1;
        mine->release(message);
      }
      // Each sender may have looked at the groups just before this one joined, and entered its message later.
      unexplained += policy() == Backpressure::Block && gaps > kSenders;
      const std::uint32_t how = random() % 4;
      const bool holds = how != 0 && outcome == Outcome::Ok && mine->try_recv(message) == Outcome::Ok;
      if (how == 1) mine->close();
      if (holds && how < 3) mine->release(message);
      if (holds && how == 3) mine->give_back(message);
      visits += 1;
      if (outcome == Outcome::Closed) return;
    } while (!ended.load());
  }

  void run() {
    auto a1 = channel->subscribe(to("a")), a2 = channel->subscribe(to("a")), b = channel->subscribe(to("b"));
    std::vector<std::thread> readers, visitors, senders;
    readers.emplace_back([&] { receive_all(*a1, 0, false); });
    readers.emplace_back([&] { receive_all(*a2, 0, false); });
    readers.emplace_back([&] { receive_all(*b, 1, true); });
    for (std::uint32_t v = 1; v <= 2; ++v) visitors.emplace_back([this, v] { visit(v); });
#if !defined(__SANITIZE_THREAD__)  // it reads what may be written meanwhile, and asks afterwards
    visitors.emplace_back([this] { look_at_latest(); });
#endif
    while (arrivals.load() < 2) std::this_thread::yield();  // so that both get something
    for (std::uint32_t s = 0; s < kSenders; ++s) senders.emplace_back([this, s] { send_all(s); });
    for (std::thread& each : senders) each.join();
    ended = true;
    channel->shutdown(false);
    for (std::thread& each : visitors) each.join();
    for (std::thread& each : readers) each.join();
    lost[0] = a1->stats().dropped_oldest;
    lost[1] = b->stats().dropped_oldest;
    b_redelivered = b->stats().redelivered;
  }

  void look_at_latest() {
    Received message;
    std::uint64_t newest = 0;
    for (Outcome outcome;
         (outcome = channel->try_read_latest(newest == 0, newest, message)) != Outcome::Closed;) {
      if (outcome == Outcome::Ok) {
        Payload copy;
        std::memcpy(&copy, message.payload, sizeof copy);
        if (!channel->is_unchanged(message)) continue;
        disorder += message.sequence <= newest;
        newest = message.sequence;
        torn +=
            message.payload_bytes != sizeof copy || copy.crc != base::crc32c(&copy, offsetof(Payload, crc));
        looks += 1;
      } else if (outcome != Outcome::Empty) {
        ++torn;
        return;
      }
      channel->wait_for_newer(newest == 0, newest, patience(), true);
    }
  }

  std::uint32_t count = 0;
  std::shared_ptr<Channel> channel;
  std::vector<base::Atomic<std::uint32_t>> seen;
  base::Atomic<std::uint64_t> entered{0}, refused{0}, arrivals{0}, visited{0}, visits{0}, given_back{0},
      looks{0};
  base::Atomic<std::uint32_t> torn{0}, stuck{0}, disorder{0}, unexplained{0};
  base::Atomic<bool> ended{false};
  std::uint64_t lost[kGroups] = {};
  std::uint64_t b_redelivered = 0;
};

TEST_P(GroupStress, EveryGroupGetsEveryMessageOnceOrCountsItAsLost) {
  run();
  EXPECT_EQ(torn.load(), 0u);
  EXPECT_EQ(stuck.load(), 0u);
  EXPECT_EQ(disorder.load(), 0u);
  EXPECT_EQ(unexplained.load(), 0u);
  EXPECT_EQ(entered + refused, std::uint64_t{kSenders} * count);
  for (std::uint32_t g = 0; g < kGroups; ++g) {
    std::uint64_t arrived = 0, twice = 0;
    for (std::uint32_t i = 0; i < kSenders * count; ++i) {
      const std::uint32_t n = seen[std::size_t{g} * kSenders * count + i].load();
      arrived += n;
      twice += n > 1;
    }
    EXPECT_EQ(twice, 0u) << g;
    EXPECT_EQ(arrived + lost[g], entered.load()) << g;
  }
  const ChannelStats stats = channel->stats();
  EXPECT_EQ(stats.unheard, 0u);
  EXPECT_EQ(stats.corrupted, 0u);
  EXPECT_EQ(stats.buried, 0u);
  EXPECT_EQ(stats.dropped_newest, refused.load());
  if (policy() == Backpressure::Block) {
    EXPECT_EQ(lost[0] + lost[1] + refused.load(), 0u);
    EXPECT_EQ(b_redelivered, given_back.load());
    EXPECT_GT(given_back.load(), 0u);
  } else {
    EXPECT_GT(lost[0] + lost[1], 0u);
  }
  EXPECT_GE(visits.load(), 2u);
  EXPECT_GT(visited.load(), 0u);
  // What is left is the history.
  const Report report = channel->report();
  ASSERT_EQ(report.groups.size(), 1u);
  EXPECT_TRUE(report.groups[0].retention);
  EXPECT_EQ(stats.free_slots + report.groups[0].lag, capacity());
  EXPECT_LE(report.groups[0].lag, 2u);
  EXPECT_EQ(stats.participants, 1u);
  std::vector<std::shared_ptr<Channel>> more;
  for (std::uint32_t i = 0; i + 1 < channel->max_handles(); ++i)
    EXPECT_NO_THROW(more.push_back(channel->subscribe(to(std::to_string(i).c_str())))) << "a number is lost";
}

INSTANTIATE_TEST_SUITE_P(Policies, GroupStress,
                         testing::Combine(testing::Values(Backpressure::Block, Backpressure::DropOldest),
                                          testing::Values(3u, 8u, 64u)));

// Members die at random instants; each is replaced until enough have died.
class StressKill : public testing::TestWithParam<std::uint32_t> {};

TEST_P(StressKill, NothingThatWasCommittedIsLostAndDuplicatesAreMarked) {
  LedgerPtr ledger(Ledger::make());
  auto channel = Channel::create_anonymous(shape(GetParam()));
  std::mt19937 random(GetParam());
  constexpr std::uint32_t kKills = 120 / kSlowDown;
  std::uint32_t next_producer = 0;
  auto start_producer = [&] {
    std::uint32_t number = next_producer++;
    return fork_to([&, number] { produce(*channel, *ledger, number, Ledger::kMessages); });
  };
  auto start_consumer = [&] { return fork_to([&] { consume(*channel, *ledger); }); };
  std::vector<pid_t> producers{start_producer(), start_producer()};
  std::vector<pid_t> consumers{start_consumer(), start_consumer()};
  for (std::uint32_t i = 0; i < kKills; ++i) {
    const bool kill_consumer = random() % 2 == 0;
    std::vector<pid_t>& group = kill_consumer ? consumers : producers;
    pid_t& victim = group[random() % 2];
    // The instant is counted in messages, so that it falls into work and not into waiting.
    const std::uint32_t watched = next_producer - 1;
    const std::uint32_t goal = ledger->committed[watched].load() + 20 + random() % 300;
    for (std::int64_t end = patience();
         ledger->committed[watched].load() < std::min(goal, Ledger::kMessages);) {
      ASSERT_LT(base::monotonic_ns(), end) << "stuck after " << i << " kills";
      usleep(50);
    }
    kill(victim, SIGKILL);
    waitpid(victim, nullptr, 0);
    victim = kill_consumer ? start_consumer() : start_producer();
  }
  for (pid_t each : producers) {
    kill(each, SIGKILL);
    waitpid(each, nullptr, 0);
  }
  adopt(*channel);
  channel->shutdown(false);
  for (pid_t each : consumers) expect_success(each);
  adopt(*channel);

  expect_no_fault(*ledger);
  std::uint32_t lost = 0, phantoms = 0;
  for (std::uint32_t p = 0; p < next_producer; ++p) {
    const std::uint32_t committed = ledger->committed[p].load();
    for (std::uint32_t i = 0; i < committed; ++i) lost += ledger->arrived[p][i].load() == 0;
    // The one it died in may have been committed or not.
    for (std::uint32_t i = committed + 1; i < std::min(committed + 500, Ledger::kMessages); ++i)
      phantoms += ledger->arrived[p][i].load() != 0;
  }
  EXPECT_EQ(lost, 0u);
  EXPECT_EQ(phantoms, 0u);
  EXPECT_EQ(channel->stats().free_slots, GetParam());
  EXPECT_EQ(channel->stats().participants, 1u);
  EXPECT_EQ(channel->stats().corrupted, 0u);
  EXPECT_EQ(channel->depth(), 0u);
}

INSTANTIATE_TEST_SUITE_P(Capacities, StressKill, testing::Values(1u, 2u, 3u, 64u));

}  // namespace
}  // namespace dsline
