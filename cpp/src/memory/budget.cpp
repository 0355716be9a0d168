#include "memory/budget.hpp"

#include <fcntl.h>
#include <linux/magic.h>
#include <sys/statfs.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstdlib>
#include <cstring>
#include <limits>

#include "base/descriptor.hpp"
#include "dsline/error.hpp"

namespace dsline::memory {
namespace {

constexpr std::uint64_t kUnlimited = std::numeric_limits<std::uint64_t>::max();
// Left alone, so that a full channel does not wake the kernel's out-of-memory killer.
constexpr std::uint64_t kMarginBytes = 64ull << 20;

std::string read_text(const std::string& path) {
  std::string text;
  base::Descriptor fd = open(path.c_str(), O_RDONLY | O_CLOEXEC);
  if (!fd) return text;
  char chunk[4096];
  for (ssize_t n; (n = read(fd.get(), chunk, sizeof chunk)) > 0;)
    text.append(chunk, static_cast<std::size_t>(n));
  return text;
}

std::uint64_t number_after(const std::string& text, const char* key) {
  std::size_t at = text.find(key);
  if (at == std::string::npos) return kUnlimited;
  return strtoull(text.c_str() + at + strlen(key), nullptr, 10);
}

std::uint64_t read_number(const std::string& path) {
  std::string text = read_text(path);
  if (text.empty() || text[0] < '0' || text[0] > '9') return kUnlimited;  // "max" among others
  return strtoull(text.c_str(), nullptr, 10);
}

std::uint64_t room(std::uint64_t limit, std::uint64_t used) { return limit > used ? limit - used : 0; }

// Inactive file pages are given up under pressure, so they count as free.
std::uint64_t reclaimable(const std::string& folder) {
  std::uint64_t bytes = number_after(read_text(folder + "/memory.stat"), "inactive_file ");
  return bytes == kUnlimited ? 0 : bytes;
}

std::uint64_t cgroup_room() {
  std::uint64_t least = kUnlimited;
  std::string groups = read_text("/proc/self/cgroup");
  std::size_t from = 0;
  while (from < groups.size()) {
    std::size_t end = groups.find('\n', from);
    if (end == std::string::npos) end = groups.size();
    std::string line = groups.substr(from, end - from);
    from = end + 1;
    std::size_t second = line.find(':', line.find(':') + 1);
    if (second == std::string::npos) continue;
    std::string path = line.substr(second + 1);
    bool v2 = line.rfind("0::", 0) == 0;
    bool v1 = line.find(":memory:") != std::string::npos;
    if (!v2 && !v1) continue;
    std::string root = v2 ? "/sys/fs/cgroup" : "/sys/fs/cgroup/memory";
    // Every ancestor's limit counts.
    for (;;) {
      std::string folder = root + (path == "/" ? "" : path);
      std::uint64_t limit = read_number(folder + (v2 ? "/memory.max" : "/memory.limit_in_bytes"));
      if (limit < (1ull << 60)) {
        std::uint64_t used = read_number(folder + (v2 ? "/memory.current" : "/memory.usage_in_bytes"));
        if (used != kUnlimited)
          least = std::min(least, room(limit, used) + std::min(used, reclaimable(folder)));
      }
      std::size_t slash = path.rfind('/');
      if (slash == std::string::npos || path == "/") break;
      path = slash == 0 ? "/" : path.substr(0, slash);
    }
  }
  return least;
}

std::string mib(std::uint64_t bytes) {
  char text[64];
  snprintf(text, sizeof text, "%llu bytes (%.1f MiB)", static_cast<unsigned long long>(bytes),
           static_cast<double>(bytes) / (1 << 20));
  return text;
}

[[noreturn]] void refuse(std::uint64_t bytes, const Budget& budget, const std::string& where,
                         const std::string& purpose) {
  throw Error(ErrorCode::SharedMemoryFull,
              purpose + " needs " + mib(bytes) + " more in " + where + ", but only " +
                  mib(budget.free_bytes) + " are free (limited by " + budget.limited_by + "); " +
                  budget.way_out,
              ENOSPC);
}

}  // namespace

Budget memory_budget() {
  std::uint64_t available = number_after(read_text("/proc/meminfo"), "MemAvailable:");
  available = available == kUnlimited ? kUnlimited : available * 1024;
  std::uint64_t in_cgroup = cgroup_room();
  std::uint64_t least = std::min(available, in_cgroup);
  Budget budget;
  budget.free_bytes = least == kUnlimited ? kUnlimited : room(least, kMarginBytes);
  if (in_cgroup < available) {
    budget.limited_by = "the memory limit of this process's cgroup";
    budget.way_out = "raise the container's memory limit, or use fewer or smaller slots";
  } else {
    budget.limited_by = "MemAvailable of this machine";
    budget.way_out = "free memory, or use fewer or smaller slots, or a FileChannel on a disk";
  }
  return budget;
}

void check_budget(std::uint64_t bytes, int fd, const std::string& where, const std::string& purpose) {
  bool in_memory = true;
  if (fd >= 0) {
    struct statfs fs {};
    if (fstatfs(fd, &fs) == 0) {
      in_memory = fs.f_type == TMPFS_MAGIC || fs.f_type == RAMFS_MAGIC || fs.f_type == HUGETLBFS_MAGIC;
      // A memfd reports no blocks: it has no quota of its own.
      if (fs.f_blocks != 0) {
        Budget space;
        space.free_bytes = static_cast<std::uint64_t>(fs.f_bavail) * static_cast<std::uint64_t>(fs.f_bsize);
        space.limited_by = "the size of its file system, " + mib(static_cast<std::uint64_t>(fs.f_blocks) *
                                                                 static_cast<std::uint64_t>(fs.f_bsize));
        space.way_out = in_memory
                            ? "raise it (mount -o remount,size=…; docker run --shm-size=…), use an anonymous "
                              "channel (name=None), or use fewer or smaller slots"
                            : "free disk space, or use fewer or smaller slots";
        if (bytes > space.free_bytes) refuse(bytes, space, where, purpose);
      }
    }
  }
  if (!in_memory) return;
  Budget memory = memory_budget();
  if (bytes > memory.free_bytes) refuse(bytes, memory, where, purpose);
}

}  // namespace dsline::memory
