#pragma once

#include <cstddef>
#include <string_view>

namespace dsline::frames {

/// True for well-formed UTF-8 (Unicode, table 3-7): no overlong forms, no surrogates, nothing above U+10FFFF.
constexpr bool is_utf8(std::string_view text) noexcept {
  auto byte = [&](std::size_t i) { return static_cast<unsigned char>(text[i]); };
  for (std::size_t i = 0; i < text.size();) {
    const unsigned first = byte(i);
    if (first < 0x80) {
      ++i;
      continue;
    }
    std::size_t tail = 0;
    unsigned least = 0x80;  // of the second byte
    unsigned most = 0xBF;
    if (first >= 0xC2 && first <= 0xDF) {
      tail = 1;
    } else if (first >= 0xE0 && first <= 0xEF) {
      tail = 2;
      if (first == 0xE0) least = 0xA0;
      if (first == 0xED) most = 0x9F;
    } else if (first >= 0xF0 && first <= 0xF4) {
      tail = 3;
      if (first == 0xF0) least = 0x90;
      if (first == 0xF4) most = 0x8F;
    } else {
      return false;
    }
    if (text.size() - i <= tail) return false;
    if (byte(i + 1) < least || byte(i + 1) > most) return false;
    for (std::size_t k = 2; k <= tail; ++k) {
      if ((byte(i + k) & 0xC0) != 0x80) return false;
    }
    i += tail + 1;
  }
  return true;
}

}  // namespace dsline::frames
