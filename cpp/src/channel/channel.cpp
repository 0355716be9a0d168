#include "dsline/channel.hpp"

#include <array>
#include <cstring>

#include "base/crc32c.hpp"
#include "channel/attach.hpp"
#include "channel/directory.hpp"
#include "channel/impl.hpp"
#include "dsline/build.hpp"
#include "dsline/crc32c.hpp"

namespace dsline {

using memory::StorageKind;

Channel::Channel(std::unique_ptr<Impl> impl) : impl_(std::move(impl)) {}
Channel::~Channel() = default;

std::shared_ptr<Channel> Channel::make(std::unique_ptr<Impl> impl) {
  return std::shared_ptr<Channel>(new Channel(std::move(impl)));
}

std::shared_ptr<Channel> Channel::open_named(const std::string& name, const ChannelOptions& options,
                                             OpenMode mode) {
  channel::check_name(name);
  std::string path = channel::prepare_directory(options.mode) + "/" + name;
  auto attachment = channel::attach_path(path, name, StorageKind::PosixShm, options, mode);
  return make(std::make_unique<Impl>(std::move(attachment)));
}

std::shared_ptr<Channel> Channel::open_file(const std::string& path, const ChannelOptions& options,
                                            OpenMode mode) {
  auto attachment = channel::attach_path(path, path, StorageKind::File, options, mode);
  return make(std::make_unique<Impl>(std::move(attachment)));
}

std::shared_ptr<Channel> Channel::create_anonymous(const ChannelOptions& options) {
  auto attachment = channel::create_unnamed(memory::make_memfd_storage(), options);
  return make(std::make_unique<Impl>(std::move(attachment)));
}

std::shared_ptr<Channel> Channel::adopt_anonymous(int fd) {
  auto attachment = channel::attach_storage(memory::adopt_memfd_storage(fd));
  return make(std::make_unique<Impl>(std::move(attachment)));
}

std::shared_ptr<Channel> Channel::create_heap(const ChannelOptions& options) {
  auto attachment = channel::create_unnamed(memory::make_heap_storage(), options);
  return make(std::make_unique<Impl>(std::move(attachment)));
}

std::shared_ptr<Channel> Channel::subscribe(const SubscribeOptions& options) {
  if (options.group.empty() || options.group.size() > memory::kMaxGroupName ||
      options.group.find('\0') != std::string::npos) {
    throw Error(ErrorCode::InvalidArgument,
                "the name of a group has " + std::to_string(options.group.size()) +
                    " bytes, must have 1 to " + std::to_string(memory::kMaxGroupName) +
                    ", none of them zero");
  }
  impl_->require_open();
  return make(
      std::make_unique<Impl>(channel::attach_again(*impl_->region, impl_->path, impl_->label, &options)));
}

std::shared_ptr<Channel> Channel::again() {
  impl_->require_open();
  return make(
      std::make_unique<Impl>(channel::attach_again(*impl_->region, impl_->path, impl_->label, nullptr)));
}

void Channel::shutdown(bool at_once) { impl_->shutdown(at_once); }
bool Channel::is_shut_down() const noexcept { return impl_->is_shut_down(); }
void Channel::refuse_calls() noexcept { impl_->closed.store(true, std::memory_order_seq_cst); }
void Channel::close() noexcept { impl_->close(); }
bool Channel::is_closed() const noexcept { return impl_->closed.load(std::memory_order_relaxed); }
void Channel::abandon() noexcept { impl_->abandon(); }
void Channel::abandon_all() noexcept { Impl::abandon_all(); }
void Channel::unlink() { impl_->unlink(); }
void Channel::remove_group(const std::string& name) { impl_->remove_group(name); }

bool Channel::check_peers() noexcept {
  if (impl_->is_inherited() || impl_->closed.load(std::memory_order_relaxed)) return false;
  return impl_->sweep(true);
}
std::uint64_t Channel::deaths() const noexcept {
  return impl_->region->header().deaths.load(std::memory_order_acquire);
}
std::vector<Death> Channel::deaths_since(std::uint64_t first) const { return impl_->deaths_since(first); }

std::uint64_t Channel::depth() const noexcept { return impl_->may_receive() ? impl_->group.depth() : 0; }
bool Channel::is_full() const noexcept { return !impl_->pool.anything_free_by_scan(); }
ChannelStats Channel::stats() const noexcept { return impl_->stats(); }
std::uint32_t Channel::capacity() const noexcept { return impl_->region->geometry().slots; }
std::uint64_t Channel::slot_size() const noexcept { return impl_->region->geometry().slot_bytes; }
std::uint64_t Channel::max_message_size() const noexcept {
  return impl_->region->geometry().max_message_bytes;
}
std::uint32_t Channel::max_handles() const noexcept { return impl_->region->geometry().participants; }
int Channel::checksum() const noexcept { return static_cast<int>(impl_->region->checksum()); }
std::uint32_t Channel::history() const noexcept { return impl_->region->rules().history; }
std::uint32_t Channel::max_deliveries() const noexcept { return impl_->region->rules().max_deliveries; }
bool Channel::has_default_group() const noexcept { return impl_->region->rules().default_group != 0; }
bool Channel::is_synced() const noexcept { return impl_->region->rules().sync != 0; }
const std::string& Channel::schema() const noexcept { return impl_->region->schema(); }
bool Channel::can_receive() const noexcept { return impl_->group_number != Impl::kNoGroup; }
std::string Channel::group() const {
  if (impl_->group_number == 0 || impl_->group_number == Impl::kNoGroup) return "";
  return liveness::Membership(*impl_->region, impl_->pool).name(impl_->group_number);
}
std::string Channel::storage() const { return memory::storage_name(impl_->region->storage().kind()); }
std::string Channel::label() const { return impl_->label; }
std::string Channel::path() const { return impl_->path; }
int Channel::descriptor() const noexcept { return impl_->region->storage().descriptor(); }

const char* crc32c_backend() noexcept { return base::crc32c_backend(); }

std::uint32_t crc32c(const void* data, std::size_t size, std::uint32_t crc) noexcept {
  return base::crc32c(data, size, crc);
}

std::string Channel::uuid() const {
  std::array<unsigned char, 16> id{};
  std::memcpy(id.data(), impl_->region->header().uuid, id.size());
  return base::to_hex(id);
}

}  // namespace dsline
