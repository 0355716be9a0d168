// Page swapping under a live view, against the copy at receive. docs/design/slow-consumers.md has the figures.
//
// Copy: the new message is copied into private memory, and its slot is free.
// Swap: the payload of an OLD view is copied into private pages, which are moved over the view's address (mremap), so that
//   the view stays what it was, its slot is free, and the new message is given without a copy. A page of a shared file
//   cannot be taken out of the file, so this copies as well. The slot needs another mapping for its next message.

#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

namespace {

constexpr std::size_t kPage = 4096;
constexpr std::size_t kSmallest = std::size_t{64} << 10;
constexpr std::size_t kLargest = std::size_t{64} << 20;
constexpr int kRounds = 15;

double microseconds() {
  return std::chrono::duration<double, std::micro>(std::chrono::steady_clock::now().time_since_epoch())
      .count();
}

double median(std::vector<double>& times) {
  std::sort(times.begin(), times.end());
  return times[times.size() / 2];
}

volatile char sink;

char* map(int flags, int protection, int fd, std::size_t bytes) {
  void* at = mmap(nullptr, bytes, protection, flags, fd, 0);
  if (at == MAP_FAILED) std::abort();
  return static_cast<char*>(at);
}

void touch(const char* at, std::size_t bytes) {
  for (std::size_t i = 0; i < bytes; i += kPage) sink = at[i];
}

}  // namespace

int main() {
  std::printf("| bytes | copy (us) | swap (us) | of these, mapping the slot anew |\n|---|---|---|---|\n");
  for (std::size_t bytes = kSmallest; bytes <= kLargest; bytes *= 4) {
    const int fd = memfd_create("page_swap", MFD_CLOEXEC);
    if (fd < 0 || ftruncate(fd, static_cast<off_t>(2 * bytes)) != 0) return 1;
    char* writable = map(MAP_SHARED, PROT_READ | PROT_WRITE, fd, 2 * bytes);
    std::memset(writable, 1, 2 * bytes);
    std::vector<double> copies, swaps, mappings;
    for (int round = 0; round < kRounds; ++round) {
      char* view = map(MAP_SHARED, PROT_READ, fd, 2 * bytes);
      touch(view, 2 * bytes);  // both messages have been read once

      double start = microseconds();
      char* copy = static_cast<char*>(std::malloc(bytes));
      std::memcpy(copy, view + bytes, bytes);
      copies.push_back(microseconds() - start);
      sink = copy[bytes / 2];
      std::free(copy);

      start = microseconds();
      char* pages = map(MAP_PRIVATE | MAP_ANONYMOUS | MAP_POPULATE, PROT_READ | PROT_WRITE, -1, bytes);
      std::memcpy(pages, view, bytes);
      if (mprotect(pages, bytes, PROT_READ) != 0) return 1;
      if (mremap(pages, bytes, bytes, MREMAP_MAYMOVE | MREMAP_FIXED, view) != view) return 1;
      const double moved = microseconds();
      char* again = map(MAP_SHARED, PROT_READ, fd, bytes);
      touch(again, bytes);
      mappings.push_back(microseconds() - moved);
      swaps.push_back(microseconds() - start);
      munmap(again, bytes);
      munmap(view, 2 * bytes);
    }
    std::printf("| %zu KiB | %.0f | %.0f | %.0f |\n", bytes >> 10, median(copies), median(swaps),
                median(mappings));
    munmap(writable, 2 * bytes);
    close(fd);
  }
}
