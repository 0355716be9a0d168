/// A region with damage: {mend}, then edits {offset:u16, length:u8, bytes}. Whoever attaches uses it for a while.

#include <fcntl.h>

#include "base/crc32c.hpp"
#include "fuzz/target.hpp"
#include "operations.hpp"

using namespace dsline;
using namespace dsline::robust;

namespace {

ChannelOptions options() {
  ChannelOptions o;
  o.capacity = 4;
  o.slot_size = o.max_message_size = 96;
  o.max_handles = 4;
  o.max_groups = 1;
  o.history = 2;
  o.max_deliveries = 2;
  o.dead_letters = 2;
  o.checksum = 1;
  o.schema = small_schema();
  return o;
}

/// What a process leaves that dies with a message in its hands, one in the channel, and a slot half written.
const std::string& ruin() {
  static const std::string bytes = [] {
    CallWatch watch;
    Tally tally;
    auto channel = Channel::create_anonymous(options());
    Peer peer(channel, watch, tally, 1);
    peer.send(Backpressure::Raise, 0);
    peer.send_array();
    peer.recv(0, Peer::Then::Keep);
    peer.borrow(true, true);
    Bytes all(channel->descriptor());
    std::string copy(reinterpret_cast<const char*>(all.data()), all.size());
    peer.finish(false);
    return copy;
  }();
  return bytes;
}

void mend_description(std::string& bytes) {
  memory::Geometry geometry;
  std::memcpy(&geometry, bytes.data() + offsetof(memory::RegionHeader, geometry), sizeof geometry);
  if (geometry.schema_bytes <= bytes.size() - memory::kSchemaOffset) {
    const std::uint32_t schema = base::crc32c(bytes.data() + memory::kSchemaOffset, geometry.schema_bytes);
    std::memcpy(bytes.data() + offsetof(memory::RegionHeader, schema_crc), &schema, sizeof schema);
  }
  constexpr std::size_t kCrc = offsetof(memory::RegionHeader, description_crc);
  constexpr std::size_t kBoot = offsetof(memory::RegionHeader, boot_id);
  constexpr std::size_t kBehind = offsetof(memory::RegionHeader, created_ns);
  const std::uint32_t crc =
      base::crc32c(bytes.data() + kBehind, kCrc - kBehind, base::crc32c(bytes.data(), kBoot));
  std::memcpy(bytes.data() + kCrc, &crc, sizeof crc);
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  Input input(data, size);
  const std::uint8_t how = input.take<std::uint8_t>();
  std::string bytes = ruin();
  while (input.left() > 3) {
    const std::size_t at = input.take<std::uint16_t>() % bytes.size();
    const std::size_t length = 1 + input.take<std::uint8_t>() % 32;
    for (std::size_t i = 0; i < length && input.left() > 0 && at + i < bytes.size(); ++i) {
      bytes[at + i] = static_cast<char>(input.take<std::uint8_t>());
    }
  }
  if (how % 2 == 1) mend_description(bytes);
  if (how % 16 == 14) bytes.resize(bytes.size() / 2);
  const int fd = memfd_create("dsline-fuzz", MFD_CLOEXEC | MFD_ALLOW_SEALING);
  if (fd < 0 || ftruncate(fd, static_cast<off_t>(bytes.size())) != 0 ||
      pwrite(fd, bytes.data(), bytes.size(), 0) != static_cast<ssize_t>(bytes.size()) ||
      fcntl(fd, F_ADD_SEALS, F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_SEAL) != 0) {
    std::abort();
  }
  CallWatch watch;
  Tally tally;
  try {
    Peer peer(Channel::adopt_anonymous(fd), watch, tally, 2);
    peer.checks_payload = false;
    peer.look_closely();
    peer.exercise(0);
    if (how % 4 < 2) peer.visit_group("late", Start::Oldest, "late");
    peer.finish(true);
    peer.close();
  } catch (const Error&) {
  }
  require(watch.wrong.empty(), watch.wrong.c_str());
  return 0;
}

std::vector<std::string> robust::fuzz_seeds() {
  const memory::Geometry g = [] {
    memory::Geometry geometry;
    std::memcpy(&geometry, ruin().data() + offsetof(memory::RegionHeader, geometry), sizeof geometry);
    return geometry;
  }();
  std::vector<std::string> seeds = {std::string(1, 0), std::string(1, 1)};
  Random random(7);
  for (const Field& field : fields_of(g, g.groups, g.participants, 128)) {
    for (char how : {0, 1}) {
      std::string seed(1, how);
      const std::uint16_t at = static_cast<std::uint16_t>(field.offset);
      seed.append(reinterpret_cast<const char*>(&at), 2);
      seed += static_cast<char>(7);
      std::uint64_t value;
      std::memcpy(&value, ruin().data() + field.offset, sizeof value);
      if (field.bytes == 8)
        value = damaged(field.kind, value, static_cast<std::uint32_t>(random.below(40)), random);
      seed.append(reinterpret_cast<const char*>(&value), 8);
      seeds.push_back(seed);
    }
  }
  return seeds;
}
