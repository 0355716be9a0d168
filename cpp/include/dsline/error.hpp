#pragma once

#include <new>
#include <stdexcept>
#include <string>
#include <utility>

namespace dsline {

/// What went wrong, independent of the wording. `dsline/errors.py` maps every value to a Python class by number.
enum class ErrorCode : int {
  Internal = 0,
  InvalidArgument = 1,
  ChannelExists = 2,
  ChannelNotFound = 3,
  ChannelMismatch = 4,
  ChannelLayout = 5,
  ChannelPermission = 6,
  ChannelClosed = 7,
  MessageTooLarge = 8,
  SharedMemoryFull = 9,
  CorruptedMessage = 10,
  TooManyHandles = 11,
  FeatureUnavailable = 12,
  System = 13,
  BufferTooSmall = 14,
  TimedOut = 15,
  TooManyGroups = 16,
  SchemaMismatch = 17,
};
inline constexpr int kErrorCodeCount = 18;
/// Not an ErrorCode: the allocator of the process failed.
inline constexpr int kOutOfMemory = -1;

/// The one exception of the core: creating, attaching, mapping and misuse throw it; the outcome of a send or
/// a receive is a value (see Outcome).
class Error : public std::runtime_error {
 public:
  Error(ErrorCode code, const std::string& message, int os_errno = 0, std::string detail = {})
      : std::runtime_error(message), code_(code), os_errno_(os_errno), detail_(std::move(detail)) {}

  ErrorCode code() const noexcept { return code_; }
  /// The errno of the failed system call, 0 where none failed.
  int os_errno() const noexcept { return os_errno_; }
  /// Of SchemaMismatch: the schema that the channel has.
  const std::string& detail() const noexcept { return detail_; }

 private:
  ErrorCode code_;
  int os_errno_;
  std::string detail_;
};

/// The exception in flight, as values. Requires: called from a catch block.
struct ErrorInfo {
  int code = 0;
  int os_errno = 0;
  std::string message;
  std::string detail;
};
inline ErrorInfo current_error() noexcept {
  try {
    throw;
  } catch (const Error& error) {
    return {static_cast<int>(error.code()), error.os_errno(), error.what(), error.detail()};
  } catch (const std::bad_alloc&) {
    return {kOutOfMemory, 0, "out of memory", ""};
  } catch (const std::exception& error) {
    return {static_cast<int>(ErrorCode::Internal), 0, error.what(), ""};
  } catch (...) {
    return {static_cast<int>(ErrorCode::Internal), 0, "unknown C++ exception", ""};
  }
}

}  // namespace dsline
