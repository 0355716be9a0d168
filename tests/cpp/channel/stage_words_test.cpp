#include "dsline/stage_words.hpp"

#include <gtest/gtest.h>
#include <signal.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <optional>
#include <random>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "base/clock.hpp"
#include "dsline/channel.hpp"
#include "support/channels.hpp"
#include "support/crash_points.hpp"

namespace dsline {
namespace {

using support::adopt;
using support::send;
using support::small;
using support::text_of;

using ChannelPtr = std::shared_ptr<Channel>;
using WordsPtr = std::shared_ptr<StageWords>;

constexpr std::int64_t kGlanceNs = 200'000;

/// What a message of the input is to the stage: a number of outputs, or a control frame, which has one.
int outputs_of(std::uint64_t sequence) { return sequence % 4 == 3 ? 0 : sequence % 4 == 2 ? 2 : 1; }
std::string output_of(std::uint64_t sequence, int number) {
  return std::to_string(sequence) + "." + std::to_string(number);
}

/// One process of a stage with one input and one output: the recipe of docs/design/stage-commit.md.
class Worker {
 public:
  Worker(const Channel& in, const Channel& out, WordsPtr words)
      : in_(adopt(in)), out_(adopt(out)), words_(std::move(words)) {}
  Worker(ChannelPtr in, ChannelPtr out, WordsPtr words)
      : in_(std::move(in)), out_(std::move(out)), words_(std::move(words)) {}

  Channel& in() { return *in_; }
  Channel& out() { return *out_; }

  /// One message, if there is one.
  bool step() {
    Received message;
    if (in_->try_recv(message) != Outcome::Ok) {
      in_->check_peers();
      pass_lost_turn();
      return false;
    }
    finish(message);
    return true;
  }

  /// Until the first `count` messages are done with and every turn that was given is over.
  void run_until(std::uint64_t count) {
    while (in_->anything_outstanding_before(count) || words_->done(0) < last_turn(count)) {
      if (!step()) std::this_thread::sleep_for(std::chrono::microseconds(50));
    }
  }

 private:
  struct State {
    std::uint64_t done;
    std::uint64_t offset;
  };

  // Of an unordered stage a message that is lost has no turn if it has drawn no ticket.
  std::uint64_t last_turn(std::uint64_t count) const {
    if (words_->tickets() == 0) return count;
    std::uint64_t sequence = 0, ticket = words_->done(0);
    return ticket + words_->sequence_of(ticket, sequence);
  }

  // How far the last message of the output says that the stage is.
  std::optional<State> settle() {
    while (out_->anyone_entering()) {
      if (!out_->check_peers()) std::this_thread::sleep_for(std::chrono::microseconds(50));
    }
    const std::uint64_t end = out_->end_of_order();
    State state{};
    if (end == 0 || !words_->intended(0, end - 1, state.offset, &state.done)) return std::nullopt;
    return state;
  }

  void finish(const Received& message) {
    const bool control = message.kind >= kEndMessage;
    std::uint64_t turn = message.sequence;
    if (words_->tickets() != 0) turn = ticket_of(message, control);
    while (words_->wait_turn(0, turn, base::monotonic_ns() + kGlanceNs, true) != Outcome::Ok) {
      in_->check_peers();
      pass_lost_turn();
    }
    if (words_->done(0) == turn) publish(message, control, turn);
    in_->release(message);
    words_->acknowledged();
  }

  std::uint64_t ticket_of(const Received& message, bool control) {
    std::uint64_t ticket = 0;
    if (message.attempts > 0 && words_->find(message.sequence, ticket)) return ticket;
    while (words_->draw(*in_, message.sequence, control, ticket, base::monotonic_ns() + kGlanceNs, true) !=
           Outcome::Ok) {
      in_->check_peers();
      Received earlier;
      if (in_->try_take_between(0, message.sequence, earlier) == Outcome::Ok) finish(earlier);
      pass_lost_turn();
    }
    return ticket;
  }

  // Nobody may be free for the message whose turn it is, or it is gone.
  void pass_lost_turn() {
    const std::uint64_t turn = words_->done(0);
    std::uint64_t sequence = turn;
    if (words_->tickets() != 0 && !words_->sequence_of(turn, sequence)) return;
    Received message;
    if (in_->try_take_between(sequence, sequence + 1, message) == Outcome::Ok) {
      finish(message);
    } else if (!in_->is_outstanding(sequence)) {
      const std::optional<State> state = settle();
      if (state && state->done > turn) {
        words_->commit(0, state->done);
      } else {
        words_->skip_lost(0, turn);
      }
    }
  }

