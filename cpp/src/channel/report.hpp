#pragma once

#include "dsline/channel.hpp"
#include "memory/region.hpp"

namespace dsline::channel {

/// The region as it stands. `me` is a participant of this process's own handle, whose lock it does not see;
/// Participants::kNobody from outside.
Report report(memory::Region& region, const std::string& path, std::uint32_t me);

/// Counters and slot states as group `group` sees them; `me` as above.
ChannelStats count(memory::Region& region, std::uint32_t group, std::uint32_t me) noexcept;

}  // namespace dsline::channel
