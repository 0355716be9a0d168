#include "dsline/expression.hpp"

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>
#include <string>

#include "expressions/loops.hpp"

namespace dsline {
namespace {

constexpr std::size_t kBlockRows = 1024;
constexpr std::size_t kBufferBytes = kBlockRows * 8;
constexpr std::size_t kMaxSteps = 2048;

constexpr std::size_t bytes_of(ElementType type) noexcept {
  switch (type) {
    case ElementType::Bool:
    case ElementType::Int8:
    case ElementType::UInt8:
      return 1;
    case ElementType::Int16:
    case ElementType::UInt16:
      return 2;
    case ElementType::Int32:
    case ElementType::UInt32:
    case ElementType::Float32:
      return 4;
    default:
      return 8;
  }
}

constexpr int arguments_of(ExpressionOp op) noexcept {
  switch (op) {
    case ExpressionOp::Column:
    case ExpressionOp::Constant:
      return 0;
    case ExpressionOp::Cast:
    case ExpressionOp::Negative:
    case ExpressionOp::Not:
    case ExpressionOp::Abs:
    case ExpressionOp::Sqrt:
    case ExpressionOp::IsNan:
      return 1;
    case ExpressionOp::Where:
      return 3;
    default:
      return 2;
  }
}

constexpr bool gives_truth(ExpressionOp op) noexcept {
  return (op >= ExpressionOp::Less && op <= ExpressionOp::Not) || op == ExpressionOp::IsNan;
}

[[noreturn]] void refuse(std::size_t step, const char* why) {
  throw Error(ErrorCode::InvalidArgument, "step " + std::to_string(step) + " of the program " + why);
}

template <std::size_t kBytes>
void gather_items(std::byte* to, const std::byte* from, std::ptrdiff_t stride, const std::uint32_t* rows,
                  std::size_t n) noexcept {
  for (std::size_t i = 0; i < n; ++i)
    std::memcpy(to + i * kBytes, from + static_cast<std::ptrdiff_t>(rows[i]) * stride, kBytes);
}

void gather(std::byte* to, const std::byte* from, std::ptrdiff_t stride, std::size_t bytes,
            const std::uint32_t* rows, std::size_t n) noexcept {
  switch (bytes) {
    case 1:
      return gather_items<1>(to, from, stride, rows, n);
    case 2:
      return gather_items<2>(to, from, stride, rows, n);
    case 4:
      return gather_items<4>(to, from, stride, rows, n);
    case 8:
      return gather_items<8>(to, from, stride, rows, n);
    case 12:
      return gather_items<12>(to, from, stride, rows, n);
    case 16:
      return gather_items<16>(to, from, stride, rows, n);
    case 24:
      return gather_items<24>(to, from, stride, rows, n);
    case 32:
      return gather_items<32>(to, from, stride, rows, n);
    default:
      for (std::size_t i = 0; i < n; ++i)
        std::memcpy(to + i * bytes, from + static_cast<std::ptrdiff_t>(rows[i]) * stride, bytes);
  }
}

template <std::size_t kBytes>
void pack_items(std::byte* to, const std::byte* from, std::ptrdiff_t stride, std::size_t n) noexcept {
  for (std::size_t i = 0; i < n; ++i)
    std::memcpy(to + i * kBytes, from + static_cast<std::ptrdiff_t>(i) * stride, kBytes);
}

void pack(std::byte* to, const std::byte* from, std::ptrdiff_t stride, std::size_t bytes,
          std::size_t n) noexcept {
  if (stride == static_cast<std::ptrdiff_t>(bytes)) {
    if (n != 0) std::memcpy(to, from, n * bytes);
  } else if (bytes == 1) {
    pack_items<1>(to, from, stride, n);
  } else if (bytes == 2) {
    pack_items<2>(to, from, stride, n);
  } else if (bytes == 4) {
    pack_items<4>(to, from, stride, n);
  } else {
    pack_items<8>(to, from, stride, n);
  }
}

// Buffers of the thread, for the program that needs the most of them.
struct Scratch {
  std::byte* at = nullptr;
  std::size_t bytes = 0;
  ~Scratch() { std::free(at); }
  std::byte* of(std::size_t wanted) {
    if (wanted > bytes) {
      std::free(at);
      bytes = 0;
      at = static_cast<std::byte*>(std::aligned_alloc(64, wanted));
      if (at == nullptr) throw std::bad_alloc();
      bytes = wanted;
    }
    return at;
  }
};
thread_local Scratch scratch;

}  // namespace

struct ExpressionProgram::Run {
  const ColumnView* columns;
  std::byte* buffers;
  std::vector<const std::byte*> results;

