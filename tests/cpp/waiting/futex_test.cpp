#include "waiting/futex.hpp"

#include <gtest/gtest.h>
#include <pthread.h>
#include <signal.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

#include <thread>

#include "base/clock.hpp"

namespace dsline::waiting {
namespace {

std::int64_t in_ms(std::int64_t ms) { return base::monotonic_ns() + ms * 1'000'000; }

TEST(Futex, AWordThatHasChangedCountsAsWoken) {
  base::Atomic<std::uint32_t> word{1};
  EXPECT_EQ(futex_wait(word, 0, base::kForever), Wake::Woken);
}

TEST(Futex, ADeadlineInThePastTimesOut) {
  base::Atomic<std::uint32_t> word{0};
  EXPECT_EQ(futex_wait(word, 0, base::monotonic_ns() - 1), Wake::TimedOut);
}

TEST(Futex, ADeadlineThatPassesTimesOutAndNotBefore) {
  base::Atomic<std::uint32_t> word{0};
  std::int64_t deadline = in_ms(3);
  EXPECT_EQ(futex_wait(word, 0, deadline), Wake::TimedOut);
  EXPECT_GE(base::monotonic_ns(), deadline);
}

TEST(Futex, ASleeperIsWoken) {
  base::Atomic<std::uint32_t> word{0};
  Wake wake = Wake::TimedOut;
  std::thread sleeper([&] { wake = futex_wait(word, 0, base::kForever); });
  word.store(1);
  futex_wake(word, 1);
  sleeper.join();
  EXPECT_EQ(wake, Wake::Woken);
}

TEST(Futex, AWakeReachesASleeperInAnotherProcessThatMapsTheWordReadOnly) {
  void* shared = mmap(nullptr, 4096, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
  ASSERT_NE(shared, MAP_FAILED);
  auto& word = *new (shared) base::Atomic<std::uint32_t>{0};
  pid_t child = fork();
  if (child == 0) {
    mprotect(shared, 4096, PROT_READ);
    while (word.load() == 0) {
      if (futex_wait(word, 0, base::monotonic_ns() + 60'000'000'000) == Wake::TimedOut) _exit(2);
    }
    _exit(0);
  }
  word.store(1);
  futex_wake(word, 1);
  int status = 0;
  ASSERT_EQ(waitpid(child, &status, 0), child);
  EXPECT_EQ(status, 0);
  munmap(shared, 4096);
}

TEST(Futex, OneOfManyIsWoken) {
  if (!can_wait_for_many()) GTEST_SKIP() << "this kernel has no futex_waitv";
  base::Atomic<std::uint32_t> words[3] = {};
  const Expected wanted[] = {{&words[0], 0}, {&words[1], 0}, {&words[2], 0}};
  std::size_t hit = 0;
  EXPECT_EQ(futex_wait_many(wanted, 3, base::monotonic_ns() + 1'000'000, hit), Wake::TimedOut);
  EXPECT_EQ(hit, 3u);
  std::atomic<bool> stop{false};
  std::thread waker([&] {
    // Until it sleeps there is nobody to wake, and the words do not change.
    while (!stop) futex_wake(words[1], 1);
  });
  std::size_t found = 3;
  EXPECT_EQ(futex_wait_many(wanted, 3, base::monotonic_ns() + 60'000'000'000, found), Wake::Woken);
  EXPECT_EQ(found, 1u);
  stop = true;
  waker.join();
  words[2] = 1;
  EXPECT_EQ(futex_wait_many(wanted, 3, base::monotonic_ns() + 60'000'000'000, hit), Wake::Woken);
  EXPECT_EQ(hit, 3u);
}

TEST(Futex, ASignalInterruptsTheSleep) {
  struct sigaction action {};
  struct sigaction before {};
  action.sa_handler = [](int) {};
  sigaction(SIGUSR1, &action, &before);
  base::Atomic<std::uint32_t> word{0};
  base::Atomic<bool> done{false};
  Wake wake = Wake::Woken;
  std::thread sleeper([&] {
    wake = futex_wait(word, 0, base::monotonic_ns() + 60'000'000'000);
    done = true;
  });
  // Signals that come before the sleep are lost, so they come until one has interrupted it.
  while (!done) {
    pthread_kill(sleeper.native_handle(), SIGUSR1);
    std::this_thread::yield();
  }
  sleeper.join();
  sigaction(SIGUSR1, &before, nullptr);
  EXPECT_EQ(wake, Wake::Interrupted);
}

}  // namespace
}  // namespace dsline::waiting
