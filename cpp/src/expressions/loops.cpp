#include "expressions/loops.hpp"

#include <type_traits>
#if defined(__AVX512F__)
#include <immintrin.h>
#endif

// Only what is in this file may be called here: an inline function of a header would be compiled for this instruction
// set, and the linker may keep that copy of it for all.
#define DSLINE_NAME_OF(x) #x
#define DSLINE_NAME(x) DSLINE_NAME_OF(x)

namespace dsline::expressions::DSLINE_LOOPS {
namespace {

template <class T>
using Bits =
    std::conditional_t<sizeof(T) == 1, std::uint32_t,
                       std::conditional_t<sizeof(T) == 2, std::uint32_t,
                                          std::conditional_t<sizeof(T) == 4, std::uint32_t, std::uint64_t>>>;

// Integers wrap around, whatever their type promotes to.
struct Add {
  template <class T>
  static T of(T a, T b) {
    if constexpr (std::is_integral_v<T>)
      return static_cast<T>(static_cast<Bits<T>>(a) + static_cast<Bits<T>>(b));
    else
      return a + b;
  }
};
struct Subtract {
  template <class T>
  static T of(T a, T b) {
    if constexpr (std::is_integral_v<T>)
      return static_cast<T>(static_cast<Bits<T>>(a) - static_cast<Bits<T>>(b));
    else
      return a - b;
  }
};
struct Multiply {
  template <class T>
  static T of(T a, T b) {
    if constexpr (std::is_integral_v<T>)
      return static_cast<T>(static_cast<Bits<T>>(a) * static_cast<Bits<T>>(b));
    else
      return a * b;
  }
};
struct Divide {
  template <class T>
  static T of(T a, T b) {
    return a / b;
  }
};
// NaN if one of them is.
struct Min {
  template <class T>
  static T of(T a, T b) {
    return a < b || a != a ? a : b;
  }
};
struct Max {
  template <class T>
  static T of(T a, T b) {
    return a > b || a != a ? a : b;
  }
};
struct Negative {
  template <class T>
  static T of(T a) {
    if constexpr (std::is_integral_v<T>)
      return static_cast<T>(Bits<T>{0} - static_cast<Bits<T>>(a));
    else
      return -a;
  }
};
struct Abs {
  template <class T>
  static T of(T a) {
    if constexpr (std::is_floating_point_v<T>)
      return sizeof(T) == 4 ? static_cast<T>(__builtin_fabsf(static_cast<float>(a)))
                            : static_cast<T>(__builtin_fabs(static_cast<double>(a)));
    else
      return a < 0 ? Negative::of(a) : a;
  }
};
struct Sqrt {
  template <class T>
  static T of(T a) {
    if constexpr (sizeof(T) == 4)
      return __builtin_sqrtf(a);
    else
      return __builtin_sqrt(a);
  }
};
struct IsNan {
  template <class T>
  static std::uint8_t of(T a) {
    return a != a;
  }
};
struct Less {
  template <class T>
  static std::uint8_t of(T a, T b) {
    return a < b;
  }
};
struct LessEqual {
  template <class T>
  static std::uint8_t of(T a, T b) {
    return a <= b;
  }
};
struct Equal {
  template <class T>
  static std::uint8_t of(T a, T b) {
    return a == b;
  }
};
struct NotEqual {
  template <class T>
  static std::uint8_t of(T a, T b) {
    return a != b;
  }
};
struct Greater {
  template <class T>
  static std::uint8_t of(T a, T b) {
    return a > b;
  }
};
struct GreaterEqual {
  template <class T>
  static std::uint8_t of(T a, T b) {
    return a >= b;
  }
};
struct And {
  template <class T>
  static T of(T a, T b) {
    return static_cast<T>(a & b);
  }
};
struct Or {
  template <class T>
  static T of(T a, T b) {
    return static_cast<T>(a | b);
  }
};
struct Not {
  template <class T>
  static T of(T a) {
    return static_cast<T>(a ^ 1);
  }
};

template <class Op, class T, class Out>
void unary(void* out, const void* a, const void*, const void*, std::size_t n) {
  auto* to = static_cast<Out*>(out);
  const auto* x = static_cast<const T*>(a);
#pragma GCC ivdep
  for (std::size_t i = 0; i < n; ++i) to[i] = Op::of(x[i]);
}

template <class Op, class T, class Out>
void binary(void* out, const void* a, const void* b, const void*, std::size_t n) {
  auto* to = static_cast<Out*>(out);
  const auto* x = static_cast<const T*>(a);
  const auto* y = static_cast<const T*>(b);
#pragma GCC ivdep
  for (std::size_t i = 0; i < n; ++i) to[i] = Op::of(x[i], y[i]);
}

template <class T>
void choose(void* out, const void* a, const void* b, const void* c, std::size_t n) {
  auto* to = static_cast<T*>(out);
  const auto* which = static_cast<const std::uint8_t*>(a);
  const auto* x = static_cast<const T*>(b);
  const auto* y = static_cast<const T*>(c);
#pragma GCC ivdep
  for (std::size_t i = 0; i < n; ++i) to[i] = which[i] != 0 ? x[i] : y[i];
}

template <class From, class To>
void cast(void* out, const void* a, const void*, const void*, std::size_t n) {
  auto* to = static_cast<To*>(out);
  const auto* x = static_cast<const From*>(a);
#pragma GCC ivdep
  for (std::size_t i = 0; i < n; ++i) to[i] = static_cast<To>(x[i]);
}

template <class T>
Loop loop_of(ExpressionOp op) noexcept {
  switch (op) {
    case ExpressionOp::Add:
      return binary<Add, T, T>;
    case ExpressionOp::Subtract:
      return binary<Subtract, T, T>;
    case ExpressionOp::Multiply:
      return binary<Multiply, T, T>;
    case ExpressionOp::Min:
      return binary<Min, T, T>;
    case ExpressionOp::Max:
      return binary<Max, T, T>;
    case ExpressionOp::Negative:
      return unary<Negative, T, T>;
    case ExpressionOp::Abs:
      return unary<Abs, T, T>;
    case ExpressionOp::Where:
      return choose<T>;
    case ExpressionOp::Less:
      return binary<Less, T, std::uint8_t>;
    case ExpressionOp::LessEqual:
      return binary<LessEqual, T, std::uint8_t>;
    case ExpressionOp::Greater:
      return binary<Greater, T, std::uint8_t>;
    case ExpressionOp::GreaterEqual:
      return binary<GreaterEqual, T, std::uint8_t>;
    case ExpressionOp::Equal:
      return binary<Equal, T, std::uint8_t>;
    case ExpressionOp::NotEqual:
      return binary<NotEqual, T, std::uint8_t>;
    default:
      break;
  }
  if constexpr (std::is_floating_point_v<T>) {
    if (op == ExpressionOp::Divide) return binary<Divide, T, T>;
    if (op == ExpressionOp::Sqrt) return unary<Sqrt, T, T>;
    if (op == ExpressionOp::IsNan) return unary<IsNan, T, std::uint8_t>;
  }
  return nullptr;
}

Loop loop_of_bools(ExpressionOp op) noexcept {
  switch (op) {
    case ExpressionOp::And:
      return binary<And, std::uint8_t, std::uint8_t>;
    case ExpressionOp::Or:
      return binary<Or, std::uint8_t, std::uint8_t>;
    case ExpressionOp::Not:
      return unary<Not, std::uint8_t, std::uint8_t>;
    case ExpressionOp::Equal:
      return binary<Equal, std::uint8_t, std::uint8_t>;
    case ExpressionOp::NotEqual:
      return binary<NotEqual, std::uint8_t, std::uint8_t>;
    case ExpressionOp::Where:
      return choose<std::uint8_t>;
    default:
      return nullptr;
  }
}

// Every value of the one is a value of the other, or is rounded to the nearest.
template <class From, class To>
constexpr Loop widening() noexcept {
  if constexpr (std::is_same_v<From, To>)
    return nullptr;
  else if constexpr (std::is_floating_point_v<To>)
    return sizeof(From) <= sizeof(To) ? cast<From, To> : nullptr;
  else if constexpr (std::is_floating_point_v<From>)
    return nullptr;
  else if constexpr (std::is_signed_v<From> && std::is_unsigned_v<To>)
    return nullptr;
  else
    return sizeof(From) < sizeof(To) ? cast<From, To> : nullptr;
}

template <class From>
Loop cast_from(ElementType to) noexcept {
  switch (to) {
    case ElementType::Int8:
      return widening<From, std::int8_t>();
    case ElementType::Int16:
      return widening<From, std::int16_t>();
    case ElementType::Int32:
      return widening<From, std::int32_t>();
    case ElementType::Int64:
      return widening<From, std::int64_t>();
    case ElementType::UInt8:
      return widening<From, std::uint8_t>();
    case ElementType::UInt16:
      return widening<From, std::uint16_t>();
    case ElementType::UInt32:
      return widening<From, std::uint32_t>();
    case ElementType::UInt64:
      return widening<From, std::uint64_t>();
    case ElementType::Float32:
      return widening<From, float>();
    case ElementType::Float64:
      return widening<From, double>();
    default:
      return nullptr;
  }
}

template <class T>
Loop find_for(ExpressionOp op, ElementType to) noexcept {
  return op == ExpressionOp::Cast ? cast_from<T>(to) : loop_of<T>(op);
}

Loop find(ExpressionOp op, ElementType from, ElementType to) noexcept {
  switch (from) {
    case ElementType::Bool:
      return loop_of_bools(op);
    case ElementType::Int8:
      return find_for<std::int8_t>(op, to);
    case ElementType::Int16:
      return find_for<std::int16_t>(op, to);
    case ElementType::Int32:
      return find_for<std::int32_t>(op, to);
    case ElementType::Int64:
      return find_for<std::int64_t>(op, to);
    case ElementType::UInt8:
      return find_for<std::uint8_t>(op, to);
    case ElementType::UInt16:
      return find_for<std::uint16_t>(op, to);
    case ElementType::UInt32:
      return find_for<std::uint32_t>(op, to);
    case ElementType::UInt64:
      return find_for<std::uint64_t>(op, to);
    case ElementType::Float32:
      return find_for<float>(op, to);
    case ElementType::Float64:
      return find_for<double>(op, to);
  }
  return nullptr;
}

std::size_t select(const std::uint8_t* mask, std::size_t n, std::uint32_t* out) noexcept {
  std::size_t found = 0;
  std::size_t i = 0;
#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VL__)
  const __m512i step = _mm512_set1_epi32(16);
  __m512i numbers = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  for (; i + 16 <= n; i += 16) {
    const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(mask + i));
    const __mmask16 bits = _mm_test_epi8_mask(bytes, bytes);
    // A compressing store to memory is slow on some processors; this one writes all sixteen.
    _mm512_storeu_si512(out + found, _mm512_maskz_compress_epi32(bits, numbers));
    found += static_cast<std::size_t>(__builtin_popcount(bits));
    numbers = _mm512_add_epi32(numbers, step);
  }
#endif
  for (; i < n; ++i) {
    out[found] = static_cast<std::uint32_t>(i);
    found += mask[i] != 0;
  }
  return found;
}

}  // namespace

extern const Loops loops;
const Loops loops = {DSLINE_NAME(DSLINE_LOOPS), find, select};

}  // namespace dsline::expressions::DSLINE_LOOPS
