/// The metadata of a message.

#include "dsline/metadata.hpp"

#include <cstring>
#include <memory>
#include <set>

#include "fuzz/target.hpp"

using namespace dsline;
using robust::require;

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  const std::unique_ptr<std::uint8_t[]> copy(new std::uint8_t[size == 0 ? 1 : size]);  // exactly its bytes
  if (size != 0) std::memcpy(copy.get(), data, size);
  frames::Metadata metadata;
  std::string why;
  if (!frames::parse_metadata(copy.get(), size, metadata, why)) {
    require(!why.empty(), "a refusal says why");
    return 0;
  }
  require(size <= frames::kMaxMetadataBytes, "metadata is within its limit");
  require(metadata.has_shape == !metadata.dtype_code.empty(), "a dtype has a shape");
  require(metadata.shape.size() <= frames::kMaxDims, "dimensions are within their limit");
  std::uint64_t bytes = 0;
  require(frames::array_bytes(metadata, bytes) == metadata.has_shape, "an array has a size");
  std::uint64_t product = metadata.itemsize;
  bool is_empty = product == 0;
  for (std::int64_t extent : metadata.shape) {
    require(extent >= 0, "extents are not negative");
    is_empty = is_empty || extent == 0;
    if (!is_empty) {
      require(!__builtin_mul_overflow(product, static_cast<std::uint64_t>(extent), &product) &&
                  product <= static_cast<std::uint64_t>(INT64_MAX),
              "the size of an array fits");
    }
  }
  if (metadata.has_shape && !is_empty) require(bytes == product, "the size is shape times itemsize");
  require(metadata.strides.empty() || metadata.strides.size() == metadata.shape.size(),
          "strides match the shape");
  require(metadata.tags.size() <= frames::kMaxUserEntries, "tags are within their limit");
  std::set<std::string> keys;
  for (const frames::Tag& tag : metadata.tags) {
    require(tag.key.size() <= frames::kMaxTagKeyBytes, "keys are within their limit");
    require(keys.insert(tag.key).second, "no key comes twice");
  }
  require((frames::schema_hash(copy.get(), size) == 0) == (size == 0), "only nothing has no hash");
  return 0;
}

std::vector<std::string> robust::fuzz_seeds() {
  std::vector<std::string> seeds;
  const std::string f4{'f', 1, 0, 0, 4, 0, 0, 0};
  const std::int64_t shape[3] = {2, 3, 4};
  frames::MetadataBuilder tags;
  tags.add_tag_none("none");
  tags.add_tag_bool("bool", true);
  tags.add_tag_int("int", -5);
  tags.add_tag_float("float", 2.5);
  tags.add_tag_str("str", "text");
  tags.add_tag_bytes("bytes", std::string("\0\1", 2));
  seeds.push_back(tags.bytes());
  frames::MetadataBuilder array;
  array.add_dtype(f4);
  array.add_shape(shape, 3);
  seeds.push_back(array.bytes());
  const std::int64_t strides[3] = {4, 8, 24};
  array.add_strides(strides, 3);
  array.add_encoding("jpeg");
  seeds.push_back(array.bytes());
  frames::MetadataBuilder columns;
  columns.add_dtype(f4);
  columns.add_shape(shape, 2);
  columns.add_columns({"a", "b", "c"});
  seeds.push_back(columns.bytes());
  seeds.push_back("");
  return seeds;
}
