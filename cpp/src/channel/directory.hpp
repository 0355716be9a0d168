#pragma once

#include <memory>
#include <string>

#include "memory/storage.hpp"

namespace dsline::channel {

/// Names and files of regions on this host.
///
/// Invariant: a name only ever points at a finished region: it is made without a name, initialised and joined, and
/// linked into place in one step of the kernel.

/// Throws Error(InvalidArgument) unless `name` is [A-Za-z0-9._-]{1,100} without a leading dot.
void check_name(const std::string& name);

/// The directory of this user's named channels, made when it is missing (0700, wider for group or others as `mode`
/// asks). Throws Error(ChannelPermission) when somebody else could have put files there.
std::string prepare_directory(std::uint32_t mode);

/// The storage behind `path`, nullptr when there is none. Follows no symbolic link; throws Error(ChannelPermission)
/// for files of other users (unless their owner widened the mode) and Error(ChannelLayout) for what is no regular file.
std::unique_ptr<memory::Storage> open_storage(const std::string& path, memory::StorageKind kind);

/// A file without a name in the directory of `path`, to be linked there when it is finished.
std::unique_ptr<memory::Storage> make_unnamed_storage(const std::string& path, memory::StorageKind kind,
                                                      std::uint32_t mode);

/// Gives it its name; false when the name has been taken meanwhile.
bool link_storage(const memory::Storage& storage, const std::string& path);

/// Writes the name to the disk, so that it survives a loss of power. Removes it and throws where that fails. Requires: the
/// control lock.
void sync_name(const memory::Storage& storage, const std::string& path);

/// True when `path` still names the file behind `storage`. Throws Error(System) when the kernel does not say.
bool is_named(const memory::Storage& storage, const std::string& path);

/// Removes the name if it still names this storage. 0 when it does not name it any more, else the errno of what failed.
/// Requires: its control lock.
[[nodiscard]] int try_remove_name(const memory::Storage& storage, const std::string& path) noexcept;
/// The same; throws Error(System).
void remove_name(const memory::Storage& storage, const std::string& path);

}  // namespace dsline::channel
