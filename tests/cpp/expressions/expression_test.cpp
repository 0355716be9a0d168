#include "dsline/expression.hpp"

#include <gtest/gtest.h>

#include <cmath>
#include <cstring>
#include <limits>
#include <memory>
#include <random>
#include <thread>
#include <vector>

#include "expressions/loops.hpp"

namespace dsline {
namespace {

using Op = ExpressionOp;
using Type = ElementType;

constexpr std::size_t kTypes = 11;
constexpr std::size_t kOps = 23;
constexpr std::size_t kSizes[kTypes] = {1, 1, 2, 4, 8, 1, 2, 4, 8, 4, 8};
const std::vector<std::size_t> kLengths{0, 1, 2, 15, 16, 17, 31, 64, 1000, 1023, 1024, 1025, 5000};

std::size_t size_of(Type type) { return kSizes[static_cast<std::size_t>(type)]; }

/// A heap block of exactly this size, so that the address sanitizer sees an access beside it.
struct Block {
  explicit Block(std::size_t bytes) : size(bytes), at(new std::byte[bytes]) {
    std::memset(at.get(), 0xA5, bytes);
  }
  std::byte* data() const { return at.get(); }
  std::size_t size;
  std::unique_ptr<std::byte[]> at;
};

template <class T>
Block block_of(const std::vector<T>& values) {
  Block block(values.size() * sizeof(T));
  if (!values.empty()) std::memcpy(block.data(), values.data(), block.size);
  return block;
}

template <class T>
std::vector<T> values_of(const Block& block) {
  std::vector<T> values(block.size / sizeof(T));
  if (!values.empty()) std::memcpy(values.data(), block.data(), block.size);
  return values;
}

ExpressionStep column(std::uint16_t number, Type type) { return {Op::Column, type, {0, 0, 0}, number, 0}; }

template <class T>
ExpressionStep constant(T value, Type type) {
  ExpressionStep step{Op::Constant, type, {0, 0, 0}, 0, 0};
  std::memcpy(&step.constant, &value, sizeof(T));
  return step;
}

ExpressionStep step(Op op, Type type, std::uint16_t a, std::uint16_t b = 0, std::uint16_t c = 0) {
  return {op, type, {a, b, c}, 0, 0};
}

template <class T>
ColumnView view(const std::vector<T>& values) {
  return {reinterpret_cast<const std::byte*>(values.data()), sizeof(T)};
}

template <class T>
std::vector<T> evaluate(const std::vector<ExpressionStep>& steps, const std::vector<ColumnView>& columns,
                        std::size_t rows) {
  const ExpressionProgram program(steps, static_cast<std::uint32_t>(columns.size()));
  EXPECT_EQ(size_of(program.type()), sizeof(T));
  Block out(rows * sizeof(T));
  program.evaluate(columns.data(), rows, out.data());
  return values_of<T>(out);
}

std::vector<double> numbers(std::size_t n, unsigned seed) {
  std::mt19937 random(seed);
  std::vector<double> values(n);
  for (double& value : values) {
    const unsigned kind = random() % 20;
    value = kind == 0   ? std::numeric_limits<double>::quiet_NaN()
            : kind == 1 ? std::numeric_limits<double>::infinity()
            : kind == 2 ? -0.0
                        : static_cast<double>(static_cast<int>(random() % 200) - 100) / 4;
  }
  return values;
}

bool is_same(double a, double b) {
  return (std::isnan(a) && std::isnan(b)) || (a == b && std::signbit(a) == std::signbit(b));
}

// --- what is refused ----------------------------------------------------------------------------------------------------

void refuses(const std::vector<ExpressionStep>& steps, std::uint32_t columns, const std::string& why) {
  try {
    const ExpressionProgram program(steps, columns);
    ADD_FAILURE() << "taken, but " << why;
  } catch (const Error& error) {
    EXPECT_EQ(error.code(), ErrorCode::InvalidArgument);
    EXPECT_NE(std::string(error.what()).find(why), std::string::npos) << error.what();
  }
}

TEST(ExpressionProgram, RefusesStepsThatDoNotFitTogether) {
  const ExpressionStep f8 = column(0, Type::Float64);
  refuses({}, 1, "no steps");
  refuses(std::vector<ExpressionStep>(2049, f8), 1, "2048 are allowed");
  refuses({column(1, Type::Float64)}, 1, "a column that is not there");
  refuses({f8}, 0, "a column that is not there");
  refuses({step(Op::Negative, Type::Float64, 0)}, 1, "not before it");
  refuses({f8, step(Op::Add, Type::Float64, 0, 1)}, 1, "not before it");
  refuses({f8, step(Op::Add, Type::Float64, 0, 7)}, 1, "not before it");
  refuses({f8, column(0, Type::Float32), step(Op::Add, Type::Float64, 0, 1)}, 1, "joins two types");
  refuses({f8, step(Op::Where, Type::Float64, 0, 0, 0)}, 1, "by no truth value");
  refuses({f8, column(0, Type::Bool), column(0, Type::Float32), step(Op::Where, Type::Float64, 1, 0, 2)}, 1,
          "chooses between two types");
  refuses({f8, step(Op::Add, Type::Float32, 0, 0)}, 1, "no loop");
  refuses({f8, step(Op::Less, Type::Float64, 0, 0)}, 1, "no loop");
  refuses({f8, step(Op::And, Type::Bool, 0, 0)}, 1, "no loop");
  refuses({f8, step(Op::Cast, Type::Float32, 0)}, 1, "no loop");
  refuses({f8, step(Op::Cast, Type::Int64, 0)}, 1, "no loop");
  refuses({column(0, Type::Int64), step(Op::Divide, Type::Int64, 0, 0)}, 1, "no loop");
  refuses({column(0, Type::Bool), step(Op::Less, Type::Bool, 0, 0)}, 1, "no loop");
  refuses({step(static_cast<Op>(23), Type::Bool, 0)}, 1, "is unknown");
  refuses({column(0, static_cast<Type>(11))}, 1, "is unknown");
}

// --- the loops of every instruction set ---------------------------------------------------------------------------------

std::vector<const expressions::Loops*> sets_of_this_processor() {
  std::vector<const expressions::Loops*> sets{&expressions::baseline::loops};
#if defined(DSLINE_HAS_AVX)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx2")) sets.push_back(&expressions::avx2::loops);
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq"))
    sets.push_back(&expressions::avx512::loops);
#endif
  return sets;
}

bool is_float(Type type) { return type == Type::Float32 || type == Type::Float64; }

Type type_of_result(Op op, Type from, Type to) {
  const bool truth = (op >= Op::Less && op <= Op::Not) || op == Op::IsNan;
  return truth ? Type::Bool : op == Op::Cast ? to : from;
}

Block operand(Type type, std::size_t n, std::mt19937& random) {
  Block block(n * size_of(type));
  for (std::size_t i = 0; i < block.size; ++i) block.data()[i] = static_cast<std::byte>(random());
  if (type == Type::Bool) {
    for (std::size_t i = 0; i < n; ++i) block.data()[i] &= std::byte{1};
  } else if (is_float(type)) {
    const std::vector<double> values = numbers(n, random());
    for (std::size_t i = 0; i < n; ++i) {
      const auto narrow = static_cast<float>(values[i]);
      if (type == Type::Float32)
        std::memcpy(block.data() + i * 4, &narrow, 4);
      else
        std::memcpy(block.data() + i * 8, &values[i], 8);
    }
  } else if (random() % 2 == 0) {  // small numbers, so that some are equal
    for (std::size_t i = 0; i < n; ++i) {
      std::memset(block.data() + i * size_of(type), 0, size_of(type));
      block.data()[i * size_of(type)] = static_cast<std::byte>(random() % 4);
    }
  }
  return block;
}

bool same_results(Type type, const Block& a, const Block& b) {
  if (type == Type::Float64 || type == Type::Float32) {
    for (std::size_t i = 0; i < a.size / size_of(type); ++i) {
      double x = 0, y = 0;
      float narrow_x = 0, narrow_y = 0;
      if (type == Type::Float64) {
        std::memcpy(&x, a.data() + i * 8, 8);
        std::memcpy(&y, b.data() + i * 8, 8);
      } else {
        std::memcpy(&narrow_x, a.data() + i * 4, 4);
        std::memcpy(&narrow_y, b.data() + i * 4, 4);
        x = static_cast<double>(narrow_x);
        y = static_cast<double>(narrow_y);
      }
      if (!is_same(x, y)) return false;
    }
    return true;
  }
  return std::memcmp(a.data(), b.data(), a.size) == 0;
}

TEST(ExpressionLoops, EveryInstructionSetGivesTheSame) {
  const auto sets = sets_of_this_processor();
  std::mt19937 random(7);
  int loops = 0;
  for (std::size_t op_number = 2; op_number < kOps; ++op_number) {
    for (std::size_t from_number = 0; from_number < kTypes; ++from_number) {
      for (std::size_t to_number = 0; to_number < kTypes; ++to_number) {
        const Op op = static_cast<Op>(op_number);
        const Type from = static_cast<Type>(from_number), to = static_cast<Type>(to_number);
        if (op != Op::Cast && from != to) continue;
        const expressions::Loop wanted = sets[0]->find(op, from, to);
        for (const expressions::Loops* set : sets)
          ASSERT_EQ(set->find(op, from, to) == nullptr, wanted == nullptr);
        if (wanted == nullptr) continue;
        ++loops;
        const Type gives = type_of_result(op, from, to);
        for (const std::size_t n : {0UL, 1UL, 7UL, 16UL, 63UL, 1024UL}) {
          const bool chooses = op == Op::Where;
          const Block a = operand(chooses ? Type::Bool : from, n, random);
          const Block b = operand(from, n, random), c = operand(from, n, random);
          Block first(n * size_of(gives));
          wanted(first.data(), a.data(), b.data(), c.data(), n);
          for (std::size_t i = 1; i < sets.size(); ++i) {
            Block other(n * size_of(gives));
            sets[i]->find(op, from, to)(other.data(), a.data(), b.data(), c.data(), n);
            EXPECT_TRUE(same_results(gives, first, other))
                << sets[i]->name << " op " << op_number << " of type " << from_number << ", " << n
                << " elements";
          }
        }
      }
    }
  }
  EXPECT_GT(loops, 150);
}

TEST(ExpressionLoops, SelectsTheNumbersOfTrueElements) {
  std::mt19937 random(3);
  for (const expressions::Loops* set : sets_of_this_processor()) {
    for (const std::size_t n : {0UL, 1UL, 15UL, 16UL, 17UL, 100UL, 1024UL}) {
      for (const unsigned share : {0U, 1U, 50U, 99U, 100U}) {
        Block mask(n);
        std::vector<std::uint32_t> wanted;
        for (std::size_t i = 0; i < n; ++i) {
          const bool is_true = random() % 100 < share;
          mask.data()[i] = static_cast<std::byte>(is_true ? 1 + random() % 255 : 0);
          if (is_true) wanted.push_back(static_cast<std::uint32_t>(i));
        }
        std::vector<std::uint32_t> found(n + 16);
        found.resize(set->select(reinterpret_cast<const std::uint8_t*>(mask.data()), n, found.data()));
        EXPECT_EQ(found, wanted) << set->name << " " << n;
      }
    }
  }
}

TEST(ExpressionLoops, IntegersWrapAroundAndNanSpreads) {
  const std::vector<std::int8_t> small{127, -128, -1, 100};
  EXPECT_EQ(evaluate<std::int8_t>({column(0, Type::Int8), step(Op::Add, Type::Int8, 0, 0)}, {view(small)}, 4),
            (std::vector<std::int8_t>{-2, 0, -2, -56}));
  EXPECT_EQ(
      evaluate<std::int8_t>({column(0, Type::Int8), step(Op::Multiply, Type::Int8, 0, 0)}, {view(small)}, 4),
      (std::vector<std::int8_t>{1, 0, 1, 16}));
  EXPECT_EQ(evaluate<std::int8_t>({column(0, Type::Int8), step(Op::Abs, Type::Int8, 0)}, {view(small)}, 4),
            (std::vector<std::int8_t>{127, -128, 1, 100}));
  const std::vector<std::int64_t> large{std::numeric_limits<std::int64_t>::min()};
  EXPECT_EQ(
      evaluate<std::int64_t>({column(0, Type::Int64), step(Op::Negative, Type::Int64, 0)}, {view(large)}, 1),
      large);
  const double nan = std::numeric_limits<double>::quiet_NaN();
  const std::vector<double> a{1, nan, nan, 2}, b{nan, 1, nan, 1};
  const std::vector<ExpressionStep> both{column(0, Type::Float64), column(1, Type::Float64)};
  for (const Op op : {Op::Min, Op::Max}) {
    auto steps = both;
    steps.push_back(step(op, Type::Float64, 0, 1));
    const auto got = evaluate<double>(steps, {view(a), view(b)}, 4);
    EXPECT_TRUE(std::isnan(got[0]) && std::isnan(got[1]) && std::isnan(got[2]));
    EXPECT_EQ(got[3], op == Op::Min ? 1 : 2);
  }
  auto unequal = both;
  unequal.push_back(step(Op::NotEqual, Type::Bool, 0, 1));
  EXPECT_EQ(evaluate<std::uint8_t>(unequal, {view(a), view(b)}, 4), (std::vector<std::uint8_t>{1, 1, 1, 1}));
}

// --- whole programs -----------------------------------------------------------------------------------------------------

TEST(ExpressionProgram, ReadsColumnsAtAnyStrideAndAlignment) {
  for (const std::size_t rows : kLengths) {
    for (const std::size_t gap : {8UL, 9UL, 24UL, 40UL}) {
      for (const std::size_t start : {0UL, 1UL, 3UL}) {
        const std::vector<double> values = numbers(rows, 5);
        Block memory(start + rows * gap);
        for (std::size_t i = 0; i < rows; ++i) std::memcpy(memory.data() + start + i * gap, &values[i], 8);
        const std::vector<ExpressionStep> steps{column(0, Type::Float64), step(Op::Add, Type::Float64, 0, 0)};
        // The last row has no gap behind it.
        const auto stride = static_cast<std::ptrdiff_t>(gap);
        const auto got = evaluate<double>(steps, {{memory.data() + start, stride}}, rows);
        for (std::size_t i = 0; i < rows; ++i)
          ASSERT_TRUE(is_same(got[i], values[i] + values[i])) << rows << " " << gap;
        if (rows == 0) continue;
        const auto back =
            evaluate<double>(steps, {{memory.data() + start + (rows - 1) * gap, -stride}}, rows);
        for (std::size_t i = 0; i < rows; ++i) ASSERT_TRUE(is_same(back[i], got[rows - 1 - i]));
      }
    }
  }
}

TEST(ExpressionProgram, TakesAnyByteThatIsNotZeroForTrue) {
  const std::vector<std::uint8_t> bytes{0, 1, 2, 255, 128};
  const std::vector<ExpressionStep> same{column(0, Type::Bool)};
  EXPECT_EQ(evaluate<std::uint8_t>(same, {view(bytes)}, 5), (std::vector<std::uint8_t>{0, 1, 1, 1, 1}));
  const std::vector<ExpressionStep> equal{column(0, Type::Bool), constant<std::uint8_t>(1, Type::Bool),
                                          step(Op::Equal, Type::Bool, 0, 1)};
  EXPECT_EQ(evaluate<std::uint8_t>(equal, {view(bytes)}, 5), (std::vector<std::uint8_t>{0, 1, 1, 1, 1}));
}

TEST(ExpressionProgram, AResultMayBeAConstantOrAColumn) {
  for (const std::size_t rows : kLengths) {
    EXPECT_EQ(evaluate<std::int16_t>({constant<std::int16_t>(-7, Type::Int16)}, {}, rows),
              std::vector<std::int16_t>(rows, -7));
    const std::vector<float> values(rows, 1.5F);
    EXPECT_EQ(evaluate<float>({column(0, Type::Float32)}, {view(values)}, rows), values);
  }
}

/// Numbers in [0, count) of steps that give `type`, or none.
std::vector<std::uint16_t> steps_of(const std::vector<ExpressionStep>& steps, Type type) {
  std::vector<std::uint16_t> found;
  for (std::size_t i = 0; i < steps.size(); ++i)
    if (steps[i].type == type) found.push_back(static_cast<std::uint16_t>(i));
  return found;
}

double one_by_one(const std::vector<ExpressionStep>& steps, const std::vector<std::vector<double>>& columns,
                  std::size_t row) {
  std::vector<double> results;
  for (const ExpressionStep& each : steps) {
    const double a = results.empty() ? 0 : results[each.args[0]];
    const double b = results.empty() ? 0 : results[each.args[1]];
    double result = 0;
    switch (each.op) {
      case Op::Column:
        result = columns[each.column][row];
        break;
      case Op::Constant:
        std::memcpy(&result, &each.constant, 8);
        break;
      case Op::Add:
        result = a + b;
        break;
      case Op::Subtract:
        result = a - b;
        break;
      case Op::Multiply:
        result = a * b;
        break;
      case Op::Divide:
        result = a / b;
        break;
      case Op::Less:
        result = a < b;
        break;
      case Op::NotEqual:
        result = a != b;
        break;
      case Op::And:
        result = a != 0 && b != 0;
        break;
      case Op::Not:
        result = a == 0;
        break;
      case Op::Where:
        result = a != 0 ? b : results[each.args[2]];
        break;
      default:
        ADD_FAILURE();
    }
    results.push_back(result);
  }
  return results.back();
}

TEST(ExpressionProgram, RandomProgramsEqualTheSameDoneOneByOne) {
  std::mt19937 random(11);
  const std::vector<Op> arithmetic{Op::Add, Op::Subtract, Op::Multiply, Op::Divide};
  for (int round = 0; round < 200; ++round) {
    const std::size_t rows = kLengths[random() % kLengths.size()] % 1500;
    std::vector<std::vector<double>> data;
    std::vector<ColumnView> columns;
    for (int i = 0; i < 3; ++i) data.push_back(numbers(rows, random()));
    for (const auto& values : data) columns.push_back(view(values));
    std::vector<ExpressionStep> steps{column(0, Type::Float64), column(1, Type::Float64),
                                      column(2, Type::Float64)};
    // Steps are used again and again, some of them long after they were made: buffers must not be taken too early.
    for (unsigned count = 1 + random() % 60; count > 0; --count) {
      const auto floats = steps_of(steps, Type::Float64), truths = steps_of(steps, Type::Bool);
      const auto any = [&](const std::vector<std::uint16_t>& of) { return of[random() % of.size()]; };
      const unsigned kind = random() % 10;
      if (kind == 0)
        steps.push_back(constant<double>(static_cast<double>(random() % 9), Type::Float64));
      else if (kind <= 4)
        steps.push_back(step(arithmetic[random() % 4], Type::Float64, any(floats), any(floats)));
      else if (kind <= 6)
        steps.push_back(
            step(random() % 2 == 0 ? Op::Less : Op::NotEqual, Type::Bool, any(floats), any(floats)));
      else if (truths.empty())
        continue;
      else if (kind == 7)
        steps.push_back(step(Op::Where, Type::Float64, any(truths), any(floats), any(floats)));
      else if (kind == 8)
        steps.push_back(step(Op::And, Type::Bool, any(truths), any(truths)));
      else
        steps.push_back(step(Op::Not, Type::Bool, any(truths)));
    }
    const bool is_truth = steps.back().type == Type::Bool;
    const auto truths = is_truth ? evaluate<std::uint8_t>(steps, columns, rows) : std::vector<std::uint8_t>();
    const auto floats = is_truth ? std::vector<double>() : evaluate<double>(steps, columns, rows);
    std::vector<std::uint32_t> kept;
    for (std::size_t row = 0; row < rows; ++row) {
      const double wanted = one_by_one(steps, data, row);
      const double got = is_truth ? static_cast<double>(truths[row]) : floats[row];
      ASSERT_TRUE(std::isnan(wanted) ? std::isnan(got) : got == wanted)
          << "round " << round << " row " << row;
      if (wanted != 0) kept.push_back(static_cast<std::uint32_t>(row));
    }
    if (!is_truth) continue;
    // The same as a filter, of rows of an odd size with gaps between them.
    constexpr std::size_t kItem = 13, kGap = 17;
    Block rows_given(rows * kGap), rows_kept(rows * kItem);
    for (std::size_t row = 0; row < rows; ++row) {
      const auto number = static_cast<std::uint32_t>(row);
      std::memcpy(rows_given.data() + row * kGap, &number, 4);
    }
    const RowsToKeep keep{rows_given.data(), kGap, rows_kept.data(), kItem};
    const ExpressionProgram program(steps, 3);
    ASSERT_EQ(program.filter(columns.data(), rows, &keep, 1), kept.size());
    for (std::size_t i = 0; i < kept.size(); ++i)
      ASSERT_EQ(std::memcmp(rows_kept.data() + i * kItem, rows_given.data() + kept[i] * kGap, kItem), 0);
    for (std::size_t i = kept.size() * kItem; i < rows_kept.size; ++i)
      ASSERT_EQ(rows_kept.data()[i], std::byte{0xA5});
  }
}

TEST(ExpressionProgram, KeepsRowsOfEverySize) {
  const std::vector<ExpressionStep> steps{column(0, Type::Int32), constant<std::int32_t>(0, Type::Int32),
                                          step(Op::Greater, Type::Bool, 0, 1)};
  const ExpressionProgram program(steps, 1);
  for (const std::size_t rows : kLengths) {
    for (const int share : {0, 30, 100}) {
      std::mt19937 random(static_cast<unsigned>(rows) + static_cast<unsigned>(share));
      std::vector<std::int32_t> values(rows);
      for (auto& value : values) value = static_cast<int>(random() % 100) < share ? 1 : -1;
      const ColumnView read = view(values);
      std::vector<Block> given, kept;
      std::vector<RowsToKeep> keep;
      for (std::size_t item = 1; item <= 40; ++item) {
        given.emplace_back(rows * item);
        kept.emplace_back(rows * item);
        for (std::size_t i = 0; i < rows * item; ++i)
          given.back().data()[i] = static_cast<std::byte>(random());
        keep.push_back({given.back().data(), static_cast<std::ptrdiff_t>(item), kept.back().data(), item});
      }
      const std::size_t found = program.filter(&read, rows, keep.data(), keep.size());
      std::size_t row = 0;
      for (std::size_t i = 0; i < rows; ++i) {
        if (values[i] <= 0) continue;
        for (std::size_t item = 1; item <= 40; ++item)
          ASSERT_EQ(std::memcmp(kept[item - 1].data() + row * item, given[item - 1].data() + i * item, item),
                    0);
        ++row;
      }
      ASSERT_EQ(found, row);
    }
  }
}

TEST(ExpressionProgram, RunsInManyThreadsAtOnce) {
  const std::vector<double> values = numbers(20'000, 1);
  const std::vector<ExpressionStep> steps{column(0, Type::Float64), step(Op::Multiply, Type::Float64, 0, 0),
                                          step(Op::Subtract, Type::Float64, 1, 0)};
  const ExpressionProgram program(steps, 1);
  const ColumnView read = view(values);
  std::vector<std::thread> threads;
  std::vector<std::vector<double>> results(4, std::vector<double>(values.size()));
  for (auto& result : results)
    threads.emplace_back([&] {
      for (int i = 0; i < 20; ++i)
        program.evaluate(&read, values.size(), reinterpret_cast<std::byte*>(result.data()));
    });
  for (auto& thread : threads) thread.join();
  for (const auto& result : results)
    for (std::size_t i = 0; i < values.size(); ++i)
      ASSERT_TRUE(is_same(result[i], values[i] * values[i] - values[i]));
}

TEST(ExpressionProgram, NamesTheInstructionSetThatItRuns) {
  EXPECT_STREQ(expression_backend(), expressions::chosen_loops().name);
}

}  // namespace
}  // namespace dsline
