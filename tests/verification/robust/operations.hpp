#pragma once

#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <memory>
#include <string>
#include <vector>

#include "dsline/channel.hpp"
#include "dsline/metadata.hpp"
#include "memory/region.hpp"
#include "slots/slot_word.hpp"
#include "support.hpp"

/// What peers do with a channel whose bytes may be anything, and what has to be true of it.
namespace dsline::robust {

/// Watches the calls of one process: which one runs, and how long after its deadline it came back.
struct CallWatch {
  static constexpr std::int64_t kSlackNs = 300'000'000;

  std::atomic<const char*>* running = nullptr;  // where to say which call runs
  std::int64_t latest_ns = 0;
  const char* latest_call = "";
  std::string wrong;  // the first result that cannot be

  template <class Call>
  auto operator()(const char* name, std::int64_t deadline_ns, Call&& run) {
    if (running != nullptr) running->store(name);
    struct Over {
      CallWatch& watch;
      const char* name;
      std::int64_t due;
      ~Over() {
        const std::int64_t late = base::monotonic_ns() - due;
        if (late > watch.latest_ns) {
          watch.latest_ns = late;
          watch.latest_call = name;
        }
      }
    } over{*this, name, std::max(deadline_ns, base::monotonic_ns())};
    return run();
  }
  bool is_late() const noexcept { return latest_ns > kSlackNs; }
  void expect(bool good, const std::string& what) {
    if (!good && wrong.empty()) wrong = what;
  }
};

struct Tally {
  std::uint64_t calls = 0;
  std::uint64_t delivered = 0;
  std::uint64_t corrupted = 0;  // Outcome::Corrupted
  std::uint64_t errors = 0;     // typed errors
  std::uint64_t sent = 0;
  std::uint64_t timeouts = 0;
  std::uint64_t letters = 0;  // dead letters taken
  std::uint64_t latest = 0;   // messages of the history looked at
};

/// Every byte of `size` is read: memory that is not there ends the process.
inline std::uint64_t touch(const std::byte* at, std::uint64_t size) noexcept {
  std::uint64_t sum = 0;
  for (std::uint64_t i = 0; i < size; ++i) sum += static_cast<std::uint64_t>(at[i]);
  return sum;
}

inline std::string sample_metadata() {
  frames::MetadataBuilder builder;
  const std::string f4{'f', 1, 0, 0, 4, 0, 0, 0};
  const std::int64_t shape[2] = {4, 4};
  builder.add_dtype(f4);
  builder.add_shape(shape, 2);
  builder.add_tag_str("camera", "left");
  builder.add_tag_int("exposure", 12);
  return builder.bytes();
}

/// One participant that uses every call, some of them with messages it keeps.
class Peer {
 public:
  Peer(std::shared_ptr<Channel> channel, CallWatch& watch, Tally& tally, std::uint32_t writer)
      : channel_(std::move(channel)), watch_(watch), tally_(tally), writer_(writer) {}

  Channel& channel() noexcept { return *channel_; }
  bool checks_payload = true;
  bool checks_counter = true;
  std::uint64_t payload_bytes = 64;

  Outcome send(Backpressure policy, std::int64_t wait_ns) {
    std::vector<std::byte> payload(payload_bytes);
    make_proof(payload.data(), payload.size(), writer_, ++number_);
    return guarded("send", wait_ns, [&](std::int64_t deadline) {
      const Outcome outcome = channel_->send(payload.data(), payload.size(), policy, deadline);
      tally_.sent += outcome == Outcome::Ok;
      tally_.timeouts += outcome == Outcome::TimedOut;
      return outcome;
    });
  }

  Outcome send_array() {
    std::vector<std::byte> payload(64);
    make_proof(payload.data(), payload.size(), writer_, ++number_);
    const std::string meta = sample_metadata();
    return guarded("send with metadata", 0, [&](std::int64_t) {
      const Outcome outcome =
          channel_->try_send(payload.data(), payload.size(), kArrayMessage, meta.data(),
                             static_cast<std::uint32_t>(meta.size()), 7, Backpressure::Raise);
      tally_.sent += outcome == Outcome::Ok;
      return outcome;
    });
  }

