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
