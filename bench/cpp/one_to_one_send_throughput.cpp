// P1 ──▶ C1: the C++ loop over the same slots, without Python: the limit of what the binding can reach.
//
// Timed by the receiver, from its first message to its last; not timed: starting and mapping. The first eight bytes of
// every message carry its number, which the receiver checks. Both sides wait as a Python handle does.
//
//   one_to_one_send_throughput --message-size 64 --count 1000000 --slots 64 [--cpus 0,1]
// prints {"seconds": …, "messages_per_second": …, "GB_per_second": …}.

#include <sys/wait.h>
#include <unistd.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <string>
#include <vector>

#include "base/clock.hpp"
#include "dsline/channel.hpp"
#include "pin.hpp"

namespace {

int receive(dsline::Channel& channel, std::uint64_t size, std::uint64_t count) {
  dsline::Received message;
  std::int64_t start = 0;
  for (std::uint64_t i = 0; i < count; ++i) {
    if (channel.recv(message, std::numeric_limits<std::int64_t>::max()) != dsline::Outcome::Ok) return 2;
    std::uint64_t number = i;
    if (size >= sizeof number) std::memcpy(&number, message.payload, sizeof number);
    if (number != i || message.payload_bytes != size) return 3;
    channel.release(message);
    if (i == 0) start = dsline::base::monotonic_ns();
  }
  double seconds = static_cast<double>(dsline::base::monotonic_ns() - start) * 1e-9;
  double rate = static_cast<double>(count - 1) / seconds;
  std::printf("{\"seconds\": %.6f, \"messages_per_second\": %.0f, \"GB_per_second\": %.3f}\n", seconds, rate,
              rate * static_cast<double>(size) * 1e-9);
  std::fflush(stdout);
  return 0;
}

}  // namespace

int main(int argc, char** argv) {
  std::uint64_t size = 64;
  std::uint64_t count = 1000000;
  std::uint32_t slots = 64;
  int cpus[2] = {-1, -1};
  for (int i = 1; i < argc; i += 2) {
    std::string option = argv[i];
    std::uint64_t value = i + 1 < argc ? std::strtoull(argv[i + 1], nullptr, 10) : 0;
    if (option == "--cpus" && i + 1 < argc && std::sscanf(argv[i + 1], "%d,%d", &cpus[0], &cpus[1]) == 2)
      continue;
    if (option == "--message-size" && value >= 1) {
      size = value;
    } else if (option == "--count" && value >= 2) {
      count = value;
    } else if (option == "--slots" && value >= 1) {
      slots = static_cast<std::uint32_t>(value);
    } else {
      std::fprintf(stderr, "usage: %s --message-size BYTES --count N --slots N [--cpus A,B]\n", argv[0]);
      return 2;
    }
  }
  try {
    dsline::ChannelOptions options;
    options.capacity = slots;
    options.slot_size = size;
    auto channel = dsline::Channel::create_anonymous(options);
    pid_t child = fork();
    if (child == 0) {
      pin(cpus[1]);
      _exit(receive(*channel, size, count));
    }
    pin(cpus[0]);
    std::vector<char> payload(size, 1);
    for (std::uint64_t i = 0; i < count; ++i) {
      if (size >= sizeof i) std::memcpy(payload.data(), &i, sizeof i);
      channel->send(payload.data(), size, dsline::Backpressure::Block,
                    std::numeric_limits<std::int64_t>::max());
    }
    int status = 1;
    waitpid(child, &status, 0);
    return WIFEXITED(status) ? WEXITSTATUS(status) : 1;
  } catch (const dsline::Error& error) {
    std::fprintf(stderr, "%s\n", error.what());
    return 1;
  }
}
