#include "channel/attach.hpp"

#include <time.h>

#include <cerrno>
#include <cstring>
#include <optional>

#include "base/clock.hpp"
#include "base/points.hpp"
#include "base/process.hpp"
#include "channel/directory.hpp"
#include "dsline/metadata.hpp"
#include "liveness/participants.hpp"
#include "liveness/recovery.hpp"
#include "order/order_ring.hpp"
#include "slots/slot_pool.hpp"

namespace dsline::channel {
namespace {

using liveness::Participants;

constexpr std::uint32_t kDefaultCapacity = 64;
constexpr std::uint64_t kDefaultSlotBytes = 65536;
constexpr std::uint32_t kDefaultParticipants = 64;
constexpr std::uint32_t kDefaultNamedGroups = 7;
constexpr std::uint32_t kDefaultMaxDeliveries = 3;
constexpr std::uint32_t kDefaultDeadLetters = 16;
// A participant that looks after the dead may hold the lock of a free number for a moment.
constexpr int kJoinAttempts = 200;
// Whoever recovers a dead participant has its lock, and looks like its living owner for as long.
constexpr int kFullLooks = 20;
constexpr int kAttempts = 100;
// A lock that the kernel has no memory for is asked for again, this often.
constexpr int kLockFailures = 20;

void sleep_ms(long ms) noexcept {
  timespec pause{0, ms * 1'000'000};
  nanosleep(&pause, nullptr);
}

memory::Rules rules_of(const ChannelOptions& options) {
  memory::Rules rules{};
  rules.checksum = static_cast<std::uint32_t>(options.checksum < 0 ? 1 : options.checksum);
  rules.history = options.history < 0 ? 0 : static_cast<std::uint32_t>(options.history);
  rules.max_deliveries = options.max_deliveries == 0 ? kDefaultMaxDeliveries : options.max_deliveries;
  rules.dead_letters =
      options.dead_letters < 0 ? kDefaultDeadLetters : static_cast<std::uint32_t>(options.dead_letters);
  rules.default_group = options.default_group == 0 ? 0 : 1;
  rules.sync = options.sync > 0 ? 1 : 0;
  // A page that the disk has only in part is found by the payload's checksum.
  if (rules.sync != 0 && options.checksum < 0)
    rules.checksum = static_cast<std::uint32_t>(memory::Checksum::Full);
  if (rules.sync != 0 && rules.checksum != static_cast<std::uint32_t>(memory::Checksum::Full)) {
    throw Error(ErrorCode::InvalidArgument,
                "sync=data needs checksum=full, which finds a payload that the disk has only in part");
  }
  if (!is_valid(rules)) {
    throw Error(ErrorCode::InvalidArgument,
                "max_deliveries is " + std::to_string(rules.max_deliveries) + ", must be 1 to 15");
  }
  return rules;
}

std::uint32_t groups_for(const ChannelOptions& options) noexcept {
  return 1 + (options.max_groups == 0 ? kDefaultNamedGroups : options.max_groups) +
         (options.history > 0 ? 1 : 0);
}

memory::Geometry plan(const ChannelOptions& options) {
  memory::Geometry planned = memory::plan_geometry(
      options.capacity == 0 ? kDefaultCapacity : options.capacity,
      options.slot_size != 0           ? options.slot_size
      : options.default_slot_size != 0 ? options.default_slot_size
                                       : kDefaultSlotBytes,
      options.max_message_size, options.max_handles == 0 ? kDefaultParticipants : options.max_handles,
      groups_for(options), options.schema.size());
  if (options.history > 0 && static_cast<std::uint32_t>(options.history) >= planned.slots) {
    throw Error(ErrorCode::InvalidArgument,
                "history is " + std::to_string(options.history) + ", must be below the capacity of " +
                    std::to_string(planned.slots) + " slots, one of which is being written");
  }
  return planned;
}

std::unique_ptr<memory::Region> make_region(std::unique_ptr<memory::Storage> storage,
                                            const ChannelOptions& options) {
  const memory::Rules rules = rules_of(options);
  std::uint64_t first = options.first_position;
  if ((first & slots::kPositionMask) == slots::kNoPositionLow) ++first;
  auto region = memory::Region::create(std::move(storage), plan(options), rules, first, options.schema);
  DSLINE_POINT("create.reserved");
  slots::SlotPool::initialise(*region);
  order::OrderRing::initialise(*region, first);
  std::uint64_t active = rules.default_group;
  if (region->keeps_history()) active |= std::uint64_t{1} << region->retention_group();
  for (std::uint32_t g = 0; g < region->geometry().groups; ++g) {
    region->group(g).cursor.store(first, std::memory_order_relaxed);
  }
  region->header().active.store(active, std::memory_order_release);
  DSLINE_POINT("create.initialised");
  return region;
}

void compare(const char* what, std::uint64_t given, std::uint64_t has, std::string& differences) {
  if (given == 0 || given == has) return;
  if (!differences.empty()) differences += ", ";
  differences += std::string(what) + "=" + std::to_string(given) + " was asked for, the channel has " +
                 std::to_string(has);
}

void compare_given(const char* what, int given, std::uint32_t has, std::string& differences) {
  if (given < 0 || static_cast<std::uint32_t>(given) == has) return;
  if (!differences.empty()) differences += ", ";
  differences += std::string(what) + "=" + std::to_string(given) + " was asked for, the channel has " +
                 std::to_string(has);
}

std::string differences(const memory::Region& region, const ChannelOptions& options) {
  static const char* const kChecksums[] = {"none", "header", "full"};
  const memory::Geometry& g = region.geometry();
  std::string found;
  compare("capacity", options.capacity, g.slots, found);
  compare("slot_size", options.slot_size, g.slot_bytes, found);
  compare("max_message_size", options.max_message_size, g.max_message_bytes, found);
  compare("max_handles", options.max_handles, g.participants, found);
  if (options.checksum >= 0 && options.checksum != static_cast<int>(region.checksum())) {
    if (!found.empty()) found += ", ";
    found += std::string("checksum=") + kChecksums[options.checksum] + " was asked for, the channel has " +
             kChecksums[static_cast<int>(region.checksum())];
  }
  const memory::Rules& rules = region.rules();
  const std::uint32_t named = g.groups - 1 - (region.keeps_history() ? 1 : 0);
  compare("max_groups", options.max_groups, named, found);
  compare("max_deliveries", options.max_deliveries, rules.max_deliveries, found);
  compare_given("history", options.history, rules.history, found);
  compare_given("dead_letters", options.dead_letters, rules.dead_letters, found);
  compare_given("sync", options.sync, rules.sync, found);
  if (options.default_group >= 0 &&
      static_cast<std::uint32_t>(options.default_group) != rules.default_group) {
    if (!found.empty()) found += ", ";
    found += rules.default_group == 0
                 ? "it is a broadcast, which only subscribers receive from (open it with Broadcast)"
                 : "it has receivers without a group (open it with ShmChannel)";
  }
  return found;
}

[[noreturn]] void refuse_differences(const std::string& label, const std::string& found) {
  throw Error(ErrorCode::ChannelMismatch, "channel '" + label + "' exists with another geometry: " + found +
                                              "; open it without these options, or choose another name");
}

bool has_other_schema(const memory::Region& region, const ChannelOptions& options) noexcept {
  return !options.schema.empty() && options.schema != region.schema();
}

void refuse_other_schema(const std::string& label, const memory::Region& region,
                         const ChannelOptions& options) {
  if (!has_other_schema(region, options)) return;
  throw Error(ErrorCode::SchemaMismatch,
              "channel '" + label + "' carries messages of another spec than the one that was asked for", 0,
              region.schema());
}

// The checksum says that it is what was written; this, that somebody in his right mind wrote it. Empty, or what is wrong.
std::string schema_fault(const std::string& schema) {
  frames::Metadata parsed;
  std::string why;
  if (schema.empty() ||
      (frames::parse_metadata(schema.data(), schema.size(), parsed, why) && parsed.has_shape)) {
    return "";
  }
  return "its spec describes no array" + (why.empty() ? "" : " (" + why + ")");
}

// Requires: the control lock.
std::uint32_t join(memory::Region& region, const std::string& label) {
  int full = 0;
  for (int attempt = 0; attempt < kJoinAttempts; ++attempt) {
    std::uint32_t me = Participants(region).try_join();
    if (me != Participants::kNobody) {
      liveness::recover_leftovers(region, me);
      return me;
    }
    const bool is_full =
        Participants(region).alive_guess(Participants::kNobody) == region.geometry().participants;
    full = is_full ? full + 1 : 0;
    if (full == kFullLooks) break;
    liveness::recover_the_dead(region, Participants::kNobody, true);
    sleep_ms(1);
  }
  const std::string limit = std::to_string(region.geometry().participants);
  throw Error(ErrorCode::TooManyHandles,
              "channel '" + label + "' has " + limit + " open handles, which is its limit max_handles=" +
                  limit + "; close some, or create it with a larger max_handles (at most " +
                  std::to_string(memory::kMaxParticipants) + ")");
}

std::uint32_t enter_default_group(memory::Region& region, std::uint32_t me) noexcept {
  const bool receives = region.rules().default_group != 0;
  region.participant(me).group.store(receives ? 1 : 0, std::memory_order_release);
  return receives ? 0 : liveness::Membership::kNoGroup;
}

void check_locks_work(memory::Storage& storage) {
  if (!storage.try_lock(memory::kControlLock)) {
    throw Error(
        ErrorCode::FeatureUnavailable,
        storage.describe() + ": its file system has no locks that belong to an open file (F_OFD_SETLK: " +
            std::string(strerror(errno)) + "), which tell the living from the dead; use another directory",
        errno);
  }
  storage.unlock(memory::kControlLock);
}

bool was_shut_down(const memory::Region& region) noexcept {
  return (region.header().active.load(std::memory_order_acquire) & memory::kShutDown) != 0;
}

// A damaged or older region of this user with nobody attached stands in the way of a new one; only then it goes.
bool replace_unusable(std::unique_ptr<memory::Storage>& storage, const std::string& path,
                      const ChannelOptions& options, OpenMode mode) {
  memory::Inspection inspection = memory::inspect(*storage);
  if (inspection.found == memory::Found::Channel) {
    inspection.reason = schema_fault(inspection.schema);
    if (!inspection.reason.empty()) inspection.found = memory::Found::Damaged;
  }
  if (inspection.found == memory::Found::Channel) return false;
  const bool ours = inspection.found != memory::Found::Foreign;
  const bool may = storage->kind() == memory::StorageKind::PosixShm ? mode == OpenMode::OpenOrCreate
                                                                    : options.on_stale == OnStale::Reset;
  bool idle = storage->try_lock(memory::kControlLock);
  for (std::uint32_t i = 0; i < memory::kMaxParticipants; ++i) {
    idle = idle && !storage->is_locked(memory::participant_lock(i));
  }
  if (ours && may && idle) {
    remove_name(*storage, path);
    return true;
  }
  throw Error(ErrorCode::ChannelLayout,
              path + " is not a usable channel: " + inspection.reason +
                  (ours && !idle ? "; processes are still attached to it: end them, then remove it"
                                 : "; remove it, or choose another name"));
}

enum class Verdict { Joined, Retry };

// One try to take part in an existing region.
Verdict try_attach(std::unique_ptr<memory::Storage> storage, const ChannelOptions& options, OpenMode mode,
                   Attachment& out) {
  out.region = memory::Region::attach(std::move(storage));
  memory::Region& region = *out.region;
  const bool is_shm = region.storage().kind() == memory::StorageKind::PosixShm;
  if (const std::string fault = schema_fault(region.schema()); !fault.empty()) {
    throw Error(ErrorCode::ChannelLayout, region.storage().describe() + " is not a usable channel: " + fault);
  }
  ControlLock control(region, out.label);
  // The name may have been removed, or have moved on to a new region, before the lock was ours.
  if (!out.path.empty() && !is_named(region.storage(), out.path)) return Verdict::Retry;

  const bool alive = Participants(region).anyone_else_alive(Participants::kNobody);
  const std::string found = differences(region, options);
  if (alive) {
    if (mode == OpenMode::Create) {
      throw Error(ErrorCode::ChannelExists,
                  "channel '" + out.label + "' exists and is in use; open it, or choose another name",
                  EEXIST);
    }
    if (!found.empty()) refuse_differences(out.label, found);
    refuse_other_schema(out.label, region, options);
  } else {
    const bool empty = !holds_messages(region);
    const bool may_replace = mode != OpenMode::Open && is_shm;
    if (mode == OpenMode::Create && !is_shm && options.on_stale != OnStale::Reset) {
      throw Error(ErrorCode::ChannelExists,
                  "the file " + out.path +
                      " exists; open it with FileChannel.open, or create it with on_stale='reset'",
                  EEXIST);
    }
    if (options.on_stale == OnStale::Raise) {
      throw Error(ErrorCode::ChannelExists,
                  "channel '" + out.label + "' was left by processes that are all gone" +
                      (empty ? "" : ", with messages in it") +
                      "; take it over with on_stale='recover', or drop it with "
                      "on_stale='reset'",
                  EEXIST);
    }
    if (options.on_stale == OnStale::Reset ||
        (may_replace && empty &&
         (was_shut_down(region) || !found.empty() || has_other_schema(region, options)))) {
      remove_name(region.storage(), out.path);
      return Verdict::Retry;
    }
    if (!found.empty()) refuse_differences(out.label, found);
    refuse_other_schema(out.label, region, options);
    auto boot = base::boot_id();
    if (std::memcmp(region.header().boot_id, boot.data(), boot.size()) != 0) {
      liveness::rebuild(region);
      std::memcpy(region.header().boot_id, boot.data(), boot.size());
    }
  }
  liveness::recover_the_dead(region, Participants::kNobody, true);
  out.participant = join(region, out.label);
  out.group = enter_default_group(region, out.participant);
  return Verdict::Joined;
}

[[noreturn]] void refuse_group(const std::string& label, const std::string& group, const std::string& has) {
  throw Error(ErrorCode::ChannelMismatch, "group '" + group + "' of channel '" + label + "' exists with " +
                                              has + "; subscribe with the same, or choose another name");
}

std::uint32_t enter_group(memory::Region& region, const std::string& label, const SubscribeOptions& options,
                          std::uint32_t me) {
  slots::SlotPool pool(region);
  liveness::Membership membership(region, pool);
  const std::uint32_t rules = (options.durable ? memory::kGroupDurable : 0) |
                              (options.on_death == OnDeath::Drop ? memory::kGroupDrops : 0);
  std::uint32_t group = membership.find(options.group);
  if (group != liveness::Membership::kNoGroup) {
    const std::uint32_t has = membership.rules(group);
    if (has != rules) {
      refuse_group(
          label, options.group,
          std::string((has & memory::kGroupDurable) != 0 ? "durable=True" : "durable=False") +
              ((has & memory::kGroupDrops) != 0 ? " and on_death='drop'" : " and on_death='redeliver'"));
    }
    membership.enter(group, me);
    return group;
  }
  const liveness::JoinAt start = options.start == Start::Oldest   ? liveness::JoinAt::Oldest
                                 : options.start == Start::Latest ? liveness::JoinAt::Latest
                                                                  : liveness::JoinAt::Next;
  group = membership.make(options.group, rules, start, me);
  if (group == liveness::Membership::kNoGroup) {
    const std::uint32_t named = region.geometry().groups - 1 - (region.keeps_history() ? 1 : 0);
    throw Error(
        ErrorCode::TooManyGroups,
        "channel '" + label + "' has no number left for group '" + options.group + "': at most " +
            std::to_string(named) +
            " named groups at a time, and one that ended keeps its number while a view holds one of its "
            "messages; end some, or create the channel with a larger max_groups (at most " +
            std::to_string(memory::kMaxGroups - 2) + ")");
  }
  return group;
}

}  // namespace

ControlLock::ControlLock(memory::Region& region, const std::string& label, std::int64_t patience_ns)
    : region_(&region) {
  const std::int64_t deadline = base::monotonic_ns() + patience_ns;
  for (int failures = 0; !region.storage().try_lock(memory::kControlLock);) {
    const int failure = errno;
    if (failure != EAGAIN && failure != EACCES && ++failures == kLockFailures) {
      throw Error(ErrorCode::System,
                  "channel '" + label + "' cannot be locked for joining or leaving: " + strerror(failure),
                  failure);
    }
    if (base::monotonic_ns() > deadline) {
      throw Error(ErrorCode::TimedOut,
                  "channel '" + label +
                      "': another process has been joining or leaving it for seconds; it is stopped or "
                      "being debugged: let it go on, or end it");
    }
    sleep_ms(1);
  }
}

void leave(memory::Region& region, std::uint32_t me, const std::string& path,
           const std::string& label) noexcept {
  Participants participants(region);
  memory::Storage& storage = region.storage();
  std::optional<ControlLock> control;
  try {
    control.emplace(region, label, kLeavePatienceNs);
  } catch (const std::exception&) {
  }
  DSLINE_POINT("close.before_leaving");
  participants.leave(me);
  DSLINE_POINT("close.left");
  if (control && storage.kind() == memory::StorageKind::PosixShm &&
      !participants.anyone_else_alive(Participants::kNobody) &&
      (was_shut_down(region) || !holds_messages(region))) {
    DSLINE_POINT("close.before_name");
    static_cast<void>(try_remove_name(storage, path));  // else it stays for the next one
  }
  control.reset();
  storage.drop_locks();
}

Attachment::~Attachment() {
  if (region != nullptr && participant != kNoParticipant) leave(*region, participant, path, label);
}

bool holds_messages(memory::Region& region) noexcept {
  const std::uint32_t retained = region.keeps_history() ? 1u << region.retention_group() : 0;
  for (std::uint32_t s = 0; s < region.geometry().slots; ++s) {
    slots::SlotWord word{region.slot(s).word.load(std::memory_order_acquire)};
    if (word.is(slots::SlotPhase::Committed) && (word.pending() & ~retained) != 0) return true;
  }
  return false;
}

Attachment attach_path(const std::string& path, const std::string& label, memory::StorageKind kind,
                       const ChannelOptions& options, OpenMode mode) {
  for (int attempt = 0; attempt < kAttempts; ++attempt) {
    Attachment out(path, label);
    if (auto storage = open_storage(path, kind)) {
      if (replace_unusable(storage, path, options, mode)) continue;
      if (try_attach(std::move(storage), options, mode, out) == Verdict::Joined) return out;
      continue;
    }
    if (mode == OpenMode::Open) {
      throw Error(ErrorCode::ChannelNotFound,
                  kind == memory::StorageKind::PosixShm
                      ? "no channel '" + label + "' on this machine for uid of this process (" + path +
                            "); create it first, or use ShmChannel(name), which does both"
                      : "no file " + path + "; create it with FileChannel.create",
                  ENOENT);
    }
    auto storage = make_unnamed_storage(path, kind, options.mode);
    check_locks_work(*storage);
    DSLINE_POINT("create.unnamed");
    out.region = make_region(std::move(storage), options);
    ControlLock control(*out.region, label);
    out.participant = join(*out.region, label);
    out.group = enter_default_group(*out.region, out.participant);
    DSLINE_POINT("create.before_link");
    if (link_storage(out.region->storage(), path)) {
      DSLINE_POINT("create.linked");
      if (out.region->rules().sync != 0) sync_name(out.region->storage(), path);
      return out;
    }
    out.participant = Attachment::kNoParticipant;  // the region goes, unseen
  }
  throw Error(ErrorCode::Internal, "channel '" + label + "' was made and removed by others " +
                                       std::to_string(kAttempts) +
                                       " times while this process tried to open it");
}

Attachment create_unnamed(std::unique_ptr<memory::Storage> storage, const ChannelOptions& options) {
  Attachment out("", storage->describe());
  out.region = make_region(std::move(storage), options);
  out.participant = join(*out.region, out.label);
  out.group = enter_default_group(*out.region, out.participant);
  return out;
}

Attachment attach_storage(std::unique_ptr<memory::Storage> storage) {
  Attachment out("", storage->describe());
  try_attach(std::move(storage), ChannelOptions{}, OpenMode::Open, out);
  return out;
}

Attachment attach_again(const memory::Region& region, const std::string& path, const std::string& label,
                        const SubscribeOptions* options) {
  Attachment out(path, label);
  out.region = memory::Region::attach(region.storage().again());
  ControlLock control(*out.region, label);
  liveness::recover_the_dead(*out.region, Participants::kNobody, true);
  out.participant = join(*out.region, label);
  if (options == nullptr) {
    out.group = enter_default_group(*out.region, out.participant);
    return out;
  }
  out.group = enter_group(*out.region, label, *options, out.participant);
  out.joined = out.region->group(out.group).joined.load(std::memory_order_relaxed);
  return out;
}

std::uint32_t rejoin(memory::Region& region, const std::string& label, std::uint32_t& group,
                     std::uint32_t joined) {
  region.storage().renew_locks();
  ControlLock control(region, label);
  liveness::recover_the_dead(region, Participants::kNobody, true);
  const std::uint32_t me = join(region, label);
  if (group == 0) {
    enter_default_group(region, me);
  } else if (group != liveness::Membership::kNoGroup) {
    slots::SlotPool pool(region);
    const bool active = (region.header().active.load(std::memory_order_seq_cst) >> group & 1) != 0;
    if (active && region.group(group).joined.load(std::memory_order_relaxed) == joined) {
      liveness::Membership(region, pool).enter(group, me);
    } else {
      group = liveness::Membership::kNoGroup;
    }
  }
  return me;
}

}  // namespace dsline::channel
