#pragma once

#include <cstddef>
#include <cstdint>

#include "dsline/expression.hpp"

/// The loops of one instruction set. loops.cpp is compiled once for each, in a namespace of its own.
namespace dsline::expressions {

using Loop = void (*)(void* out, const void* a, const void* b, const void* c, std::size_t n);

struct Loops {
  const char* name;
  /// Elements of type `from` to elements of type `to`; null where there is no such operation.
  Loop (*find)(ExpressionOp op, ElementType from, ElementType to) noexcept;
  /// Numbers of the elements that are not 0, in order; how many. `out` has room for n + 16.
  std::size_t (*select)(const std::uint8_t* mask, std::size_t n, std::uint32_t* out) noexcept;
};

namespace baseline {
extern const Loops loops;
}
#if defined(DSLINE_HAS_AVX)
namespace avx2 {
extern const Loops loops;
}
namespace avx512 {
extern const Loops loops;
}
#endif

/// The best set that this processor has.
const Loops& chosen_loops() noexcept;

}  // namespace dsline::expressions
