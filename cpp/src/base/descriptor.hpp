#pragma once

#include <unistd.h>

#include <utility>

namespace dsline::base {

/// Owner of a file descriptor: whatever is thrown, it is closed.
class Descriptor {
 public:
  /// Takes `fd` over; -1 is none. Implicit, so that what a system call returned is owned at once.
  Descriptor(int fd = -1) noexcept : fd_(fd) {}
  Descriptor(Descriptor&& other) noexcept : fd_(other.release()) {}
  Descriptor& operator=(Descriptor&& other) noexcept {
    if (this != &other) reset(other.release());
    return *this;
  }
  ~Descriptor() { reset(); }

  int get() const noexcept { return fd_; }
  explicit operator bool() const noexcept { return fd_ >= 0; }
  int release() noexcept { return std::exchange(fd_, -1); }
  void reset(int fd = -1) noexcept {
    if (fd_ >= 0) ::close(fd_);
    fd_ = fd;
  }

 private:
  int fd_;
};

}  // namespace dsline::base
