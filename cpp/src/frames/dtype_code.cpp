#include "frames/dtype_code.hpp"

#include <algorithm>
#include <cstring>
#include <string_view>
#include <vector>

#include "frames/utf8.hpp"

namespace dsline::frames {
namespace {

struct Node {
  char letter;
  std::uint8_t order;
  std::uint8_t detail;
  std::uint8_t zero;
  std::uint32_t size;
};
static_assert(sizeof(Node) == 8);

/// Reads from the front; every read says whether it fitted.
class Reader {
 public:
  explicit Reader(std::span<const std::byte> rest) : rest_(rest) {}

  template <class T>
  bool take(T& value) noexcept {
    if (rest_.size() < sizeof value) return false;
    std::memcpy(&value, rest_.data(), sizeof value);
    rest_ = rest_.subspan(sizeof value);
    return true;
  }

  bool take_text(std::uint32_t bytes, std::string_view& text) noexcept {
    if (rest_.size() < bytes) return false;
    text = {reinterpret_cast<const char*>(rest_.data()), bytes};
    rest_ = rest_.subspan(bytes);
    return is_utf8(text);
  }

  bool done() const noexcept { return rest_.empty(); }

 private:
  std::span<const std::byte> rest_;
};

constexpr bool is_one_of(std::uint32_t size, std::initializer_list<std::uint32_t> sizes) noexcept {
  return std::find(sizes.begin(), sizes.end(), size) != sizes.end();
}

class Validator {
 public:
  explicit Validator(Reader& reader) : reader_(reader) {}

  bool node(int depth, std::uint64_t& itemsize) {
    Node node{};
    if (depth > kMaxDtypeDepth || !reader_.take(node) || node.zero != 0 || node.size > kMaxDtypeItemsize)
      return false;
    itemsize = node.size;
    switch (node.letter) {
      case 'a':
        return node.order == 0 && node.size == 0 && subarray(node, depth, itemsize);
      case 'r':
        return node.order == 0 && structure(node, depth);
      case 'M':
      case 'm':
        itemsize = 8;
        return has_order(node) && node.detail <= static_cast<std::uint8_t>(DatetimeUnit::Atto) &&
               node.size >= 1 &&
               (node.size == 1 || node.detail != static_cast<std::uint8_t>(DatetimeUnit::Generic));
      default:
        return node.detail == 0 && scalar(node);
    }
  }

 private:
  static bool has_order(const Node& node) noexcept { return node.order == 1 || node.order == 2; }

  static bool scalar(const Node& node) noexcept {
    switch (node.letter) {
      case 'b':
        return node.order == 0 && node.size == 1;
      case 'i':
      case 'u':
        return node.size == 1 ? node.order == 0 : has_order(node) && is_one_of(node.size, {2, 4, 8});
      case 'f':
        return has_order(node) && is_one_of(node.size, {2, 4, 8, 16});
      case 'c':
        return has_order(node) && is_one_of(node.size, {8, 16, 32});
      case 'U':
        return has_order(node) && node.size % 4 == 0;
      case 'S':
      case 'V':
        return node.order == 0;
      default:
        return false;
    }
  }

  bool subarray(const Node& node, int depth, std::uint64_t& itemsize) {
    if (node.detail < 1 || node.detail > kMaxSubarrayDims) return false;
    // Dimensions may be zero, so the others are bounded by themselves: NumPy counts them in a C int.
    std::uint64_t items = 1;
    std::uint64_t nonzero = 1;
    for (std::uint32_t i = 0; i < node.detail; ++i) {
      std::uint32_t dim = 0;
      if (!reader_.take(dim) || dim > kMaxDtypeItemsize) return false;
      items *= dim;
      nonzero *= std::max(dim, 1u);
      if (nonzero > kMaxDtypeItemsize) return false;
    }
    std::uint64_t base = 0;
    if (!this->node(depth + 1, base)) return false;
    if (nonzero * std::max<std::uint64_t>(base, 1) > kMaxDtypeItemsize) return false;
    itemsize = items * base;
    return true;
  }

  bool structure(const Node& node, int depth) {
    std::uint32_t count = 0;
    if ((node.detail & ~(kAligned | kRecord)) != 0 || !reader_.take(count)) return false;
    if (count > kMaxDtypeFields - fields_) return false;
    fields_ += count;
    std::vector<std::string_view> names;
    names.reserve(count);
    for (std::uint32_t i = 0; i < count; ++i) {
      std::uint32_t offset = 0;
      std::uint32_t name_bytes = 0;
      std::uint32_t title_bytes = 0;
      if (!reader_.take(offset) || !reader_.take(name_bytes) || !reader_.take(title_bytes)) return false;
      std::string_view text;
      if (!reader_.take_text(name_bytes, text)) return false;
      names.push_back(text);
      if (title_bytes != kNoTitle) {
        if (!reader_.take_text(title_bytes, text)) return false;
        names.push_back(text);
      }
      std::uint64_t field = 0;
      if (!this->node(depth + 1, field) || offset + field > node.size) return false;
    }
    std::sort(names.begin(), names.end());
    return std::adjacent_find(names.begin(), names.end()) == names.end();
  }

  Reader& reader_;
  std::uint32_t fields_ = 0;
};

}  // namespace

std::optional<std::uint64_t> validate_dtype_code(std::span<const std::byte> code) {
  Reader reader(code);
  std::uint64_t itemsize = 0;
  if (!Validator(reader).node(1, itemsize) || !reader.done()) return std::nullopt;
  return itemsize;
}

}  // namespace dsline::frames