  void publish(const Received& message, bool control, std::uint64_t turn) {
    int next = 0;
    if (message.attempts > 0) {
      if (const std::optional<State> state = settle()) {
        if (state->done > turn) return words_->commit(0, state->done);
        if (state->done == turn) next = static_cast<int>(state->offset);
      }
    }
    const int last = control ? 1 : outputs_of(message.sequence);
    for (int n = next; n < last; ++n) {
      const bool is_last = n + 1 == last;
      const std::uint64_t after = is_last ? turn + 1 : turn;
      words_->intend(0, out_->end_of_order(), is_last ? 0 : static_cast<std::uint64_t>(n + 1), &after);
      const std::string text = control ? "control" : output_of(message.sequence, n);
      while (out_->try_send(text.data(), text.size(), control ? message.kind : kBytesMessage, nullptr, 0, 0,
                            Backpressure::Raise) == Outcome::Full) {
        static_cast<void>(out_->wait_for_space(base::monotonic_ns() + 10'000'000, false));
      }
    }
    words_->commit(0, turn + 1);
  }

  ChannelPtr in_, out_;
  WordsPtr words_;
};

struct Stage {
  explicit Stage(std::uint32_t tickets, std::uint32_t max_deliveries = 15, std::uint32_t capacity = 8)
      : words(StageWords::create(1, 1, tickets)) {
    ChannelOptions options = small(capacity);
    options.max_handles = 64;
    options.max_deliveries = max_deliveries;
    in = Channel::create_anonymous(options);
    out = Channel::create_anonymous(options);
  }
  /// `marker`: sequence of a control frame; none where it is not below `count`.
  void feed(std::uint64_t count, std::uint64_t marker = ~std::uint64_t{0}) {
    for (std::uint64_t i = 0; i < count; ++i) {
      ASSERT_EQ(in->try_send("x", 1, i == marker ? kMarkerMessage : kBytesMessage, nullptr, 0, 0,
                             Backpressure::Raise),
                Outcome::Ok);
    }
  }
  std::vector<std::string> results() {
    std::vector<std::string> all;
    for (std::string text; (text = support::next(*out)) != "(empty)";) all.push_back(text);
    return all;
  }