  /// The loan is published or given back at once, or kept until finish().
  void borrow(bool publish, bool keep) {
    Loan loan;
    const Outcome outcome = guarded("alloc", 0, [&](std::int64_t) {
      return channel_->try_alloc(payload_bytes, 0, Backpressure::Raise, loan);
    });
    if (outcome != Outcome::Ok) return;
    make_proof(loan.payload, payload_bytes, writer_, ++number_);
    if (keep) {
      loans_.push_back(loan);
    } else if (publish) {
      guarded("publish", 0, [&](std::int64_t) { return channel_->publish(loan, kBytesMessage, 0); });
    } else {
      guarded("abort", 0, [&](std::int64_t) {
        channel_->abort(loan);
        return Outcome::Ok;
      });
    }
  }

  enum class Then { Release, Keep, GiveBack };
  Outcome recv(std::int64_t wait_ns, Then then) {
    auto message = std::make_unique<Received>();
    const std::uint64_t before = !checks_counter || then == Then::Keep ? 0 : channel_->stats().corrupted;
    const Outcome outcome = guarded("recv", wait_ns, [&](std::int64_t deadline) {
      return wait_ns == 0 ? channel_->try_recv(*message) : channel_->recv(*message, deadline);
    });
    if (outcome == Outcome::Corrupted) {
      ++tally_.corrupted;
      watch_.expect(message->fault != nullptr, "a corrupted message without a fault");
      if (checks_counter && then != Then::Keep) {
        watch_.expect(channel_->stats().corrupted != before, "a corrupted message was not counted");
      }
    }
    tally_.timeouts += outcome == Outcome::TimedOut;
    if (outcome != Outcome::Ok) return outcome;
    ++tally_.delivered;
    check(*message);
    if (then == Then::Keep) {
      held_.push_back(std::move(message));
    } else if (then == Then::GiveBack) {
      guarded("nack", 0, [&](std::int64_t) {
        channel_->give_back(*message);
        return Outcome::Ok;
      });
    } else {
      release(*message);
    }
    return outcome;
  }

  void look() {
    guarded("stats", 0, [&](std::int64_t) {
      const ChannelStats stats = channel_->stats();
      const std::uint32_t slots = channel_->capacity();
      watch_.expect(
          stats.free_slots + stats.writing_slots + stats.committed_slots + stats.corrupted_slots <= slots,
          "stats count more slots than there are");
      watch_.expect(stats.participants <= channel_->max_handles(), "stats count too many participants");
      static_cast<void>(channel_->depth());
      static_cast<void>(channel_->is_full());
      static_cast<void>(channel_->is_shut_down());
      return Outcome::Ok;
    });
  }

  void look_closely() {
    guarded("report", 0, [&](std::int64_t) {
      const dsline::Report report = channel_->report();
      watch_.expect(report.participants.size() <= channel_->max_handles(),
                    "a report of too many participants");
      watch_.expect(report.slots.size() <= channel_->capacity(), "a report of too many slots");
      for (const auto& group : report.groups) {
        watch_.expect(group.name.size() <= 128, "a report of a group with a long name");
      }
      watch_.expect(channel_->deaths_since(0).size() <= memory::kDeathsKept, "too many deaths on record");
      static_cast<void>(channel_->check_peers());
      return Outcome::Ok;
    });
  }

  void look_at_letters() {
    auto message = std::make_unique<Received>();
    DeadLetter why;
    const Outcome outcome = guarded(
        "dead letters", 0, [&](std::int64_t) { return channel_->try_take_dead_letter(*message, why); });
    tally_.corrupted += outcome == Outcome::Corrupted;
    if (outcome != Outcome::Ok) return;
    ++tally_.letters;
    check(*message);
    if (tally_.letters % 2 == 0) {
      guarded("revive", 0, [&](std::int64_t) {
        channel_->revive(*message);
        return Outcome::Ok;
      });
    } else {
      release(*message);
    }
  }

  void look_at_history(std::int64_t wait_ns) {
    if (channel_->history() == 0) return;
    auto message = std::make_unique<Received>();
    const Outcome outcome =
        guarded("latest", 0, [&](std::int64_t) { return channel_->try_read_latest(true, 0, *message); });
    if (outcome != Outcome::Ok) return;
    ++tally_.latest;
    std::vector<std::byte> copy(message->payload_bytes);
    watch_.expect(message->payload_bytes <= channel_->max_message_size() + kOverhead,
                  "a payload longer than a slot");
    if (!watch_.wrong.empty()) return;
    std::memcpy(copy.data(), message->payload, copy.size());
    if (channel_->is_unchanged(*message) && checks_payload) {
      watch_.expect(read_proof(copy.data(), copy.size()).is_good, "a payload that nobody has sent");
    }
    guarded("wait for newer", wait_ns, [&](std::int64_t deadline) {
      return channel_->wait_for_newer(false, message->sequence, deadline, true);
    });
  }