  std::byte* buffer(std::uint16_t number) const noexcept { return buffers + number * kBufferBytes; }
};

ExpressionProgram::ExpressionProgram(std::vector<ExpressionStep> steps, std::uint32_t columns)
    : steps_(std::move(steps)), plan_(steps_.size()), columns_(columns) {
  const std::size_t count = steps_.size();
  if (count == 0) throw Error(ErrorCode::InvalidArgument, "the program has no steps");
  if (count > kMaxSteps)
    throw Error(ErrorCode::InvalidArgument, "the program has " + std::to_string(count) + " steps, and " +
                                                std::to_string(kMaxSteps) + " are allowed");
  const expressions::Loops& loops = expressions::chosen_loops();
  std::vector<std::size_t> last_use(count, 0);
  for (std::size_t i = 0; i < count; ++i) {
    const ExpressionStep& step = steps_[i];
    if (step.op > ExpressionOp::Where || step.type > ElementType::Float64) refuse(i, "is unknown");
    const int arguments = arguments_of(step.op);
    for (int a = 0; a < arguments; ++a) {
      if (step.args[a] >= i) refuse(i, "uses a step that is not before it");
      last_use[step.args[a]] = i;
    }
    if (step.op == ExpressionOp::Column) {
      if (step.column >= columns_) refuse(i, "names a column that is not there");
      continue;
    }
    if (step.op == ExpressionOp::Constant) continue;
    const bool chooses = step.op == ExpressionOp::Where;
    const ElementType from = steps_[step.args[chooses ? 1 : 0]].type;
    if (arguments == 2 && steps_[step.args[1]].type != from) refuse(i, "joins two types");
    if (chooses && (steps_[step.args[0]].type != ElementType::Bool || steps_[step.args[2]].type != from))
      refuse(i, "chooses between two types, or by no truth value");
    const ElementType gives = gives_truth(step.op)            ? ElementType::Bool
                              : step.op == ExpressionOp::Cast ? step.type
                                                              : from;
    plan_[i].loop = loops.find(step.op, from, step.type);
    if (plan_[i].loop == nullptr || step.type != gives) refuse(i, "has no loop for its types");
  }
  // A buffer is free again behind the last step that reads it. Constants keep theirs: they are filled once a run.
  std::vector<std::uint16_t> unused;
  std::vector<bool> gone(count, false);
  for (std::size_t i = 0; i < count; ++i) {
    const ExpressionStep& step = steps_[i];
    const bool is_constant = step.op == ExpressionOp::Constant;
    if (unused.empty() || is_constant) {
      plan_[i].buffer = static_cast<std::uint16_t>(buffers_++);
    } else {
      plan_[i].buffer = unused.back();
      unused.pop_back();
    }
    for (int a = 0; a < arguments_of(step.op); ++a) {
      const std::size_t used = step.args[a];
      if (last_use[used] != i || gone[used] || steps_[used].op == ExpressionOp::Constant) continue;
      gone[used] = true;
      unused.push_back(plan_[used].buffer);
    }
  }
}

/// The result of the block ends up in results.back(), and in `out` where that is given.
void ExpressionProgram::run_block(Run& run, std::size_t first, std::size_t rows, std::byte* out) const {
  const std::size_t last = steps_.size() - 1;
  for (std::size_t i = 0; i <= last; ++i) {
    const ExpressionStep& step = steps_[i];
    std::byte* to = i == last && out != nullptr ? out : run.buffer(plan_[i].buffer);
    if (step.op == ExpressionOp::Column) {
      const ColumnView& column = run.columns[step.column];
      const std::size_t bytes = bytes_of(step.type);
      const std::byte* from = column.data + static_cast<std::ptrdiff_t>(first) * column.stride;
      const bool in_place = column.stride == static_cast<std::ptrdiff_t>(bytes) && to != out &&
                            reinterpret_cast<std::uintptr_t>(from) % bytes == 0;
      if (step.type == ElementType::Bool) {
        for (std::size_t r = 0; r < rows; ++r)
          to[r] = std::byte{from[static_cast<std::ptrdiff_t>(r) * column.stride] != std::byte{0}};
      } else if (in_place) {
        run.results[i] = from;
        continue;
      } else {
        pack(to, from, column.stride, bytes, rows);
      }
    } else if (step.op == ExpressionOp::Constant) {
      const std::byte* filled = run.buffer(plan_[i].buffer);
      if (to != filled) std::memcpy(to, filled, rows * bytes_of(step.type));
    } else {
      const std::byte* a = run.results[step.args[0]];
      const std::byte* b = run.results[step.args[1]];
      const std::byte* c = run.results[step.args[2]];
      plan_[i].loop(to, a, b, c, rows);
    }
    run.results[i] = to;
  }
}

namespace {

void fill(std::byte* to, std::uint64_t constant, std::size_t bytes, std::size_t rows) noexcept {
  if (bytes == 8) {
    std::fill_n(reinterpret_cast<std::uint64_t*>(to), rows, constant);
  } else if (bytes == 4) {
    std::fill_n(reinterpret_cast<std::uint32_t*>(to), rows, static_cast<std::uint32_t>(constant));
  } else if (bytes == 2) {
    std::fill_n(reinterpret_cast<std::uint16_t*>(to), rows, static_cast<std::uint16_t>(constant));
  } else {
    std::memset(to, static_cast<int>(constant & 0xFF), rows);
  }
}

}  // namespace

void ExpressionProgram::fill_constants(const Run& run, std::size_t rows) const noexcept {
  for (std::size_t i = 0; i < steps_.size(); ++i) {
    if (steps_[i].op == ExpressionOp::Constant)
      fill(run.buffer(plan_[i].buffer), steps_[i].constant, bytes_of(steps_[i].type),
           std::min(rows, kBlockRows));
  }
}

void ExpressionProgram::evaluate(const ColumnView* columns, std::size_t rows, std::byte* out) const {
  Run run{columns, scratch.of(buffers_ * kBufferBytes), std::vector<const std::byte*>(steps_.size())};
  fill_constants(run, rows);
  const std::size_t bytes = bytes_of(type());
  for (std::size_t first = 0; first < rows; first += kBlockRows)
    run_block(run, first, std::min(kBlockRows, rows - first), out + first * bytes);
}

std::size_t ExpressionProgram::filter(const ColumnView* columns, std::size_t rows, const RowsToKeep* kept,
                                      std::size_t kept_count) const {
  // The numbers of the rows stand behind the buffers.
  const std::size_t numbers_bytes = (kBlockRows + 16) * sizeof(std::uint32_t);
  Run run{columns, scratch.of(buffers_ * kBufferBytes + numbers_bytes),
          std::vector<const std::byte*>(steps_.size())};
  auto* numbers = reinterpret_cast<std::uint32_t*>(run.buffers + buffers_ * kBufferBytes);
  fill_constants(run, rows);
  const expressions::Loops& loops = expressions::chosen_loops();
  std::size_t found = 0;
  for (std::size_t first = 0; first < rows; first += kBlockRows) {
    const std::size_t block = std::min(kBlockRows, rows - first);
    run_block(run, first, block, nullptr);
    const auto* mask = reinterpret_cast<const std::uint8_t*>(run.results.back());
    const std::size_t selected = loops.select(mask, block, numbers);
    if (selected == 0) continue;
    for (std::size_t k = 0; k < kept_count; ++k) {
      const RowsToKeep& rows_of = kept[k];
      const std::byte* from = rows_of.from + static_cast<std::ptrdiff_t>(first) * rows_of.stride;
      std::byte* to = rows_of.to + found * rows_of.item_bytes;
      if (selected == block && rows_of.stride == static_cast<std::ptrdiff_t>(rows_of.item_bytes)) {
        std::memcpy(to, from, block * rows_of.item_bytes);
      } else {
        gather(to, from, rows_of.stride, rows_of.item_bytes, numbers, selected);
      }
    }
    found += selected;
  }
  return found;
}

const expressions::Loops& expressions::chosen_loops() noexcept {
#if defined(DSLINE_HAS_AVX)
  static const Loops& best = []() -> const Loops& {
    const char* asked = std::getenv("DSLINE_EXPRESSION_BACKEND");  // for tests and measurements
    const std::string wanted = asked == nullptr ? "" : asked;
    __builtin_cpu_init();
    const bool has_avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                            __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
    if (has_avx512 && (wanted.empty() || wanted == "avx512")) return avx512::loops;
    if (__builtin_cpu_supports("avx2") && (wanted.empty() || wanted == "avx2")) return avx2::loops;
    return baseline::loops;
  }();
  return best;
#else
  return baseline::loops;
#endif
}

const char* expression_backend() noexcept { return expressions::chosen_loops().name; }

}  // namespace dsline
