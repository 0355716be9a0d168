#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>

#include "base/descriptor.hpp"

namespace dsline::memory {

enum class StorageKind : std::uint32_t { Heap = 0, File = 1, PosixShm = 2, Memfd = 3 };
const char* storage_name(StorageKind kind) noexcept;

enum class Access { ReadOnly, ReadWrite };

/// Bytes that can be sized, reserved, mapped and locked: where a region lives.
///
/// Locks are one-byte kernel locks that belong to this object (its own open file description): two objects over
/// the same bytes exclude each other, also inside one process; two threads that use one object do not. The
/// kernel drops them when the process dies, however it dies. A forked child closes its copy at once; its object
/// must call renew_locks() before it locks anything.
class Storage {
 public:
  virtual ~Storage() = default;
  Storage() = default;
  Storage(const Storage&) = delete;
  Storage& operator=(const Storage&) = delete;

  virtual StorageKind kind() const noexcept = 0;
  /// The name that people know it by: a path, or a word for anonymous memory.
  virtual std::string describe() const = 0;
  virtual std::uint64_t size() const = 0;
  /// Another object over the same bytes, with locks of its own.
  virtual std::unique_ptr<Storage> again() const = 0;
  /// Copies at most `bytes` from the start, without a mapping: how many there were.
  virtual std::uint64_t read_start(void* to, std::uint64_t bytes) const noexcept = 0;
  /// Writes what has changed to the disk; false with errno when the kernel could not. True at once for bytes that no
  /// disk holds.
  virtual bool sync() noexcept = 0;

  /// Sets the size without reserving memory. Called once, before anything is mapped.
  virtual void resize(std::uint64_t bytes) = 0;

  /// Throws Error(SharedMemoryFull) when `bytes` more cannot be had; `purpose` says in the message who needs them.
  virtual void check_room(std::uint64_t bytes, const std::string& purpose) const = 0;

  /// Makes sure that [offset, offset + length) can be written without SIGBUS; its content is kept, and zero where
  /// it is new. Throws Error(SharedMemoryFull) before a byte of it is written. Requires: check_room() was asked,
  /// since some storages have no quota of their own.
  virtual void reserve_checked(std::uint64_t offset, std::uint64_t length, const std::string& purpose) = 0;

  /// Both in one.
  void reserve(std::uint64_t offset, std::uint64_t length, const std::string& purpose) {
    if (length == 0) return;
    check_room(length, purpose);
    reserve_checked(offset, length, purpose);
  }

  /// Gives the pages of [offset, offset + length) back; they read as zeros afterwards.
  virtual void give_back(std::uint64_t offset, std::uint64_t length) noexcept = 0;

  virtual std::byte* map(std::uint64_t offset, std::uint64_t length, Access access) = 0;
  virtual void unmap(std::byte* address, std::uint64_t length) noexcept = 0;

  /// False when somebody else holds it (errno EAGAIN or EACCES), or the kernel cannot lock (any other errno).
  virtual bool try_lock(std::uint32_t byte) noexcept = 0;
  virtual void unlock(std::uint32_t byte) noexcept = 0;
  /// True when somebody else holds the byte's lock. A hint: it may change at once.
  virtual bool is_locked(std::uint32_t byte) const noexcept = 0;
  virtual void renew_locks() = 0;
  /// Drops every lock of this object.
  virtual void drop_locks() noexcept = 0;

  /// A descriptor to hand to another process, -1 where the bytes cannot leave this one.
  virtual int descriptor() const noexcept = 0;
};

/// Anonymous memory of this process.
std::unique_ptr<Storage> make_heap_storage();

/// A sealed memfd of its own, or one that another process handed over (takes the descriptor over).
std::unique_ptr<Storage> make_memfd_storage();
std::unique_ptr<Storage> adopt_memfd_storage(base::Descriptor fd);

/// Over a file descriptor (takes it over): a regular file, or one on tmpfs (PosixShm).
std::unique_ptr<Storage> make_file_storage(base::Descriptor fd, StorageKind kind, std::string path);

}  // namespace dsline::memory
