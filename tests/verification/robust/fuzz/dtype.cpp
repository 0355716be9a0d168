/// The code of a dtype.

#include "frames/dtype_code.hpp"

#include <cstring>
#include <memory>

#include "fuzz/target.hpp"

using namespace dsline;
using robust::require;

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  const std::unique_ptr<std::byte[]> copy(new std::byte[size == 0 ? 1 : size]);
  if (size != 0) std::memcpy(copy.get(), data, size);
  const auto itemsize = frames::validate_dtype_code({copy.get(), size});
  if (!itemsize) return 0;
  require(*itemsize <= frames::kMaxDtypeItemsize, "item sizes are within their limit");
  require(size >= 8, "a code is at least one node");
  // One byte more or less is not the same dtype.
  require(!frames::validate_dtype_code({copy.get(), size - 1}), "a shortened code is refused");
  return 0;
}

std::vector<std::string> robust::fuzz_seeds() {
  auto u32 = [](std::uint32_t value) { return std::string(reinterpret_cast<const char*>(&value), 4); };
  auto node = [&](char letter, char order, char detail, std::uint32_t size) {
    return std::string{letter, order, detail, 0} + u32(size);
  };
  std::vector<std::string> seeds = {
      node('b', 0, 0, 1), node('i', 1, 0, 8), node('f', 1, 0, 4), node('c', 2, 0, 16),
      node('S', 0, 0, 7), node('U', 1, 0, 8), node('V', 0, 0, 3), node('M', 1, 10, 1),
  };
  const std::string sub = node('a', 0, 2, 0);
  seeds.push_back(sub + u32(2) + u32(3) + node('f', 1, 0, 4));
  auto field = [&](std::uint32_t offset, const std::string& name, const std::string& code) {
    return u32(offset) + u32(static_cast<std::uint32_t>(name.size())) + u32(frames::kNoTitle) + name + code;
  };
  const std::string record =
      node('r', 0, 0, 12) + u32(2) + field(0, "x", node('f', 1, 0, 4)) + field(4, "y", node('i', 1, 0, 8));
  seeds.push_back(record);
  seeds.push_back(node('r', 0, 1, 12) + u32(1) + field(0, "inner", record));
  return seeds;
}
