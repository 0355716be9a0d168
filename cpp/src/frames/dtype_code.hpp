#pragma once

#include <cstddef>
#include <cstdint>
#include <optional>
#include <span>

/// The closed binary code of a NumPy dtype. dsline/dtypes.py writes and reads it; the core only checks it and
/// takes the item size from it. docs/design/frame-format.md has the byte table.
///
/// A node is 8 bytes: letter u8, order u8 (0 none, 1 little, 2 big), detail u8, 0, size u32. Behind it:
///   b i u f c S U V   nothing; size = item size
///   M m               nothing; detail = unit (DatetimeUnit), size = multiple; item size 8
///   a  subarray       detail = number of dimensions; that many u32; the base's node
///   r  structure      detail = kAligned | kRecord; size = item size; u32 number of fields, then per field
///                     u32 offset, u32 name bytes, u32 title bytes (kNoTitle: none), name, title, node
namespace dsline::frames {

inline constexpr int kMaxDtypeDepth = 16;               // nodes from the outermost to a leaf
inline constexpr std::uint32_t kMaxDtypeFields = 1024;  // in all of a dtype
inline constexpr std::uint32_t kMaxDtypeItemsize = 0x7FFFFFFF;
inline constexpr std::uint32_t kMaxSubarrayDims = 32;
inline constexpr std::uint32_t kNoTitle = 0xFFFFFFFF;

inline constexpr std::uint8_t kAligned = 1;
inline constexpr std::uint8_t kRecord = 2;

enum class DatetimeUnit : std::uint8_t {
  Generic,
  Year,
  Month,
  Week,
  Day,
  Hour,
  Minute,
  Second,
  Milli,
  Micro,
  Nano,
  Pico,
  Femto,
  Atto
};

/// The item size of the dtype in bytes (0 is one), or nothing if `code` is not exactly one well-formed dtype.
/// Requires: `code` is private memory. Throws std::bad_alloc only.
std::optional<std::uint64_t> validate_dtype_code(std::span<const std::byte> code);

}  // namespace dsline::frames
