#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "dsline/error.hpp"

/// What stands between a frame's header and its payload: entries of {type u16, 0 u16, length u32} and `length`
/// bytes, padded with zeros to 8. docs/design/frame-format.md has the byte table.
///
/// Threads: nothing here is shared; every call works on private memory.
namespace dsline::frames {

inline constexpr std::size_t kMaxMetadataBytes = 65536;
inline constexpr std::size_t kMaxMetadataEntries = 72;  // of any type
inline constexpr std::size_t kMaxUserEntries = 64;      // columns, encoding and tags
inline constexpr std::size_t kMaxTagKeyBytes = 64;
inline constexpr std::size_t kMaxDims = 64;
/// Type of an entry that only takes room, up to where the payload of a loan begins.
inline constexpr int kPaddingEntry = 0x7FFF;

enum class TagKind : int { None = 0, Bool = 1, Int = 2, Float = 3, Str = 4, Bytes = 5 };

struct Tag {
  std::string key;
  int kind = 0;        // TagKind
  std::int64_t i = 0;  // Bool (0 or 1), Int
  double f = 0;        // Float
  std::string s;       // Str (UTF-8), Bytes
};

/// Writes metadata entry by entry. Every call throws Error(InvalidArgument) for a value that a reader would
/// refuse, and Error(MessageTooLarge) where the whole passes kMaxMetadataBytes; the builder is unchanged then.
class MetadataBuilder {
 public:
  /// The code of dsline/dtypes.py; an array has a dtype and a shape.
  void add_dtype(const std::string& code);
  void add_shape(const std::int64_t* shape, std::size_t ndim);
  /// For an array in Fortran order, after dtype and shape: exactly the strides that follow from these.
  void add_strides(const std::int64_t* strides, std::size_t ndim);
  void add_columns(const std::vector<std::string>& names);
  void add_encoding(const std::string& encoding);
  void add_tag_none(const std::string& key);
  void add_tag_bool(const std::string& key, bool value);
  void add_tag_int(const std::string& key, std::int64_t value);
  void add_tag_float(const std::string& key, double value);
  void add_tag_str(const std::string& key, const std::string& value);
  void add_tag_bytes(const std::string& key, const std::string& value);

  const std::string& bytes() const noexcept { return bytes_; }

 private:
  void add(std::uint16_t type, const std::string& value);
  void add_tag(const std::string& key, TagKind kind, const std::string& value);

  std::string bytes_;
  std::uint32_t seen_ = 0;  // bit per type that may occur once
  std::size_t user_entries_ = 0;
  std::uint64_t itemsize_ = 0;
  std::vector<std::int64_t> shape_;
  std::vector<std::string> keys_;
};

struct Metadata {
  std::string dtype_code;  // empty: no array
  bool has_shape = false;  // true exactly where dtype_code is not empty
  std::vector<std::int64_t> shape;
  bool fortran = false;
  std::vector<std::int64_t> strides;  // empty unless fortran
  bool has_columns = false;
  std::vector<std::string> columns;
  bool has_encoding = false;
  std::string encoding;
  std::vector<Tag> tags;  // no key twice
  std::uint64_t itemsize = 0;
};

/// Reads and checks all of it, or returns false and says in `why` what is wrong with which entry. Entries of an
/// unknown type are skipped. After true, shape times itemsize fits into a signed 64-bit number, and strings
/// other than dtype_code and Bytes tags are UTF-8. Requires: `data` is a private copy. Throws std::bad_alloc only.
bool parse_metadata(const void* data, std::size_t size, Metadata& out, std::string& why);

/// Bytes of the array's elements; false where `metadata` describes no array.
bool array_bytes(const Metadata& metadata, std::uint64_t& bytes) noexcept;

/// FNV-1a, 64 bits, of the entries that describe an array; never 0, except of nothing: 0 means no schema. About
/// 1 ns per byte: for once per layout, not once per message.
std::uint64_t schema_hash(const void* data, std::size_t size) noexcept;

}  // namespace dsline::frames
