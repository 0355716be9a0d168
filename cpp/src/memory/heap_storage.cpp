#include <sys/mman.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <cstring>
#include <mutex>

#include "dsline/error.hpp"
#include "memory/budget.hpp"
#include "memory/layout.hpp"
#include "memory/storage.hpp"

#ifndef MADV_POPULATE_WRITE
#define MADV_POPULATE_WRITE 23
#endif

namespace dsline::memory {
namespace {

class HeapStorage;

/// The bytes, and who has which lock: shared by the objects over them.
struct HeapBlock {
  ~HeapBlock() {
    if (base != nullptr) munmap(base, size);
  }
  std::byte* base = nullptr;
  std::uint64_t size = 0;
  std::mutex mutex;
  std::array<const HeapStorage*, 1 + kMaxParticipants> locked{};  // by lock byte
};

class HeapStorage final : public Storage {
 public:
  explicit HeapStorage(std::shared_ptr<HeapBlock> block) : block_(std::move(block)) {}
  ~HeapStorage() override { drop_locks(); }

  StorageKind kind() const noexcept override { return StorageKind::Heap; }
  std::string describe() const override { return "anonymous memory of this process"; }
  std::uint64_t size() const override { return block_->size; }
  std::unique_ptr<Storage> again() const override { return std::make_unique<HeapStorage>(block_); }
  std::uint64_t read_start(void* to, std::uint64_t bytes) const noexcept override {
    const std::uint64_t length = std::min(bytes, block_->size);
    std::memcpy(to, block_->base, length);
    return length;
  }
  bool sync() noexcept override { return true; }

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
    block_->base = static_cast<std::byte*>(address);
    block_->size = bytes;
  }

  void check_room(std::uint64_t bytes, const std::string& purpose) const override {
    check_budget(bytes, -1, describe(), purpose);
  }

  void reserve_checked(std::uint64_t offset, std::uint64_t length, const std::string& purpose) override {
    std::uint64_t from = offset & ~std::uint64_t{4095};
    // Older kernels refuse the advice; the pages then come at the first write, still within the checked budget.
    if (madvise(block_->base + from, length + (offset - from), MADV_POPULATE_WRITE) != 0 && errno == ENOMEM) {
      throw Error(ErrorCode::SharedMemoryFull, purpose + ": the kernel has no memory for it", ENOMEM);
    }
  }

  void give_back(std::uint64_t offset, std::uint64_t length) noexcept override {
    madvise(block_->base + offset, length, MADV_DONTNEED);
  }

  std::byte* map(std::uint64_t offset, std::uint64_t, Access) override { return block_->base + offset; }
  void unmap(std::byte*, std::uint64_t) noexcept override {}

  bool try_lock(std::uint32_t byte) noexcept override {
    std::lock_guard guard(block_->mutex);
    if (block_->locked[byte] == nullptr) block_->locked[byte] = this;
    return block_->locked[byte] == this;
  }
  void unlock(std::uint32_t byte) noexcept override {
    std::lock_guard guard(block_->mutex);
    if (block_->locked[byte] == this) block_->locked[byte] = nullptr;
  }
  bool is_locked(std::uint32_t byte) const noexcept override {
    std::lock_guard guard(block_->mutex);
    return block_->locked[byte] != nullptr && block_->locked[byte] != this;
  }
  void renew_locks() override {
    throw Error(ErrorCode::FeatureUnavailable,
                "a heap channel does not cross a fork: its memory belongs to the process that made it; use a "
                "named channel or an anonymous one (name=None)");
  }
  void drop_locks() noexcept override {
    std::lock_guard guard(block_->mutex);
    for (const HeapStorage*& owner : block_->locked) {
      if (owner == this) owner = nullptr;
    }
  }
  int descriptor() const noexcept override { return -1; }

 private:
  std::shared_ptr<HeapBlock> block_;
};

}  // namespace

std::unique_ptr<Storage> make_heap_storage() {
  return std::make_unique<HeapStorage>(std::make_shared<HeapBlock>());
}

}  // namespace dsline::memory
