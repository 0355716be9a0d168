#include "dsline/metadata.hpp"

#include <algorithm>
#include <cstring>
#include <limits>
#include <optional>
#include <span>
#include <string_view>

#include "base/checked.hpp"
#include "frames/dtype_code.hpp"
#include "frames/frame_header.hpp"
#include "frames/utf8.hpp"

namespace dsline::frames {
namespace {

static_assert(kMaxMetadataBytes == kMaxMetaBytes);

enum EntryType : std::uint16_t {
  kDtype = 1,
  kShape = 2,
  kStrides = 3,
  kColumns = 4,
  kEncoding = 5,
  kTag = 6
};

struct EntryHeader {
  std::uint16_t type;
  std::uint16_t zero;
  std::uint32_t length;
};
static_assert(sizeof(EntryHeader) == 8);

constexpr std::size_t kEntryAlignment = 8;

struct TagHeader {
  std::uint8_t key_bytes;
  std::uint8_t kind;
};
static_assert(sizeof(TagHeader) == 2);

constexpr std::uint32_t bit_of(std::uint16_t type) noexcept { return 1u << type; }

template <class T>
void append(std::string& to, const T& value) {
  to.append(reinterpret_cast<const char*>(&value), sizeof value);
}

template <class T>
T load(std::string_view from, std::size_t offset = 0) noexcept {
  T value;
  std::memcpy(&value, from.data() + offset, sizeof value);
  return value;
}

std::optional<std::uint64_t> itemsize_of(std::string_view code) {
  return validate_dtype_code(std::as_bytes(std::span(code.data(), code.size())));
}

/// Bytes of an array; false where NumPy could not hold it either: like NumPy, dimensions of 0 do not excuse the
/// others, so that no product of some of the dimensions overflows later.
bool checked_bytes(const std::vector<std::int64_t>& shape, std::uint64_t itemsize,
                   std::uint64_t& bytes) noexcept {
  std::uint64_t nonzero = std::max<std::uint64_t>(itemsize, 1);
  bool empty = itemsize == 0;
  for (std::int64_t dim : shape) {
    if (dim < 0) return false;
    if (dim == 0) {
      empty = true;
    } else if (!base::checked_mul(nonzero, static_cast<std::uint64_t>(dim), nonzero)) {
      return false;
    }
  }
  bytes = empty ? 0 : nonzero;
  return nonzero <= static_cast<std::uint64_t>(std::numeric_limits<std::int64_t>::max());
}

/// Requires: checked_bytes() of the same.
bool is_fortran(const std::vector<std::int64_t>& strides, const std::vector<std::int64_t>& shape,
                std::uint64_t itemsize) noexcept {
  if (strides.size() != shape.size()) return false;
  std::int64_t step = static_cast<std::int64_t>(itemsize);
  for (std::size_t i = 0; i < shape.size(); ++i) {
    if (strides[i] != step) return false;
    step *= shape[i];
  }
  return true;
}

/// Null, or what is wrong with the key of a tag.
const char* key_fault(std::string_view key) noexcept {
  if (key.empty() || key.size() > kMaxTagKeyBytes) return "must have 1 to 64 bytes of UTF-8";
  if (key == "columns" || key == "encoding") return "has an entry type of its own";
  if (!is_utf8(key)) return "is not UTF-8";
  return nullptr;
}

[[noreturn]] void invalid(const std::string& message) { throw Error(ErrorCode::InvalidArgument, message); }

// --- reading ---

class Parser {
 public:
  Parser(std::string_view rest, Metadata& out, std::string& why) : rest_(rest), out_(out), why_(why) {}

  bool parse() {
    if (rest_.size() > kMaxMetadataBytes) return fail("has more than 65536 bytes");
    for (std::size_t entries = 0; !rest_.empty(); ++entries) {
      if (entries == kMaxMetadataEntries) return fail("has more than 72 entries");
      if (!entry()) return false;
    }
    return layout();
  }

 private:
  bool fail(const char* what) {
    why_ = "the metadata ";
    why_ += what;
    return false;
  }

