#include <sys/mman.h>

#include <cerrno>
#include <mutex>
#include <set>

#include "dsline/error.hpp"
#include "memory/budget.hpp"
#include "memory/storage.hpp"

#ifndef MADV_POPULATE_WRITE
#define MADV_POPULATE_WRITE 23
#endif

namespace dsline::memory {
namespace {

class HeapStorage final : public Storage {
 public:
  ~HeapStorage() override {
    if (base_ != nullptr) munmap(base_, size_);
  }

  StorageKind kind() const noexcept override { return StorageKind::Heap; }
  std::string describe() const override { return "anonymous memory of this process"; }
  std::uint64_t size() const override { return size_; }

  void resize(std::uint64_t bytes) override {
    void* address =
        mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (address == MAP_FAILED) {
      throw Error(ErrorCode::SharedMemoryFull,
                  "no address space for " + std::to_string(bytes) +
                      " bytes of heap; lower max_message_size or capacity, or raise the limit (ulimit -v)",
                  errno);
    }
    madvise(address, bytes, MADV_DONTDUMP);
    base_ = static_cast<std::byte*>(address);
    size_ = bytes;
  }

  void check_room(std::uint64_t bytes, const std::string& purpose) const override {
    check_budget(bytes, -1, describe(), purpose);
  }

  void reserve_checked(std::uint64_t offset, std::uint64_t length, const std::string& purpose) override {
    std::uint64_t from = offset & ~std::uint64_t{4095};
    // Older kernels refuse the advice; the pages then come at the first write, still within the checked budget.
    if (madvise(base_ + from, length + (offset - from), MADV_POPULATE_WRITE) != 0 && errno == ENOMEM) {
      throw Error(ErrorCode::SharedMemoryFull, purpose + ": the kernel has no memory for it", ENOMEM);
    }
  }

  void give_back(std::uint64_t offset, std::uint64_t length) noexcept override {
    madvise(base_ + offset, length, MADV_DONTNEED);
  }

  std::byte* map(std::uint64_t offset, std::uint64_t, Access) override { return base_ + offset; }
  void unmap(std::byte*, std::uint64_t) noexcept override {}

  // One object is the only user of these bytes, so a lock is free unless it was taken here.
  bool try_lock(std::uint32_t byte) noexcept override {
    std::lock_guard guard(mutex_);
    return locked_.insert(byte).second;
  }
  void unlock(std::uint32_t byte) noexcept override {
    std::lock_guard guard(mutex_);
    locked_.erase(byte);
  }
  bool is_locked(std::uint32_t) const noexcept override { return false; }
  void renew_locks() override {
    throw Error(ErrorCode::FeatureUnavailable,
                "a heap channel does not cross a fork: its memory belongs to the process that made it; use a "
                "named channel or an anonymous one (name=None)");
  }
  void drop_locks() noexcept override {
    std::lock_guard guard(mutex_);
    locked_.clear();
  }
  int descriptor() const noexcept override { return -1; }

 private:
  std::byte* base_ = nullptr;
  std::uint64_t size_ = 0;
  std::mutex mutex_;
  std::set<std::uint32_t> locked_;
};

}  // namespace

std::unique_ptr<Storage> make_heap_storage() { return std::make_unique<HeapStorage>(); }

}  // namespace dsline::memory
