#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "dsline/error.hpp"

/// Programs over columns, run block by block. dsline/expressions.py makes them from text.
namespace dsline {

enum class ElementType : std::uint8_t {
  Bool = 0,
  Int8 = 1,
  Int16 = 2,
  Int32 = 3,
  Int64 = 4,
  UInt8 = 5,
  UInt16 = 6,
  UInt32 = 7,
  UInt64 = 8,
  Float32 = 9,
  Float64 = 10,
};

enum class ExpressionOp : std::uint8_t {
  Column = 0,
  Constant = 1,
  Cast = 2,
  Add = 3,
  Subtract = 4,
  Multiply = 5,
  Divide = 6,
  Negative = 7,
  Less = 8,
  LessEqual = 9,
  Greater = 10,
  GreaterEqual = 11,
  Equal = 12,
  NotEqual = 13,
  And = 14,
  Or = 15,
  Not = 16,
  Abs = 17,
  Min = 18,
  Max = 19,
  Sqrt = 20,
  IsNan = 21,
  Where = 22,
};

/// Uses the results of steps before it.
struct ExpressionStep {
  ExpressionOp op = ExpressionOp::Constant;
  ElementType type = ElementType::Bool;  ///< of the result
  std::uint16_t args[3] = {0, 0, 0};     ///< numbers of steps
  std::uint16_t column = 0;              ///< of Column
  std::uint64_t constant = 0;            ///< of Constant: the bytes of the value, the first ones
};

/// Elements `stride` bytes apart, at any alignment. A bool is any byte that is not 0.
struct ColumnView {
  const std::byte* data = nullptr;
  std::ptrdiff_t stride = 0;
};

/// Rows to be kept: `item_bytes` at every `stride` bytes of `from` go to `to`, packed. The two do not overlap.
struct RowsToKeep {
  const std::byte* from = nullptr;
  std::ptrdiff_t stride = 0;
  std::byte* to = nullptr;
  std::size_t item_bytes = 0;
};

/// A checked program: the last step is the result.
///
/// Threads: immutable; any number may run it at once. Arithmetic is that of IEEE 754 without contraction and of integers
/// that wrap around, so every element equals that of the same operations done one by one.
class ExpressionProgram {
 public:
  /// Throws Error(InvalidArgument) for steps that do not fit together. `columns`: how many a run is given.
  ExpressionProgram(std::vector<ExpressionStep> steps, std::uint32_t columns);

  ElementType type() const noexcept { return steps_.back().type; }
  /// Writes `rows` results, packed. Throws std::bad_alloc.
  void evaluate(const ColumnView* columns, std::size_t rows, std::byte* out) const;
  /// Copies the rows for which the result is true; how many. Requires: type() is Bool; every `to` has room for all rows.
  std::size_t filter(const ColumnView* columns, std::size_t rows, const RowsToKeep* kept,
                     std::size_t kept_count) const;

 private:
  using Loop = void (*)(void* out, const void* a, const void* b, const void* c, std::size_t n);
  struct Planned {
    Loop loop = nullptr;
    std::uint16_t buffer = 0;
  };
  struct Run;

  void fill_constants(const Run& run, std::size_t rows) const noexcept;
  void run_block(Run& run, std::size_t first, std::size_t rows, std::byte* out) const;

  std::vector<ExpressionStep> steps_;
  std::vector<Planned> plan_;
  std::uint32_t columns_;
  std::uint32_t buffers_ = 0;
};

/// The instruction set of the loops that this processor runs: "avx512", "avx2" or "baseline".
const char* expression_backend() noexcept;

}  // namespace dsline