  bool entry() {
    if (rest_.size() < sizeof(EntryHeader)) return fail("ends inside the head of an entry");
    const auto header = load<EntryHeader>(rest_);
    rest_.remove_prefix(sizeof header);
    if (header.zero != 0) return fail("has an entry whose reserved bytes are not zero");
    if (header.length > rest_.size()) return fail("has an entry that is longer than what is left");
    const std::size_t padded = base::round_up(header.length, kEntryAlignment);
    if (padded > rest_.size()) return fail("ends inside the padding of an entry");
    const std::string_view value = rest_.substr(0, header.length);
    const std::string_view padding = rest_.substr(header.length, padded - header.length);
    if (padding.find_first_not_of('\0') != padding.npos) return fail("has padding that is not zero");
    rest_.remove_prefix(padded);

    if (header.type >= kDtype && header.type <= kEncoding) {
      if ((seen_ & bit_of(header.type)) != 0) return fail("has an entry twice that may occur once");
      seen_ |= bit_of(header.type);
    }
    if (header.type >= kColumns && header.type <= kTag && ++user_entries_ > kMaxUserEntries) {
      return fail("has more than 64 columns, encoding and tag entries");
    }
    switch (header.type) {
      case kDtype:
        return dtype(value);
      case kShape:
        return integers(value, out_.shape, "has a shape that is not 0 to 64 integers");
      case kStrides:
        return integers(value, out_.strides, "has strides that are not 0 to 64 integers");
      case kColumns:
        return columns(value);
      case kEncoding:
        out_.has_encoding = true;
        out_.encoding = value;
        return is_utf8(value) || fail("has an encoding that is not UTF-8");
      case kTag:
        return tag(value);
      default:
        return true;
    }
  }

  bool dtype(std::string_view code) {
    std::optional<std::uint64_t> itemsize = itemsize_of(code);
    if (!itemsize) return fail("has a dtype that is malformed");
    out_.itemsize = *itemsize;
    out_.dtype_code = code;
    return true;
  }

  bool integers(std::string_view value, std::vector<std::int64_t>& to, const char* fault) {
    if (value.size() % 8 != 0 || value.size() / 8 > kMaxDims) return fail(fault);
    for (std::size_t at = 0; at < value.size(); at += 8) to.push_back(load<std::int64_t>(value, at));
    return true;
  }

  bool columns(std::string_view value) {
    if (value.size() < 4) return fail("has columns without a count");
    const auto count = load<std::uint32_t>(value);
    value.remove_prefix(4);
    // Each name takes four bytes at least, so a forged count cannot reserve more than the entry is long.
    if (count > value.size() / 4) return fail("has more columns than their entry can hold");
    out_.has_columns = true;
    out_.columns.reserve(count);
    for (std::uint32_t i = 0; i < count; ++i) {
      if (value.size() < 4) return fail("has columns that end early");
      const auto bytes = load<std::uint32_t>(value);
      value.remove_prefix(4);
      if (bytes > value.size()) return fail("has a column name that is longer than its entry");
      if (!is_utf8(value.substr(0, bytes))) return fail("has a column name that is not UTF-8");
      out_.columns.emplace_back(value.substr(0, bytes));
      value.remove_prefix(bytes);
    }
    return value.empty() || fail("has bytes behind its last column name");
  }

