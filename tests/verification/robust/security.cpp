/// What docs/design/security.md promises, one check each. Those that need a second user run as root only, and are counted
/// as skipped otherwise.

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>

#include <atomic>
#include <functional>
#include <thread>

#include "frames/frame_header.hpp"
#include "operations.hpp"

namespace dsline::robust {
namespace {

constexpr uid_t kOtherUser = 61234;

ChannelOptions small_options() {
  ChannelOptions o;
  o.capacity = 4;
  o.slot_size = o.max_message_size = 4096;
  o.max_handles = 8;
  o.checksum = 1;
  return o;
}

class Check {
 public:
  Check(Report& report, std::string folder) : report_(report), folder_(std::move(folder)) {}

  const std::string& folder() const noexcept { return folder_; }
  std::string name(const char* what) const { return "security-" + std::to_string(getpid()) + "-" + what; }
  std::string path(const char* what) const { return channel_directory() + "/" + name(what); }

  void that(bool good, const std::string& what) {
    ++report_["checks"];
    if (!good) report_.fail(current + ": " + what);
  }
  /// `call` throws Error with this code.
  void refused(ErrorCode code, const std::string& what, const std::function<void()>& call) {
    ++report_["checks"];
    try {
      call();
      report_.fail(current + ": " + what + " was not refused");
    } catch (const Error& error) {
      if (error.code() != code)
        report_.fail(current + ": " + what + " was refused otherwise: " + error.what());
    }
  }
  /// Runs `work` in a child as another user; it returns whether the promise held.
  void as_other_user(const std::string& what, const std::function<bool()>& work) {
    const int status = wait_child(start_child([&] {
                                    if (setgid(kOtherUser) != 0 || setuid(kOtherUser) != 0) return 3;
                                    return work() ? 0 : 1;
                                  }),
                                  10);
    that(status == 0, what + " (" + describe_status(status) + ")");
  }

  std::string current;

