#pragma once

#include <gtest/gtest.h>
#include <unistd.h>

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <memory>
#include <string>

#include "base/atomic.hpp"
#include "base/clock.hpp"
#include "dsline/channel.hpp"

namespace dsline::support {

/// Far enough that only a channel that is stuck reaches it.
inline std::int64_t patience() { return base::monotonic_ns() + 60'000'000'000; }

inline ChannelOptions small(std::uint32_t capacity = 4, std::uint64_t slot_size = 64) {
  ChannelOptions options;
  options.capacity = capacity;
  options.slot_size = options.max_message_size = slot_size;
  options.max_handles = 16;
  return options;
}

/// Another handle of an anonymous channel; the dead are recovered on the way.
inline std::shared_ptr<Channel> adopt(const Channel& channel) {
  return Channel::adopt_anonymous(dup(channel.descriptor()));
}

inline Outcome send(Channel& channel, const std::string& text, Backpressure policy = Backpressure::Raise) {
  return channel.try_send(text.data(), text.size(), kBytesMessage, nullptr, 0, 0, policy);
}

inline std::string text_of(const Received& message) {
  return {reinterpret_cast<const char*>(message.payload), message.payload_bytes};
}

/// The next message, taken and released; "(empty)", "(closed)" or "(corrupted)" where there is none.
inline std::string next(Channel& channel) {
  Received message;
  switch (channel.try_recv(message)) {
    case Outcome::Ok: {
      std::string text = text_of(message);
      channel.release(message);
      return text;
    }
    case Outcome::Closed:
      return "(closed)";
    case Outcome::Corrupted:
      return "(corrupted)";
    default:
      return "(empty)";
  }
}

template <class Call>
ErrorCode code_of(Call&& call, std::string* text = nullptr) {
  try {
    call();
  } catch (const Error& error) {
    if (text != nullptr) *text = error.what();
    return error.code();
  }
  ADD_FAILURE() << "no error was thrown";
  return ErrorCode::Internal;
}

class Folder {
 public:
  Folder() : path_("/tmp/dsline-test-XXXXXX") {
    if (mkdtemp(path_.data()) == nullptr) std::abort();
  }
  ~Folder() { std::filesystem::remove_all(path_); }
  std::string operator/(const char* name) const { return path_ + "/" + name; }

 private:
  std::string path_;
};

/// A name that no other test has; what is left under it goes with this object.
class Name {
 public:
  Name() {
    static int count = 0;
    text_ = "cpptest-" + std::to_string(getpid()) + "-" + std::to_string(count++);
  }
  ~Name() { ::unlink(path().c_str()); }
  operator const std::string&() const { return text_; }
  std::string path() const { return channel_directory() + "/" + text_; }
  bool exists() const { return access(path().c_str(), F_OK) == 0; }

 private:
  std::string text_;
};

}  // namespace dsline::support