  bool tag(std::string_view value) {
    if (value.size() < sizeof(TagHeader)) return fail("has a tag without a head");
    const auto header = load<TagHeader>(value);
    value.remove_prefix(sizeof header);
    if (header.key_bytes > value.size()) return fail("has a tag whose key is longer than its entry");
    const std::string_view key = value.substr(0, header.key_bytes);
    value.remove_prefix(header.key_bytes);
    if (const char* fault = key_fault(key))
      return fail((std::string("has a tag whose key ") + fault).c_str());
    for (const Tag& other : out_.tags) {
      if (other.key == key) return fail("has two tags with one key");
    }
    Tag& tag = out_.tags.emplace_back();
    tag.key = key;
    tag.kind = header.kind;
    switch (static_cast<TagKind>(header.kind)) {
      case TagKind::None:
        return value.empty() || fail("has a None tag with a value");
      case TagKind::Bool:
        if (value.size() != 1 || (value[0] != 0 && value[0] != 1))
          return fail("has a bool tag that is not 0 or 1");
        tag.i = value[0];
        return true;
      case TagKind::Int:
        if (value.size() != 8) return fail("has an int tag that has not 8 bytes");
        tag.i = load<std::int64_t>(value);
        return true;
      case TagKind::Float:
        if (value.size() != 8) return fail("has a float tag that has not 8 bytes");
        tag.f = load<double>(value);
        return true;
      case TagKind::Str:
        tag.s = value;
        return is_utf8(value) || fail("has a str tag that is not UTF-8");
      case TagKind::Bytes:
        tag.s = value;
        return true;
    }
    return fail("has a tag of an unknown kind");
  }

  bool layout() {
    const bool has_dtype = (seen_ & bit_of(kDtype)) != 0;
    out_.has_shape = (seen_ & bit_of(kShape)) != 0;
    out_.fortran = (seen_ & bit_of(kStrides)) != 0;
    if (has_dtype != out_.has_shape) return fail("has a dtype without a shape, or a shape without a dtype");
    if (out_.fortran && !has_dtype) return fail("has strides without a dtype and a shape");
    std::uint64_t bytes = 0;
    if (!checked_bytes(out_.shape, out_.itemsize, bytes)) return fail("has a shape that no array can have");
    if (out_.fortran && !is_fortran(out_.strides, out_.shape, out_.itemsize)) {
      return fail("has strides that are not those of Fortran order");
    }
    return true;
  }