 private:
  Report& report_;
  std::string folder_;
};

std::shared_ptr<Channel> open_named(const std::string& name, OpenMode mode = OpenMode::OpenOrCreate,
                                    std::uint32_t bits = 0600) {
  ChannelOptions options = small_options();
  options.mode = bits;
  return Channel::open_named(name, options, mode);
}

bool send_text(Channel& channel, const std::string& text) {
  return channel.try_send(text.data(), text.size(), kBytesMessage, nullptr, 0, 0, Backpressure::Raise) ==
         Outcome::Ok;
}

mode_t mode_of(const std::string& path) {
  struct stat info {};
  return lstat(path.c_str(), &info) == 0 ? info.st_mode & 07777 : 0;
}

bool write_file(const std::string& path, const std::string& text) {
  std::ofstream file(path);
  file << text;
  return file.good();
}
std::string read_file(const std::string& path) {
  std::ifstream file(path);
  return {std::istreambuf_iterator<char>(file), std::istreambuf_iterator<char>()};
}

// --- the promises -----------------------------------------------------------------------------------------------------

void modes_do_not_depend_on_umask(Check& check) {
  for (mode_t mask : {0000, 0022, 0777}) {
    const mode_t before = umask(mask);
    auto channel = open_named(check.name("mode"));
    auto wide = open_named(check.name("wide"), OpenMode::OpenOrCreate, 0660);
    umask(before);
    check.that(mode_of(check.path("mode")) == 0600, "a channel is for its user alone, whatever the umask");
    check.that(mode_of(check.path("wide")) == 0660, "a wider mode is given only when it is asked for");
    check.that((mode_of(channel_directory()) & 0066) == 0, "nobody else may list or write the directory");
    auto file = Channel::open_file(check.folder() + "/mode", small_options(), OpenMode::Create);
    check.that(mode_of(check.folder() + "/mode") == 0600, "a file is for its user alone");
    ::unlink((check.folder() + "/mode").c_str());
  }
}

void links_are_not_followed(Check& check) {
  auto victim = Channel::open_file(check.folder() + "/victim", small_options(), OpenMode::Create);
  const std::string link = check.path("link");
  check.that(symlink((check.folder() + "/victim").c_str(), link.c_str()) == 0, "making a link");
  for (OpenMode mode : {OpenMode::Open, OpenMode::OpenOrCreate, OpenMode::Create}) {
    check.refused(ErrorCode::ChannelPermission, "a symbolic link",
                  [&] { open_named(check.name("link"), mode); });
  }
  check.refused(ErrorCode::ChannelPermission, "a symbolic link to a file", [&] {
    check.that(symlink((check.folder() + "/victim").c_str(), (check.folder() + "/link").c_str()) == 0,
               "a link");
    Channel::open_file(check.folder() + "/link", small_options(), OpenMode::Open);
  });
  check.that(victim->stats().participants == 1, "nobody reached the channel behind the link");
  ::unlink(link.c_str());
  ::unlink((check.folder() + "/link").c_str());
  // A link to nowhere does not say where a channel is made.
  check.that(symlink((check.folder() + "/nowhere").c_str(), link.c_str()) == 0, "making a link to nowhere");
  check.refused(ErrorCode::ChannelPermission, "a link to nowhere", [&] { open_named(check.name("link")); });
  check.that(access((check.folder() + "/nowhere").c_str(), F_OK) != 0, "nothing was made behind the link");
  ::unlink(link.c_str());
}

void squatted_names_are_left_alone(Check& check) {
  auto keeper = open_named(check.name("keeper"));
  const std::string path = check.path("squat");
  const std::string text =
      "somebody's notes, long enough to be read as a header by whoever does not look closely";
  check.that(write_file(path, text), "writing a foreign file");
  for (OpenMode mode : {OpenMode::Open, OpenMode::OpenOrCreate, OpenMode::Create}) {
    check.refused(ErrorCode::ChannelLayout, "a foreign file", [&] { open_named(check.name("squat"), mode); });
  }
  check.that(read_file(path) == text, "a foreign file keeps its content");
  ::unlink(path.c_str());
  check.that(mkfifo(path.c_str(), 0600) == 0, "making a pipe");
  check.refused(ErrorCode::ChannelLayout, "a pipe", [&] { open_named(check.name("squat")); });
  ::unlink(path.c_str());
  check.that(mkdir(path.c_str(), 0700) == 0, "making a directory");
  check.refused(ErrorCode::ChannelLayout, "a directory", [&] { open_named(check.name("squat")); });
  rmdir(path.c_str());
}

void names_stay_in_their_directory(Check& check) {
  for (const char* name : {"", ".", "..", "../x", "a/b", "/etc/passwd", ".hidden", "a\nb"}) {
    check.refused(ErrorCode::InvalidArgument, std::string("the name '") + name + "'",
                  [&] { open_named(name); });
  }
  check.refused(ErrorCode::InvalidArgument, "a name of 101 bytes",
                [&] { open_named(std::string(101, 'a')); });
}

void other_users_are_refused(Check& check) {
  auto mine = Channel::open_file(check.folder() + "/mine", small_options(), OpenMode::Create);
  check.that(chmod(check.folder().c_str(), 0755) == 0, "opening the folder");
  check.as_other_user("another user cannot open a channel", [&] {
    try {
      Channel::open_file(check.folder() + "/mine", small_options(), OpenMode::Open);
    } catch (const Error& error) {
      return error.code() == ErrorCode::ChannelPermission;
    }
    return false;
  });
  // The other way round: even who may open everything does not trust another user's file.
  check.that(chmod(check.folder().c_str(), 0777) == 0, "opening the folder wider");
  check.as_other_user("making a channel of another user", [&] {
    Channel::open_file(check.folder() + "/theirs", small_options(), OpenMode::Create);
    return true;
  });
  check.refused(ErrorCode::ChannelPermission, "another user's channel",
                [&] { Channel::open_file(check.folder() + "/theirs", small_options(), OpenMode::Open); });
  check.that(chmod(check.folder().c_str(), 0700) == 0, "closing the folder");
  ::unlink((check.folder() + "/mine").c_str());
  ::unlink((check.folder() + "/theirs").c_str());
}

void directories_of_others_are_refused(Check& check) {
  const std::string directory = "/dev/shm/dsline-" + std::to_string(kOtherUser);
  auto refuses = [&] {
    try {
      open_named("squatted");
    } catch (const Error& error) {
      return error.code() == ErrorCode::ChannelPermission;
    }
    return false;
  };
  rmdir(directory.c_str());
  check.that(mkdir(directory.c_str(), 0777) == 0 && chmod(directory.c_str(), 0777) == 0,
             "squatting a directory");
  check.as_other_user("a directory that somebody else made is refused", refuses);
  check.that(chown(directory.c_str(), kOtherUser, kOtherUser) == 0, "giving the directory away");
  check.as_other_user("a directory that others may write to is refused", refuses);
  rmdir(directory.c_str());
  check.that(symlink(check.folder().c_str(), directory.c_str()) == 0, "linking a directory");
  check.as_other_user("a directory that is a link is refused", refuses);
  ::unlink(directory.c_str());
  check.as_other_user("the directory is made for its user alone", [&] {
    umask(0);
    auto channel = open_named("own");
    return mode_of(directory) == 0700 && mode_of(directory + "/own") == 0600;
  });
  ::unlink((directory + "/own").c_str());
  rmdir(directory.c_str());
}

void geometry_is_copied_once(Check& check) {
  auto sender = Channel::create_anonymous(small_options());
  auto receiver = Channel::adopt_anonymous(dup(sender->descriptor()));
  Bytes bytes(sender->descriptor());
  const std::size_t from = offsetof(memory::RegionHeader, geometry);
  const std::size_t to = offsetof(memory::RegionHeader, active);
  const std::vector<unsigned char> before(bytes.data() + from, bytes.data() + to);
  for (int value : {0x00, 0xFF, 0x7F}) {
    std::memset(bytes.data() + from, value, to - from);
    check.that(sender->capacity() == 4 && receiver->slot_size() == 4096, "the geometry stays what it was");
    for (int i = 0; i < 20; ++i) {
      check.that(send_text(*sender, "still here"), "sending goes on");
      Received message;
      check.that(receiver->try_recv(message) == Outcome::Ok && message.payload_bytes == 10,
                 "receiving goes on");
      receiver->release(message);
    }
    check.refused(ErrorCode::ChannelLayout, "a region with another geometry",
                  [&] { Channel::adopt_anonymous(dup(sender->descriptor())); });
  }
  std::memcpy(bytes.data() + from, before.data(), before.size());
}

void numbers_of_slots_are_checked(Check& check) {
  auto sender = Channel::create_anonymous(small_options());
  auto receiver = Channel::adopt_anonymous(dup(sender->descriptor()));
  Bytes bytes(sender->descriptor());
  const memory::Geometry g = bytes.geometry();
  for (std::uint32_t k = 0; k < g.order_cells; ++k) {
    const std::uint64_t at = g.order_offset + sizeof(memory::OrderState) + k * 8;
    bytes.set_word(at, bytes.word(at) | 0xFFFFF);
  }
  for (std::uint64_t at = g.free_map_offset; at < g.free_map_offset + 8; at += 8)
    bytes.set_word(at, ~std::uint64_t{0});
  CallWatch watch;
  Tally tally;
  Peer peer(receiver, watch, tally, 1);
  for (int i = 0; i < 10; ++i) {
    send_text(*sender, "a message");
    peer.exercise(0);
  }
  peer.finish(false);
  check.that(watch.wrong.empty() || watch.wrong.find("nobody has sent") != std::string::npos, watch.wrong);
  check.that(tally.calls > 100, "calls were made");
}

/// A peer changes the lengths of a header all the time: whatever is received was checked, in the copy that is used.
void headers_are_fetched_once(Check& check) {
  ChannelOptions options = small_options();
  options.checksum = 0;  // no checksum helps
  auto sender = Channel::create_anonymous(options);
  auto receiver = Channel::adopt_anonymous(dup(sender->descriptor()));
  Bytes bytes(sender->descriptor());
  const memory::Geometry g = bytes.geometry();
  std::atomic<bool> over{false};
  std::thread scribbler([&] {
    Random random(3);
    while (!over.load()) {
      const std::uint32_t s = static_cast<std::uint32_t>(random.below(g.slots));
      unsigned char* frame = bytes.data() + g.arena_offset + s * g.stride_bytes + memory::frame_shift(g, s);
      const std::uint64_t length = random.below(2) == 0 ? random.below(4096) : random.next();
      std::memcpy(frame + offsetof(frames::FrameHeader, payload_bytes), &length, 8);
      const std::uint32_t meta = static_cast<std::uint32_t>(random.below(4) == 0 ? random.next() : 0);
      std::memcpy(frame + offsetof(frames::FrameHeader, meta_bytes), &meta, 4);
    }
  });
  std::uint64_t good = 0, refused = 0;
  const std::int64_t end = base::monotonic_ns() + 1'000'000'000;
  while (base::monotonic_ns() < end) {
    while (send_text(*sender, std::string(1000, 'x'))) {
    }
    sched_yield();
    for (;;) {
      Received message;
      const Outcome outcome = receiver->try_recv(message);
      refused += outcome == Outcome::Corrupted;
      if (outcome == Outcome::Empty) break;
      if (outcome != Outcome::Ok) continue;
      ++good;
      if (message.meta_bytes > 65536 || message.payload_bytes > g.stride_bytes) {
        check.that(false, "a length that was not checked");
      }
      touch(message.payload, message.payload_bytes);
      touch(message.meta(), message.meta_bytes);
      receiver->release(message);
    }
  }
  over.store(true);
  scribbler.join();
  check.that(good > 100 && refused > 100, "both kinds were met: " + std::to_string(good) + " good, " +
                                              std::to_string(refused) + " refused");
}

struct Mapping {
  std::string access;
  std::uint64_t offset;
};
std::vector<Mapping> mappings_of(const std::string& what) {
  std::vector<Mapping> found;
  std::ifstream maps("/proc/self/maps");
  for (std::string line; std::getline(maps, line);) {
    if (line.find(what) == std::string::npos) continue;
    char access[5] = {};
    unsigned long long offset = 0;
    if (std::sscanf(line.c_str(), "%*s %4s %llx", access, &offset) == 2) found.push_back({access, offset});
  }
  return found;
}

void payloads_are_read_only(Check& check) {
  auto sender = Channel::create_anonymous(small_options());
  check.that(send_text(*sender, "read me"), "sending");
  const int fd = dup(sender->descriptor());
  const int status = wait_child(start_child([&] {
                                  auto consumer = Channel::adopt_anonymous(fd);
                                  Received message;
                                  if (consumer->try_recv(message) != Outcome::Ok) return 2;
                                  signal(SIGSEGV, SIG_DFL);  // a sanitizer catches it
                                  *const_cast<std::byte*>(message.payload) = std::byte{1};
                                  return 0;
                                }),
                                10);
  check.that(status != -1 && WIFSIGNALED(status) && WTERMSIG(status) == SIGSEGV,
             "a write into a received payload faults: " + describe_status(status));
  close(fd);
  auto file = Channel::open_file(check.folder() + "/maps", small_options(), OpenMode::Create);
  check.that(send_text(*file, "read me"), "sending");
  auto consumer = Channel::open_file(check.folder() + "/maps", small_options(), OpenMode::Open);
  Received message;
  check.that(consumer->try_recv(message) == Outcome::Ok, "receiving");
  consumer->release(message);
  bool writable_arena = false, executable = false;
  std::size_t count = 0;
  for (const Mapping& one : mappings_of(check.folder() + "/maps")) {
    ++count;
    writable_arena = writable_arena || (one.offset != 0 && one.access[1] == 'w');
    executable = executable || one.access[2] == 'x';
  }
  check.that(count >= 2 && !writable_arena, "who only receives has no writable mapping of payloads");
  check.that(!executable, "nothing is mapped executable");
  ::unlink((check.folder() + "/maps").c_str());
}

void memfds_are_sealed(Check& check) {
  auto channel = Channel::create_anonymous(small_options());
  const int seals = fcntl(channel->descriptor(), F_GET_SEALS);
  constexpr int kNeeded = F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_SEAL;
  check.that((seals & kNeeded) == kNeeded, "the size is sealed, and the seals are");
  errno = 0;
  check.that(ftruncate(channel->descriptor(), 4096) != 0 && errno == EPERM, "it cannot be cut");
  errno = 0;
  check.that(ftruncate(channel->descriptor(), 1 << 30) != 0 && errno == EPERM, "it cannot grow");
  check.that(send_text(*channel, "still here"), "sending goes on");
  const int open_one = memfd_create("dsline-unsealed", MFD_CLOEXEC | MFD_ALLOW_SEALING);
  check.refused(ErrorCode::ChannelLayout, "a memfd that could be cut",
                [&] { Channel::adopt_anonymous(open_one); });
  check.refused(ErrorCode::ChannelLayout, "a descriptor of a file",
                [&] { Channel::adopt_anonymous(open("/dev/null", O_RDWR | O_CLOEXEC)); });
}

void descriptors_do_not_pass_exec(Check& check) {
  auto channel = open_named(check.name("cloexec"));
  auto anonymous = Channel::create_anonymous(small_options());
  std::size_t ours = 0;
  DIR* folder = opendir("/proc/self/fd");
  while (const dirent* entry = readdir(folder)) {
    const int fd = std::atoi(entry->d_name);
    char target[256] = {};
    const std::string link = std::string("/proc/self/fd/") + entry->d_name;
    if (readlink(link.c_str(), target, sizeof target - 1) <= 0 || std::strstr(target, "dsline") == nullptr)
      continue;
    ++ours;
    check.that((fcntl(fd, F_GETFD) & FD_CLOEXEC) != 0, std::string(target) + " is closed by exec");
  }
  closedir(folder);
  check.that(ours >= 4, "descriptors were found");
}

void unlink_spares_others(Check& check) {
  auto first = open_named(check.name("moved"));
  check.that(rename(check.path("moved").c_str(), check.path("kept").c_str()) == 0, "moving a channel");
  auto second = open_named(check.name("moved"), OpenMode::Create);
  first->unlink();
  check.that(access(check.path("moved").c_str(), F_OK) == 0, "a name that moved on to another channel stays");
  ::unlink(check.path("kept").c_str());
}

struct Promise {
  const char* name;
  void (*run)(Check&);
  bool needs_root;
};
constexpr Promise kPromises[] = {
    {"modes do not depend on umask", modes_do_not_depend_on_umask, false},
    {"links are not followed", links_are_not_followed, false},
    {"squatted names are left alone", squatted_names_are_left_alone, false},
    {"names stay in their directory", names_stay_in_their_directory, false},
    {"other users are refused", other_users_are_refused, true},
    {"directories of others are refused", directories_of_others_are_refused, true},
    {"geometry is copied once", geometry_is_copied_once, false},
    {"numbers of slots are checked", numbers_of_slots_are_checked, false},
    {"headers are fetched once", headers_are_fetched_once, false},
    {"payloads are read-only", payloads_are_read_only, false},
    {"memfds are sealed", memfds_are_sealed, false},
    {"descriptors do not pass exec", descriptors_do_not_pass_exec, false},
    {"unlink spares others", unlink_spares_others, false},
};

int run(const Options& options) {
  Report report("security", options);
  std::string folder = "/tmp/dsline-security-XXXXXX";
  if (mkdtemp(folder.data()) == nullptr) return 2;
  for (const Promise& promise : kPromises) {
    if (!options.wants(promise.name)) continue;
    if (promise.needs_root && geteuid() != 0) {
      std::printf("skipped, needs a second user: %s\n", promise.name);
      ++report["skipped"];
      continue;
    }
    Check check(report, folder);
    check.current = promise.name;
    try {
      promise.run(check);
    } catch (const std::exception& error) {
      report.fail(std::string(promise.name) + ": " + error.what());
    }
    ++report["promises"];
  }
  ::unlink((folder + "/victim").c_str());
  if (rmdir(folder.c_str()) != 0) report.fail("something is left in " + folder);
  report.expect_at_least("checks", options.only.empty() ? 100 : 1);
  return report.finish();
}

}  // namespace
}  // namespace dsline::robust

int main(int argc, char** argv) { return dsline::robust::run(dsline::robust::parse_options(argc, argv, 0)); }
