#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "frames/dtype_code.hpp"

/// Writes dtype codes field by field, so that tests can also write wrong ones.
namespace dsline::frames::testing {

template <class T>
std::string raw(T value) {
  return std::string(reinterpret_cast<const char*>(&value), sizeof value);
}

inline std::string node(char letter, int order, std::uint32_t size, int detail = 0, int zero = 0) {
  std::string code;
  code += letter;
  code += static_cast<char>(order);
  code += static_cast<char>(detail);
  code += static_cast<char>(zero);
  return code + raw(size);
}

inline std::string subarray(const std::vector<std::uint32_t>& dims, const std::string& base) {
  std::string code = node('a', 0, 0, static_cast<int>(dims.size()));
  for (std::uint32_t dim : dims) code += raw(dim);
  return code + base;
}

struct Field {
  std::uint32_t offset;
  std::string name;
  std::string code;
  std::string title{};
  bool has_title = false;
};

inline std::string structure(std::uint32_t itemsize, const std::vector<Field>& fields, int detail = 0) {
  std::string code = node('r', 0, itemsize, detail) + raw(static_cast<std::uint32_t>(fields.size()));
  for (const Field& f : fields) {
    code += raw(f.offset) + raw(static_cast<std::uint32_t>(f.name.size()));
    code += raw(f.has_title ? static_cast<std::uint32_t>(f.title.size()) : kNoTitle);
    code += f.name;
    if (f.has_title) code += f.title;
    code += f.code;
  }
  return code;
}

}  // namespace dsline::frames::testing
