#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>

#include "dsline/error.hpp"
#include "memory/file_storage.hpp"

#ifndef MFD_NOEXEC_SEAL
#define MFD_NOEXEC_SEAL 0x0008U
#endif

namespace dsline::memory {
namespace {

constexpr int kSizeSeals = F_SEAL_SHRINK | F_SEAL_GROW;

// The size is sealed, so no peer can cut the pages away under a mapping.
class MemfdStorage final : public FileStorage {
 public:
  explicit MemfdStorage(base::Descriptor fd)
      : FileStorage(std::move(fd), StorageKind::Memfd, "an anonymous memfd") {}

  void resize(std::uint64_t bytes) override {
    FileStorage::resize(bytes);
    if (fcntl(descriptor(), F_ADD_SEALS, kSizeSeals | F_SEAL_SEAL) != 0) {
      throw Error(ErrorCode::System, std::string("sealing a memfd failed: ") + strerror(errno), errno);
    }
  }
};

}  // namespace

std::unique_ptr<Storage> make_memfd_storage() {
  unsigned flags = MFD_CLOEXEC | MFD_ALLOW_SEALING;
  base::Descriptor fd = memfd_create("dsline", flags | MFD_NOEXEC_SEAL);
  if (!fd && errno == EINVAL) fd = memfd_create("dsline", flags);
  if (!fd) {
    throw Error(ErrorCode::System,
                std::string("no anonymous memory: memfd_create failed: ") + strerror(errno), errno);
  }
  return std::make_unique<MemfdStorage>(std::move(fd));
}

std::unique_ptr<Storage> adopt_memfd_storage(base::Descriptor fd) {
  int seals = fcntl(fd.get(), F_GET_SEALS);
  if (seals < 0 || (seals & kSizeSeals) != kSizeSeals) {
    throw Error(ErrorCode::ChannelLayout,
                "the descriptor is not the size-sealed memfd of an anonymous channel; pass handles through "
                "multiprocessing, not bare descriptors");
  }
  return std::make_unique<MemfdStorage>(std::move(fd));
}

}  // namespace dsline::memory
