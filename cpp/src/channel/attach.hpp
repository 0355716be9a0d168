#pragma once

#include <memory>
#include <string>

#include "dsline/channel.hpp"
#include "memory/region.hpp"

namespace dsline::channel {

/// A region that this process takes part in.
struct Attachment {
  std::unique_ptr<memory::Region> region;
  std::uint32_t participant;
  std::string path;   ///< empty without a file
  std::string label;  ///< what people call it
};

/// Opens the region at `path`, or creates it, as `mode` and `options` say, and joins it.
Attachment attach_path(const std::string& path, const std::string& label, memory::StorageKind kind,
                       const ChannelOptions& options, OpenMode mode);
/// A new region without a name.
Attachment create_unnamed(std::unique_ptr<memory::Storage> storage, const ChannelOptions& options);
/// Joins a region that was handed over by descriptor.
Attachment attach_storage(std::unique_ptr<memory::Storage> storage);

/// Registers this process anew in an inherited region; the number it has from now on.
std::uint32_t rejoin(memory::Region& region, const std::string& label);

/// The control lock of a region: joining, leaving and removing names. Waits for a limited time.
class ControlLock {
 public:
  /// Throws Error(TimedOut) when somebody holds it for longer than `patience_ns`.
  ControlLock(memory::Region& region, const std::string& label, std::int64_t patience_ns = 10'000'000'000);
  ~ControlLock() { region_->storage().unlock(memory::kControlLock); }
  ControlLock(const ControlLock&) = delete;
  ControlLock& operator=(const ControlLock&) = delete;

 private:
  memory::Region* region_;
};

/// True when a committed message is still to be delivered to the default group.
bool holds_messages(memory::Region& region) noexcept;

}  // namespace dsline::channel