  WordsPtr words;
  ChannelPtr in, out;
};

/// What messages [0, count) become in order.
std::vector<std::string> wanted(std::uint64_t count, std::uint64_t marker = ~std::uint64_t{0}) {
  std::vector<std::string> all;
  for (std::uint64_t i = 0; i < count; ++i) {
    if (i == marker) {
      all.emplace_back("control");
      continue;
    }
    for (int n = 0; n < outputs_of(i); ++n) all.push_back(output_of(i, n));
  }
  return all;
}

TEST(StageWords, ACommittedValueNeverGoesBack) {
  const WordsPtr words = StageWords::create(2, 1, 0);
  words->commit(1, 5);
  words->commit(1, 4);
  EXPECT_EQ(words->done(1), 5u);
  EXPECT_EQ(words->done(0), 0u);
  EXPECT_FALSE(words->skip_lost(1, 4));
  EXPECT_TRUE(words->skip_lost(1, 5));
  EXPECT_EQ(words->done(1), 6u);
  EXPECT_EQ(words->lost(1), 1u);
}

TEST(StageWords, AnIntentBelongsToOnePosition) {
  const WordsPtr words = StageWords::create(3, 2, 0);
  std::uint64_t offset = 0, after[3] = {1, 2, 3}, found[3] = {};
  EXPECT_FALSE(words->intended(1, 0, offset, found));
  EXPECT_FALSE(words->intended(1, ~std::uint64_t{0}, offset, found));
  words->intend(1, 8, 7, after);
  EXPECT_FALSE(words->intended(0, 8, offset, found));
  EXPECT_FALSE(words->intended(1, 6, offset, found));
  ASSERT_TRUE(words->intended(1, 8, offset, found));
  EXPECT_EQ(offset, 7u);
  EXPECT_EQ(found[2], 3u);
  words->intend(1, 9, 0, after);
  EXPECT_TRUE(words->intended(1, 8, offset, found));
  words->intend(1, 10, 0, after);
  EXPECT_FALSE(words->intended(1, 8, offset, found));
  EXPECT_TRUE(words->intended(1, 9, offset, found));
}

TEST(StageWords, SleepersAreWokenByEachStep) {
  const WordsPtr words = StageWords::create(1, 1, 0);
  std::thread waiter([&] {
    for (std::uint64_t turn = 1; turn <= 200; ++turn) {
      while (words->wait_turn(0, turn, support::patience(), false) != Outcome::Ok) {
      }
    }
  });
  for (std::uint64_t turn = 1; turn <= 200; ++turn) {
    if (turn % 7 == 0) std::this_thread::sleep_for(std::chrono::microseconds(200));
    words->commit(0, turn);
  }
  waiter.join();
  EXPECT_EQ(words->wait_turn(0, 201, 0, false), Outcome::TimedOut);
}

TEST(StageWords, OtherBytesAreNoStage) {
  const auto channel = Channel::create_anonymous(small());
  EXPECT_EQ(support::code_of([&] { StageWords::adopt(dup(channel->descriptor())); }),
            ErrorCode::ChannelLayout);
  const WordsPtr words = StageWords::create(2, 3, 5);
  const WordsPtr again = StageWords::adopt(dup(words->descriptor()));
  EXPECT_EQ(again->inputs(), 2u);
  EXPECT_EQ(again->outputs(), 3u);
  EXPECT_EQ(again->tickets(), 8u);
  again->commit(1, 3);
  EXPECT_EQ(words->done(1), 3u);
}

TEST(StageWords, ThreadsDrawEachTicketOnce) {
  ChannelOptions options = small(64);
  const auto in = Channel::create_anonymous(options);
  const WordsPtr words = StageWords::create(1, 1, 16);
  constexpr std::uint64_t kMessages = 4000;
  std::vector<std::uint64_t> drawn(kMessages);
  auto work = [&] {
    Received message;
    for (;;) {
      if (in->try_recv(message) != Outcome::Ok) {
        if (words->done(0) == kMessages) return;
        std::this_thread::yield();
        continue;
      }
      std::uint64_t ticket = 0;
      while (words->draw(*in, message.sequence, false, ticket, support::patience(), true) != Outcome::Ok) {
      }
      drawn[message.sequence] = ticket + 1;
      while (words->wait_turn(0, ticket, support::patience(), true) != Outcome::Ok) {
      }
      words->commit(0, ticket + 1);
      in->release(message);
      words->acknowledged();
    }
  };
  std::thread one(work), two(work), three(work);
  for (std::uint64_t i = 0; i < kMessages;) {
    if (send(*in, "x") == Outcome::Ok) {
      ++i;
    } else {
      std::this_thread::yield();
    }
  }
  one.join();
  two.join();
  three.join();
  std::sort(drawn.begin(), drawn.end());
  for (std::uint64_t i = 0; i < kMessages; ++i) ASSERT_EQ(drawn[i], i + 1);
}

TEST(StageWords, AStageWithoutDeaths) {
  for (const std::uint32_t tickets : {0u, 4u}) {
    Stage stage(tickets);
    stage.feed(8, 5);
    Worker worker(*stage.in, *stage.out, stage.words);
    worker.run_until(8);
    EXPECT_EQ(stage.results(), wanted(8, 5));
    EXPECT_EQ(stage.words->lost(0), 0u);
  }
}

#if defined(DSLINE_CRASH_POINTS)
using support::CrashPoint;
using support::Ending;

/// A worker that dies before its `at`-th store into any of the three regions.
Ending die_in(Stage& stage, int at, std::uint64_t until) {
  return CrashPoint::die_before(at, [&](CrashPoint& point) {
    Worker worker(*stage.in, *stage.out, stage.words);
    point.arm(stage.in->descriptor(), stage.out->descriptor(), stage.words->descriptor());
    worker.run_until(until);
  });
}

void expect_everything_once(Stage& stage, std::uint64_t count, std::uint64_t marker) {
  EXPECT_EQ(stage.words->done(0), count);
  EXPECT_EQ(stage.words->lost(0), 0u);
  EXPECT_EQ(stage.in->stats().free_slots, stage.in->capacity());
  stage.out->check_peers();  // what a dead one had committed and nobody waited for comes to light
  std::vector<std::string> results = stage.results();
  std::vector<std::string> all = wanted(count, marker);
  if (stage.words->tickets() != 0) {  // of each message in order, and on its side of the control frame
    const auto order = [](const std::string& text) { return std::stoul(text); };
    const auto here = std::find(results.begin(), results.end(), "control");
    ASSERT_NE(here, results.end());
    std::stable_sort(results.begin(), here, [&](auto& a, auto& b) { return order(a) < order(b); });
    std::stable_sort(here + 1, results.end(), [&](auto& a, auto& b) { return order(a) < order(b); });
  }
  EXPECT_EQ(results, all);
}

// Messages 1 to 4 of the stage are one with one output, one with two, one with none, and a control frame.
constexpr std::uint64_t kCount = 5;
constexpr std::uint64_t kMarker = 4;

TEST(StageDeaths, OnceAtEveryStore) {
  for (const std::uint32_t tickets : {0u, 2u}) {
    for (int at = 1;; ++at) {
      Stage stage(tickets);
      stage.feed(kCount, kMarker);
      std::optional<Worker> heir;
      if (at % 2 == 0) heir.emplace(*stage.in, *stage.out, stage.words);
      const Ending ending = die_in(stage, at, kCount);
      ASSERT_NE(ending, Ending::Failed) << "store " << at;
      if (!heir) heir.emplace(*stage.in, *stage.out, stage.words);
      heir->run_until(kCount);
      SCOPED_TRACE("tickets " + std::to_string(tickets) + ", store " + std::to_string(at));
      // The last release may be missing: the message is done and comes again.
      heir->in().check_peers();
      heir->step();
      expect_everything_once(stage, kCount, kMarker);
      if (testing::Test::HasFailure()) return;
      if (ending == Ending::Finished) {
        EXPECT_GT(at, 50);
        break;
      }
    }
  }
}

// The second one dies while it takes over from the first.
TEST(StageDeaths, TwiceInARow) {
  for (const std::uint32_t tickets : {0u, 2u}) {
    bool finished = false;
    for (int first = 1; !finished; ++first) {
      for (int second = 1 + first % 37;; second += 37) {
        Stage stage(tickets);
        stage.feed(3, 2);
        finished = die_in(stage, first, 3) == Ending::Finished;
        const Ending ending = die_in(stage, second, 3);
        ASSERT_NE(ending, Ending::Failed) << "stores " << first << " and " << second;
        Worker heir(*stage.in, *stage.out, stage.words);
        heir.run_until(3);
        SCOPED_TRACE("tickets " + std::to_string(tickets) + ", stores " + std::to_string(first) + " and " +
                     std::to_string(second));
        heir.in().check_peers();
        heir.step();
        expect_everything_once(stage, 3, 2);
        if (testing::Test::HasFailure()) return;
        if (ending == Ending::Finished) break;
      }
    }
  }
}

// Nobody but one who waits for the next turn is left to take the message of the dead.
TEST(StageDeaths, WhoWaitsForTheNextTurnTakesOver) {
  for (const std::uint32_t tickets : {0u, 2u}) {
    for (int at = 1;; ++at) {
      Stage stage(tickets);
      stage.feed(kCount, kMarker);
      Worker heir(*stage.in, *stage.out, stage.words);
      const Ending ending = CrashPoint::die_before(at, [&](CrashPoint& point) {
        Worker worker(*stage.in, *stage.out, stage.words);
        point.arm(stage.in->descriptor(), stage.out->descriptor(), stage.words->descriptor());
        worker.step();
      });
      ASSERT_NE(ending, Ending::Failed) << "store " << at;
      heir.step();  // without a look at the dead: before it did, another message may come
      heir.run_until(kCount);
      heir.in().check_peers();
      heir.step();
      SCOPED_TRACE("tickets " + std::to_string(tickets) + ", store " + std::to_string(at));
      expect_everything_once(stage, kCount, kMarker);
      if (testing::Test::HasFailure()) return;
      if (ending == Ending::Finished) break;
    }
  }
}

// A message that kills everybody becomes a dead letter; what was published of it stays, and the others go on.
TEST(StageDeaths, APoisonedMessageIsSkippedOnceAndCounted) {
  for (const std::uint32_t tickets : {0u, 4u}) {
    bool was_lost = false, was_out = false;
    for (int at = 1;; ++at) {
      Stage stage(tickets, 1);
      stage.feed(4);
      Worker before(*stage.in, *stage.out, stage.words);
      before.step();
      before.step();
      ASSERT_EQ(stage.words->done(0), 2u);  // the next one has two outputs
      Ending ending = die_in(stage, at, 3);
      ASSERT_NE(ending, Ending::Failed) << "store " << at;
      if (ending == Ending::Finished) break;
      Received again;  // whoever gets it again dies as well
      before.in().check_peers();
      if (before.in().try_take_between(2, 3, again) == Outcome::Ok) {
        before.in().give_back(again);
      }
      Worker heir(*stage.in, *stage.out, stage.words);
      heir.run_until(4);
      SCOPED_TRACE("tickets " + std::to_string(tickets) + ", store " + std::to_string(at));
      stage.out->check_peers();
      const std::vector<std::string> results = stage.results();
      const std::vector<std::string> all = wanted(4);
      EXPECT_LE(results.size(), all.size());
      EXPECT_TRUE(std::equal(results.begin(), results.end(), all.begin()));
      const std::uint64_t lost = stage.words->lost(0);
      if (lost != 0) {
        EXPECT_EQ(lost, 1u);
        EXPECT_LT(results.size(), all.size()) << "it was complete";
      }
      was_lost = was_lost || lost != 0;
      was_out = was_out || (lost == 0 && results.size() == all.size());
      EXPECT_EQ(stage.in->stats().free_slots, 8 - stage.in->stats().dead_letters);
      if (testing::Test::HasFailure()) return;
    }
    EXPECT_TRUE(was_lost && was_out);
  }
}
#endif

}  // namespace
}  // namespace dsline
