#pragma once

#include "memory/storage.hpp"

namespace dsline::memory {

/// Storage over a file descriptor: regular files, files on tmpfs and memfds share all of it but where the
/// descriptor comes from.
///
/// `data_fd_` sizes and maps and is what a forked child goes on with; `lock_fd_` is a second open file description
/// of the same file that carries the locks, and is closed in a forked child.
class FileStorage : public Storage {
 public:
  FileStorage(base::Descriptor fd, StorageKind kind, std::string path);
  ~FileStorage() override;

  StorageKind kind() const noexcept override { return kind_; }
  std::string describe() const override { return path_; }
  std::uint64_t size() const override;
  std::unique_ptr<Storage> again() const override;
  std::uint64_t read_start(void* to, std::uint64_t bytes) const noexcept override;
  bool sync() noexcept override;
  void resize(std::uint64_t bytes) override;
  void check_room(std::uint64_t bytes, const std::string& purpose) const override;
  void reserve_checked(std::uint64_t offset, std::uint64_t length, const std::string& purpose) override;
  void give_back(std::uint64_t offset, std::uint64_t length) noexcept override;
  std::byte* map(std::uint64_t offset, std::uint64_t length, Access access) override;
  void unmap(std::byte* address, std::uint64_t length) noexcept override;
  bool try_lock(std::uint32_t byte) noexcept override;
  void unlock(std::uint32_t byte) noexcept override;
  bool is_locked(std::uint32_t byte) const noexcept override;
  void renew_locks() override;
  void drop_locks() noexcept override;
  int descriptor() const noexcept override { return data_fd_.get(); }

 private:
  void open_lock_descriptor();

  base::Descriptor data_fd_;
  int lock_fd_ = -1;
  std::uint32_t lock_generation_ = 0;  // base::fork_generation() when lock_fd_ was opened
  StorageKind kind_;
  std::string path_;
};

}  // namespace dsline::memory
