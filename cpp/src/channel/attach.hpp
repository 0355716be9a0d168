#pragma once

#include <memory>
#include <string>

#include "dsline/channel.hpp"
#include "liveness/membership.hpp"
#include "memory/region.hpp"

namespace dsline::channel {

/// A region that this process takes part in. Whoever takes `region` out has to leave it in order; else the attachment
/// does.
struct Attachment {
  std::unique_ptr<memory::Region> region;
  std::uint32_t participant = kNoParticipant;
  std::string path;   ///< empty without a file
  std::string label;  ///< what people call it
  std::uint32_t group = liveness::Membership::kNoGroup;
  std::uint32_t joined = 0;  ///< memory::GroupState::joined at that time

  static constexpr std::uint32_t kNoParticipant = ~std::uint32_t{0};
  Attachment(std::string path, std::string label) : path(std::move(path)), label(std::move(label)) {}
  Attachment(Attachment&&) = default;
  Attachment& operator=(Attachment&&) = delete;
  ~Attachment();
};

/// Frees the entry of `me` and drops every lock; the last one takes the name along when the channel is shut down or
/// empty. Requires: nothing in the region carries the number any more.
void leave(memory::Region& region, std::uint32_t me, const std::string& path,
           const std::string& label) noexcept;

/// Opens the region at `path`, or creates it, as `mode` and `options` say, and joins it.
Attachment attach_path(const std::string& path, const std::string& label, memory::StorageKind kind,
                       const ChannelOptions& options, OpenMode mode);
/// A new region without a name.
Attachment create_unnamed(std::unique_ptr<memory::Storage> storage, const ChannelOptions& options);
/// Joins a region that was handed over by descriptor.
Attachment attach_storage(std::unique_ptr<memory::Storage> storage);

/// Joins a region that this process takes part in once more: in the default group, or as a member of the group that
/// `options` names.
Attachment attach_again(const memory::Region& region, const std::string& path, const std::string& label,
                        const SubscribeOptions* options);

/// Registers this process anew in an inherited region; the number it has from now on. `group` becomes kNoGroup when the
/// group has ended (its number has been given away since it was `joined`).
std::uint32_t rejoin(memory::Region& region, const std::string& label, std::uint32_t& group,
                     std::uint32_t joined);

/// Patience at the end of a handle: without the lock its group and its name stay for the next one, which is harmless.
inline constexpr std::int64_t kLeavePatienceNs = 500'000'000;

/// The control lock of a region: joining, leaving and removing names. Waits for a limited time.
class ControlLock {
 public:
  /// Throws Error(TimedOut) when somebody holds it for longer than `patience_ns`, Error(System) when the kernel
  /// cannot lock.
  ControlLock(memory::Region& region, const std::string& label, std::int64_t patience_ns = 10'000'000'000);
  ~ControlLock() { region_->storage().unlock(memory::kControlLock); }
  ControlLock(const ControlLock&) = delete;
  ControlLock& operator=(const ControlLock&) = delete;

 private:
  memory::Region* region_;
};

/// True when a committed message is still to be delivered to somebody; what only the history keeps does not count.
bool holds_messages(memory::Region& region) noexcept;

}  // namespace dsline::channel