  /// A group comes, receives and goes; another one is ended by its name.
  void visit_group(const std::string& name, Start start, const std::string& ended) {
    std::shared_ptr<Channel> member;
    guarded("subscribe", kLeaveNs, [&](std::int64_t) {
      SubscribeOptions options;
      options.group = name;
      options.start = start;
      member = channel_->subscribe(options);
      return Outcome::Ok;
    });
    if (member != nullptr) {
      Peer peer(std::move(member), watch_, tally_, writer_ + 100);
      peer.checks_payload = checks_payload;
      peer.checks_counter = checks_counter;
      for (std::uint32_t i = 0; i < 3; ++i) peer.recv(0, i == 1 ? Then::GiveBack : Then::Release);
      peer.recv(0, Then::Keep);
      peer.look();
      peer.finish(false);
      peer.close();
    }
    guarded("remove a group", kLeaveNs, [&](std::int64_t) {
      channel_->remove_group(ended);
      return Outcome::Ok;
    });
  }

  /// About ten operations; `wait_ns` is spent at most three times.
  void exercise(std::int64_t wait_ns) {
    look();
    send(Backpressure::Raise, 0);
    recv(0, Then::Release);
    send_array();
    recv(0, Then::GiveBack);
    recv(wait_ns, Then::Release);
    send(Backpressure::DropNewest, 0);
    send(Backpressure::DropOldest, 0);
    borrow(true, false);
    borrow(false, false);
    send(Backpressure::Block, wait_ns);
    recv(0, Then::Keep);
    look_at_letters();
    look_at_history(wait_ns);
    for (std::uint32_t i = 0; i < channel_->capacity() && recv(0, Then::Release) == Outcome::Ok; ++i) {
    }
    look();
  }

  void finish(bool publish_loans) {
    for (const Loan& loan : loans_) {
      guarded("publish", 0, [&](std::int64_t) {
        if (publish_loans) return channel_->publish(loan, kBytesMessage, 0);
        channel_->abort(loan);
        return Outcome::Ok;
      });
    }
    loans_.clear();
    for (const auto& message : held_) {
      touch(message->payload, message->payload_bytes);
      release(*message);
    }
    held_.clear();
  }
  void shutdown(bool at_once) {
    guarded("shutdown", 0, [&](std::int64_t) {
      channel_->shutdown(at_once);
      return Outcome::Ok;
    });
  }
  void close() {
    guarded("close", kLeaveNs, [&](std::int64_t) {
      channel_->close();
      channel_.reset();
      return Outcome::Ok;
    });
  }
  std::size_t held() const noexcept { return held_.size(); }

 private:
  static constexpr std::int64_t kLeaveNs = 500'000'000;     // patience with the control lock
  static constexpr std::uint64_t kOverhead = 65536 + 8192;  // of a frame

  template <class Call>
  Outcome guarded(const char* name, std::int64_t wait_ns, Call&& call) {
    ++tally_.calls;
    const std::int64_t deadline = base::monotonic_ns() + wait_ns;
    try {
      return watch_(name, deadline, [&] { return call(deadline); });
    } catch (const Error&) {
      ++tally_.errors;
    } catch (const std::exception& error) {
      watch_.expect(false, std::string(name) + " threw an untyped error: " + error.what());
    }
    return Outcome::Closed;
  }

  void release(const Received& message) {
    guarded("release", 0, [&](std::int64_t) {
      channel_->release(message);
      return Outcome::Ok;
    });
  }

  void check(const Received& message) {
    const std::uint64_t most = channel_->max_message_size() + kOverhead;
    watch_.expect(message.payload_bytes <= most, "a payload longer than a slot");
    watch_.expect(message.slot < channel_->capacity(), "a slot that does not exist");
    watch_.expect(message.meta_bytes <= 65536, "metadata longer than the limit");
    if (!watch_.wrong.empty()) return;
    touch(message.payload, message.payload_bytes);
    if (checks_payload) {
      watch_.expect(read_proof(message.payload, message.payload_bytes).is_good,
                    "a payload that nobody has sent");
    }
    frames::Metadata metadata;
    std::string why;
    const bool parsed = frames::parse_metadata(message.meta(), message.meta_bytes, metadata, why);
    if (checks_payload) watch_.expect(parsed, "metadata that nobody has sent: " + why);
  }

