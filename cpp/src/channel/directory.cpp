#include "channel/directory.hpp"

#include <dirent.h>
#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <memory>
#include <vector>

#include "base/descriptor.hpp"
#include "dsline/channel.hpp"

namespace dsline {

std::string channel_directory() { return "/dev/shm/dsline-" + std::to_string(geteuid()); }

std::vector<std::string> list_channels() {
  struct Close {
    void operator()(DIR* directory) const noexcept { closedir(directory); }
  };
  std::vector<std::string> names;
  const std::unique_ptr<DIR, Close> directory(opendir(channel_directory().c_str()));
  if (directory == nullptr) return names;
  while (const dirent* entry = readdir(directory.get())) {
    if (entry->d_name[0] != '.') names.emplace_back(entry->d_name);
  }
  std::sort(names.begin(), names.end());
  return names;
}

namespace channel {
namespace {

constexpr std::size_t kLongestName = 100;

[[noreturn]] void fail(ErrorCode code, const std::string& message, int os_errno = 0) {
  throw Error(code, os_errno == 0 ? message : message + ": " + strerror(os_errno), os_errno);
}

std::string parent_of(const std::string& path) {
  std::size_t slash = path.rfind('/');
  if (slash == std::string::npos) return ".";
  return slash == 0 ? "/" : path.substr(0, slash);
}

std::string descriptor_path(const memory::Storage& storage) {
  return "/proc/self/fd/" + std::to_string(storage.descriptor());
}

// What the kernel could not do for lack of memory, or since a signal came, it can do at once or soon.
constexpr int kTries = 3;

// 0 and the answer, or the errno of what failed.
int compare_with_name(const memory::Storage& storage, const std::string& path, bool& same) noexcept {
  int failure = 0;
  for (int attempt = 0; attempt < kTries; ++attempt) {
    struct stat mine {};
    struct stat named {};
    if (fstat(storage.descriptor(), &mine) == 0 && lstat(path.c_str(), &named) == 0) {
      same = mine.st_ino == named.st_ino && mine.st_dev == named.st_dev;
      return 0;
    }
    failure = errno;
    if (failure == ENOENT || failure == ENOTDIR) {
      same = false;
      return 0;
    }
  }
  return failure;
}

}  // namespace

void check_name(const std::string& name) {
  bool good = !name.empty() && name.size() <= kLongestName && name[0] != '.';
  for (char c : name) {
    good = good && ((c >= 'A' && c <= 'Z') || (c >= 'a' && c <= 'z') || (c >= '0' && c <= '9') || c == '.' ||
                    c == '_' || c == '-');
  }
  if (!good) {
    std::string shown = name.size() > kLongestName ? name.substr(0, kLongestName) + "…" : name;
    std::replace_if(
        shown.begin(), shown.end(), [](unsigned char c) { return c < ' ' || c == 0x7F; }, '?');
    fail(ErrorCode::InvalidArgument,
         "'" + shown + "' (" + std::to_string(name.size()) +
             " bytes) is not a channel name: it takes 1 to 100 of A-Z a-z 0-9 . _ - and no "
             "leading dot; for a path use FileChannel");
  }
}

std::string prepare_directory(std::uint32_t mode) {
  std::string directory = channel_directory();
  if (mkdir(directory.c_str(), 0700) != 0 && errno != EEXIST) {
    fail(ErrorCode::System, "the directory of named channels, " + directory + ", cannot be made", errno);
  }
  const base::Descriptor fd = open(directory.c_str(), O_RDONLY | O_DIRECTORY | O_NOFOLLOW | O_CLOEXEC);
  if (!fd) {
    fail(ErrorCode::ChannelPermission,
         directory + " is not a directory of this user; remove it, or use an anonymous channel (name=None)",
         errno);
  }
  struct stat info {};
  if (fstat(fd.get(), &info) != 0) fail(ErrorCode::System, directory + " cannot be examined", errno);
  const bool trusted = info.st_uid == geteuid() && (info.st_mode & 0066) == 0;
  // Others may pass through, never list or write: the modes of the files in it decide.
  mode_t passage = static_cast<mode_t>(((mode & 0060) != 0 ? 0010 : 0) | ((mode & 0006) != 0 ? 0001 : 0));
  if (trusted && (info.st_mode & passage) != passage &&
      fchmod(fd.get(), (info.st_mode & 0711) | passage) != 0) {
    fail(ErrorCode::System, "the mode of " + directory + " cannot be set", errno);
  }
  if (!trusted) {
    fail(ErrorCode::ChannelPermission,
         directory + " belongs to uid " + std::to_string(info.st_uid) +
             " or lets others write; it must be this user's alone (chmod 700), or use "
             "an anonymous channel (name=None)");
  }
  return directory;
}

std::unique_ptr<memory::Storage> open_storage(const std::string& path, memory::StorageKind kind) {
  base::Descriptor fd = open(path.c_str(), O_RDWR | O_NOFOLLOW | O_CLOEXEC | O_NONBLOCK);
  if (!fd) {
    int failure = errno;
    if (failure == ENOENT) return nullptr;
    if (failure == ELOOP)
      fail(ErrorCode::ChannelPermission, path + " is a symbolic link, which is never followed");
    if (failure == EACCES || failure == EPERM || failure == EROFS) {
      fail(ErrorCode::ChannelPermission,
           path + " cannot be opened for reading and writing by uid " + std::to_string(geteuid()) +
               "; its owner can widen its mode",
           failure);
    }
    if (failure == EISDIR || failure == ENXIO) {
      fail(ErrorCode::ChannelLayout, path + " is not a regular file, so not a channel", failure);
    }
    fail(ErrorCode::System, path + " cannot be opened", failure);
  }
  struct stat info {};
  if (fstat(fd.get(), &info) != 0) fail(ErrorCode::System, path + " cannot be examined", errno);
  if (!S_ISREG(info.st_mode)) {
    fail(ErrorCode::ChannelLayout, path + " is not a regular file, so not a channel");
  }
  if (info.st_uid != geteuid() && (info.st_mode & 0022) == 0) {
    fail(ErrorCode::ChannelPermission, path + " belongs to uid " + std::to_string(info.st_uid) +
                                           ", this process is uid " + std::to_string(geteuid()) +
                                           "; the owner can share it by creating it with a wider mode");
  }
  return memory::make_file_storage(std::move(fd), kind, path);
}

std::unique_ptr<memory::Storage> make_unnamed_storage(const std::string& path, memory::StorageKind kind,
                                                      std::uint32_t mode) {
  std::string directory = parent_of(path);
  base::Descriptor fd = open(directory.c_str(), O_TMPFILE | O_RDWR | O_CLOEXEC, 0600);
  if (!fd) {
    int failure = errno;
    if (failure == ENOENT || failure == ENOTDIR) {
      fail(ErrorCode::ChannelNotFound, "the directory " + directory + " does not exist; make it first",
           failure);
    }
    if (failure == EACCES || failure == EROFS || failure == EPERM) {
      fail(ErrorCode::ChannelPermission, "no file can be made in " + directory, failure);
    }
    if (failure == EOPNOTSUPP || failure == EISDIR) {
      fail(ErrorCode::FeatureUnavailable,
           "the file system of " + directory +
               " has no unnamed files (O_TMPFILE), which a channel needs to appear in one step; use another "
               "directory",
           failure);
    }
    fail(ErrorCode::System, "no file can be made in " + directory, failure);
  }
  if (fchmod(fd.get(), static_cast<mode_t>(mode & 0666)) != 0) {
    fail(ErrorCode::System, "the mode of a new file in " + directory + " cannot be set", errno);
  }
  return memory::make_file_storage(std::move(fd), kind, path);
}

bool link_storage(const memory::Storage& storage, const std::string& path) {
  if (linkat(AT_FDCWD, descriptor_path(storage).c_str(), AT_FDCWD, path.c_str(), AT_SYMLINK_FOLLOW) == 0)
    return true;
  if (errno == EEXIST) return false;
  fail(ErrorCode::System, path + " cannot be given its name", errno);
}

void sync_name(const memory::Storage& storage, const std::string& path) {
  int fd = open(parent_of(path).c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC);
  // Some file systems have nothing to write for a directory and say EINVAL.
  const bool synced = fd >= 0 && (fsync(fd) == 0 || errno == EINVAL);
  const int failure = errno;
  if (fd >= 0) close(fd);
  if (synced) return;
  static_cast<void>(try_remove_name(storage, path));
  fail(ErrorCode::System, "the name of " + path + " cannot be written to the disk", failure);
}

bool is_named(const memory::Storage& storage, const std::string& path) {
  bool same = false;
  const int failure = compare_with_name(storage, path, same);
  if (failure != 0) fail(ErrorCode::System, path + " cannot be examined", failure);
  return same;
}

int try_remove_name(const memory::Storage& storage, const std::string& path) noexcept {
  bool same = false;
  int failure = compare_with_name(storage, path, same);
  if (failure != 0 || !same) return failure;
  for (int attempt = 0; attempt < kTries; ++attempt) {
    if (::unlink(path.c_str()) == 0 || errno == ENOENT) return 0;
    failure = errno;
  }
  return failure;
}

void remove_name(const memory::Storage& storage, const std::string& path) {
  const int failure = try_remove_name(storage, path);
  if (failure != 0) fail(ErrorCode::System, path + " cannot be removed", failure);
}

}  // namespace channel
}  // namespace dsline