  std::string_view rest_;
  Metadata& out_;
  std::string& why_;
  std::uint32_t seen_ = 0;
  std::size_t user_entries_ = 0;
};

}  // namespace

// --- writing ---

void MetadataBuilder::add(std::uint16_t type, const std::string& value) {
  if ((seen_ & bit_of(type)) != 0)
    invalid("metadata entry " + std::to_string(type) + " can be added once only");
  const bool is_user = type >= kColumns;
  if (is_user && user_entries_ == kMaxUserEntries) {
    invalid("meta has more than 64 entries, must have at most 64; put the rest into the payload");
  }
  const std::size_t total =
      bytes_.size() + sizeof(EntryHeader) + base::round_up(value.size(), kEntryAlignment);
  if (total > kMaxMetadataBytes) {
    throw Error(ErrorCode::MessageTooLarge,
                "metadata needs " + std::to_string(total) +
                    " bytes, a message takes at most 65536; put the rest into the payload");
  }
  bytes_.reserve(total);
  append(bytes_, EntryHeader{type, 0, static_cast<std::uint32_t>(value.size())});
  bytes_ += value;
  bytes_.resize(total, '\0');
  if (type != kTag) seen_ |= bit_of(type);
  if (is_user) ++user_entries_;
}

void MetadataBuilder::add_dtype(const std::string& code) {
  std::optional<std::uint64_t> itemsize = itemsize_of(code);
  if (!itemsize) {
    invalid(
        "the dtype's code is malformed or past a limit: at most 16 levels and 1024 fields, items below 2 "
        "GiB");
  }
  add(kDtype, code);
  itemsize_ = *itemsize;
}

void MetadataBuilder::add_shape(const std::int64_t* shape, std::size_t ndim) {
  if (ndim > kMaxDims) {
    invalid("the array has " + std::to_string(ndim) + " dimensions, must have at most 64; reshape it");
  }
  std::vector<std::int64_t> dims(shape, shape + ndim);
  if ((seen_ & bit_of(kDtype)) == 0) invalid("a shape is added after its dtype");
  std::uint64_t bytes = 0;
  if (!checked_bytes(dims, itemsize_, bytes))
    invalid("the array's shape has a negative dimension or is too big");
  add(kShape, std::string(reinterpret_cast<const char*>(dims.data()), dims.size() * 8));
  shape_ = std::move(dims);
}

void MetadataBuilder::add_strides(const std::int64_t* strides, std::size_t ndim) {
  if ((seen_ & bit_of(kShape)) == 0) invalid("strides are added after dtype and shape");
  if (ndim != shape_.size()) {
    invalid("there are " + std::to_string(ndim) +
            " strides, must be one per dimension: " + std::to_string(shape_.size()));
  }
  std::vector<std::int64_t> steps(strides, strides + ndim);
  if (!is_fortran(steps, shape_, itemsize_))
    invalid("the strides are not those of an array in Fortran order");
  add(kStrides, std::string(reinterpret_cast<const char*>(steps.data()), steps.size() * 8));
}

void MetadataBuilder::add_columns(const std::vector<std::string>& names) {
  std::string value;
  append(value, static_cast<std::uint32_t>(std::min<std::size_t>(names.size(), 0xFFFFFFFF)));
  for (const std::string& name : names) {
    if (!is_utf8(name)) invalid("meta['columns'] has a name that is not UTF-8");
    append(value, static_cast<std::uint32_t>(std::min<std::size_t>(name.size(), 0xFFFFFFFF)));
    value += name;
  }
  add(kColumns, value);
}

void MetadataBuilder::add_encoding(const std::string& encoding) {
  if (!is_utf8(encoding)) invalid("meta['encoding'] is not UTF-8");
  add(kEncoding, encoding);
}

void MetadataBuilder::add_tag(const std::string& key, TagKind kind, const std::string& value) {
  if (const char* fault = key_fault(key)) invalid("the meta key '" + key + "' " + fault);
  if (std::find(keys_.begin(), keys_.end(), key) != keys_.end())
    invalid("the meta key '" + key + "' is there twice");
  std::string entry;
  append(entry, TagHeader{static_cast<std::uint8_t>(key.size()), static_cast<std::uint8_t>(kind)});
  entry += key;
  entry += value;
  keys_.reserve(keys_.size() + 1);
  std::string kept = key;
  add(kTag, entry);
  keys_.push_back(std::move(kept));
}

void MetadataBuilder::add_tag_none(const std::string& key) { add_tag(key, TagKind::None, {}); }

void MetadataBuilder::add_tag_bool(const std::string& key, bool value) {
  add_tag(key, TagKind::Bool, std::string(1, value ? '\1' : '\0'));
}

void MetadataBuilder::add_tag_int(const std::string& key, std::int64_t value) {
  std::string bytes;
  append(bytes, value);
  add_tag(key, TagKind::Int, bytes);
}

void MetadataBuilder::add_tag_float(const std::string& key, double value) {
  std::string bytes;
  append(bytes, value);
  add_tag(key, TagKind::Float, bytes);
}

void MetadataBuilder::add_tag_str(const std::string& key, const std::string& value) {
  if (!is_utf8(value)) invalid("meta['" + key + "'] is not UTF-8; send bytes");
  add_tag(key, TagKind::Str, value);
}

void MetadataBuilder::add_tag_bytes(const std::string& key, const std::string& value) {
  add_tag(key, TagKind::Bytes, value);
}

bool parse_metadata(const void* data, std::size_t size, Metadata& out, std::string& why) {
  out = Metadata{};
  why.clear();
  const std::string_view bytes =
      size == 0 ? std::string_view() : std::string_view(static_cast<const char*>(data), size);
  return Parser(bytes, out, why).parse();
}

bool array_bytes(const Metadata& metadata, std::uint64_t& bytes) noexcept {
  return metadata.has_shape && checked_bytes(metadata.shape, metadata.itemsize, bytes);
}

std::uint64_t schema_hash(const void* data, std::size_t size) noexcept {
  if (size == 0) return 0;
  std::uint64_t hash = 0xCBF29CE484222325;
  const auto* at = static_cast<const unsigned char*>(data);
  for (std::size_t i = 0; i < size; ++i) hash = (hash ^ at[i]) * 0x100000001B3;
  return hash == 0 ? 1 : hash;
}

}  // namespace dsline::frames