  std::shared_ptr<Channel> channel_;
  CallWatch& watch_;
  Tally& tally_;
  std::uint32_t writer_;
  std::uint64_t number_ = 0;
  std::vector<Loan> loans_;
  std::vector<std::unique_ptr<Received>> held_;
};

/// The schema of a channel for arrays of three floats.
inline std::string small_schema() {
  constexpr std::int64_t kShape[] = {3};
  frames::MetadataBuilder builder;
  builder.add_dtype(std::string("f\1\0\0\4\0\0\0", 8));
  builder.add_shape(kShape, 1);
  return builder.bytes();
}

/// All bytes of a region, for reading and writing from outside of the core.
class Bytes {
 public:
  explicit Bytes(int fd) {
    struct stat info {};
    if (fstat(fd, &info) != 0) std::abort();
    size_ = static_cast<std::size_t>(info.st_size);
    void* at = mmap(nullptr, size_, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    if (at == MAP_FAILED) std::abort();
    at_ = static_cast<unsigned char*>(at);
  }
  ~Bytes() { munmap(at_, size_); }
  Bytes(const Bytes&) = delete;
  Bytes& operator=(const Bytes&) = delete;

  unsigned char& operator[](std::size_t offset) noexcept { return at_[offset]; }
  unsigned char* data() noexcept { return at_; }
  std::size_t size() const noexcept { return size_; }
  std::uint64_t word(std::size_t offset) const noexcept {
    std::uint64_t value;
    std::memcpy(&value, at_ + offset, sizeof value);
    return value;
  }
  void set_word(std::size_t offset, std::uint64_t value) noexcept {
    std::memcpy(at_ + offset, &value, sizeof value);
  }
  memory::Geometry geometry() const noexcept {
    memory::Geometry g;
    std::memcpy(&g, at_ + offsetof(memory::RegionHeader, geometry), sizeof g);
    return g;
  }

 private:
  unsigned char* at_;
  std::size_t size_;
};

/// A stretch of a region that means something.
struct Field {
  std::string name;
  std::uint64_t offset;
  std::uint64_t bytes;
  enum class Kind { Plain, Position, PositionHigh, SlotWord, Claim, Frame } kind;
};

/// Everything in a region but padding; `groups` and `participants` of the many that there are.
inline std::vector<Field> fields_of(const memory::Geometry& g, std::uint32_t groups,
                                    std::uint32_t participants, std::uint64_t frame_bytes) {
  using Kind = Field::Kind;
  std::vector<Field> fields;
  fields.push_back({"header", 0, offsetof(memory::RegionHeader, active), Kind::Plain});
  for (std::uint64_t at = offsetof(memory::RegionHeader, active); at < offsetof(memory::RegionHeader, space);
       at += 8) {
    fields.push_back({"header word " + std::to_string(at), at, 8, Kind::Plain});
  }
  for (std::uint64_t at = offsetof(memory::RegionHeader, space); at < sizeof(memory::RegionHeader); at += 8) {
    fields.push_back({"space waiters " + std::to_string(at), at, 8, Kind::Plain});
  }
  for (std::uint64_t at = 0; at < g.schema_bytes; at += 8) {
    fields.push_back({"schema word " + std::to_string(at), memory::kSchemaOffset + at, 8, Kind::Plain});
  }
  for (std::uint32_t i = 0; i < 2; ++i) {
    const std::uint64_t base = offsetof(memory::RegionHeader, death) + i * sizeof(memory::DeathState);
    for (std::uint64_t at = 0; at < sizeof(memory::DeathState); at += 8) {
      fields.push_back(
          {"death " + std::to_string(i) + " word " + std::to_string(at), base + at, 8, Kind::Plain});
    }
  }
  for (std::uint32_t i = 0; i < std::min(participants, g.participants); ++i) {
    const std::uint64_t base = g.participants_offset + i * sizeof(memory::ParticipantState);
    for (std::uint64_t at = 0; at < sizeof(memory::ParticipantState); at += 8) {
      fields.push_back(
          {"participant " + std::to_string(i) + " word " + std::to_string(at), base + at, 8, Kind::Plain});
    }
  }
  for (std::uint32_t i = 0; i < std::min(groups, g.groups); ++i) {
    const std::uint64_t base = g.groups_offset + i * sizeof(memory::GroupState);
    for (std::uint64_t at = 0; at < sizeof(memory::GroupState); at += 8) {
      fields.push_back({"group " + std::to_string(i) + " word " + std::to_string(at), base + at, 8,
                        at == 0 ? Kind::Position : Kind::Plain});
    }
  }
  fields.push_back({"tail", g.order_offset, 8, Kind::Position});
  for (std::uint32_t k = 0; k < g.order_cells; ++k) {
    fields.push_back({"cell " + std::to_string(k), g.order_offset + sizeof(memory::OrderState) + k * 8, 8,
                      Kind::PositionHigh});
  }
  for (std::uint32_t i = 0; i < (g.slots + 63) / 64; ++i) {
    fields.push_back({"free map " + std::to_string(i), g.free_map_offset + i * 8, 8, Kind::Plain});
  }
  for (std::uint32_t s = 0; s < g.slots; ++s) {
    const std::uint64_t base = g.slots_offset + s * sizeof(memory::SlotState);
    const std::string slot = "slot " + std::to_string(s);
    fields.push_back({slot + " word", base, 8, Kind::SlotWord});
    fields.push_back({slot + " position", base + 8, 8, Kind::Position});
    fields.push_back({slot + " claim 0", base + 16, 8, Kind::Claim});
    for (std::uint64_t at = 24; at < sizeof(memory::SlotState); at += 8) {
      fields.push_back({slot + " word " + std::to_string(at), base + at, 8, Kind::Plain});
    }
    for (std::uint32_t i = 1; i < std::min(groups, g.groups); ++i) {
      fields.push_back({slot + " claim " + std::to_string(i),
                        g.claims_offset + (std::uint64_t{s} * (g.groups - 1) + i - 1) * 8, 8, Kind::Claim});
      for (std::uint64_t at = 0; at < sizeof(memory::ClaimNotes); at += 8) {
        fields.push_back(
            {slot + " notes " + std::to_string(i) + " word " + std::to_string(at),
             g.notes_offset + (std::uint64_t{s} * (g.groups - 1) + i - 1) * sizeof(memory::ClaimNotes) + at,
             8, Kind::Plain});
      }
    }
  }
  for (std::uint32_t s = 0; s < g.slots; ++s) {
    fields.push_back({"frame of slot " + std::to_string(s),
                      g.arena_offset + s * g.stride_bytes + memory::frame_shift(g, s), frame_bytes,
                      Kind::Frame});
  }
  return fields;
}

/// Values that a control word might be damaged to; the first ones are those of whole bytes or bits.
inline std::uint64_t damaged(Field::Kind kind, std::uint64_t value, std::uint32_t which, Random& random) {
  constexpr std::uint64_t kHalf = std::uint64_t{1} << 43;
  constexpr std::uint64_t kNear[] = {1, 2, 7, 16, 17, 1000, 1u << 20, kHalf - 1, kHalf, kHalf + 1};
  const bool back = (which & 1) != 0;
  const std::uint64_t step = kNear[(which / 2) % std::size(kNear)];
  const std::uint64_t moved = back ? 0 - step : step;
  switch (kind) {
    case Field::Kind::Position:
      return value + moved;
    case Field::Kind::PositionHigh:
      if (which % 5 == 4) return (value & ~std::uint64_t{0xFFFFF}) | (random.next() & 0xFFFFF);
      return value + (moved << 20);
    case Field::Kind::Claim: {
      constexpr std::uint64_t kWho[] = {0, 1, 2, 3, 256, 257, 0x8000, 0x8001, 0x8002, 0xFFFE, 0xFFFF, 0x4000};
      if (which % 2 == 0) {
        return (value & ~std::uint64_t{0xFFFFF}) | (random.next() & 0xF0000) |
               kWho[(which / 2) % std::size(kWho)];
      }
      return value + (moved << 20);
    }
    case Field::Kind::SlotWord: {
      constexpr std::uint32_t kPending[] = {0, 1, 2, 1u << 23, (1u << 23) | 1, 0xFFFFFF, 0x7FFFFF, 0x400000};
      constexpr std::uint32_t kOwner[] = {0, 1, 2, 255, 256, 0x3FF};
      const slots::SlotWord old{value};
      const auto phase = static_cast<slots::SlotPhase>(which % 7 == 6 ? random.below(64) : which % 7);
      return slots::SlotWord::make(old.generation() + (which % 3 == 0 ? 1 : 0),
                                   kOwner[random.below(std::size(kOwner))], phase,
                                   kPending[random.below(std::size(kPending))])
          .bits;
    }
    default:
      switch (which % 4) {
        case 0:
          return 0;
        case 1:
          return ~std::uint64_t{0};
        case 2:
          return random.next();
        default:
          return value ^ (std::uint64_t{1} << random.below(64));
      }
  }
}

}  // namespace dsline::robust
