#include "frames/dtype_code.hpp"

#include <gtest/gtest.h>

#include <algorithm>
#include <iterator>
#include <optional>
#include <random>
#include <string>
#include <tuple>
#include <vector>

#include "frames/code_builder.hpp"

namespace dsline::frames {
namespace {

using testing::Field;
using testing::node;
using testing::raw;
using testing::structure;
using testing::subarray;

const std::string kFloat64 = node('f', 1, 8);

std::optional<std::uint64_t> validate(const std::string& code) {
  // A heap block of exactly this size, so that the address sanitizer sees a read behind it.
  std::vector<std::byte> bytes(code.size());
  for (std::size_t i = 0; i < code.size(); ++i) bytes[i] = static_cast<std::byte>(code[i]);
  return validate_dtype_code(bytes);
}

TEST(DtypeCode, AcceptsExactlyTheScalarSizesOfNumpy) {
  const std::vector<std::tuple<char, std::vector<std::uint32_t>>> table{
      {'b', {1}}, {'i', {1, 2, 4, 8}}, {'u', {1, 2, 4, 8}}, {'f', {2, 4, 8, 16}}, {'c', {8, 16, 32}}};
  for (const auto& [letter, sizes] : table) {
    for (std::uint32_t size = 0; size <= 40; ++size) {
      bool known = std::find(sizes.begin(), sizes.end(), size) != sizes.end();
      int order = size == 1 ? 0 : 1;
      EXPECT_EQ(validate(node(letter, order, size)),
                known ? std::optional<std::uint64_t>(size) : std::nullopt)
          << letter << size;
    }
  }
}

TEST(DtypeCode, AcceptsBothByteOrdersWhereThereIsOne) {
  for (char letter : {'i', 'u', 'f', 'U'}) {
    EXPECT_TRUE(validate(node(letter, 1, 8))) << letter;
    EXPECT_TRUE(validate(node(letter, 2, 8))) << letter;
    EXPECT_FALSE(validate(node(letter, 0, 8))) << letter;
    EXPECT_FALSE(validate(node(letter, 3, 8))) << letter;
  }
  EXPECT_FALSE(validate(node('i', 1, 1)));
  EXPECT_FALSE(validate(node('b', 1, 1)));
  EXPECT_FALSE(validate(node('S', 1, 8)));
  EXPECT_FALSE(validate(node('V', 2, 8)));
}

TEST(DtypeCode, AcceptsStringsAndVoidsOfAnySizeFromZero) {
  for (char letter : {'S', 'V'}) {
    EXPECT_EQ(validate(node(letter, 0, 0)), 0u);
    EXPECT_EQ(validate(node(letter, 0, 3)), 3u);
    EXPECT_EQ(validate(node(letter, 0, 0x7FFFFFFF)), 0x7FFFFFFFu);
    EXPECT_FALSE(validate(node(letter, 0, 0x80000000)));
  }
  EXPECT_EQ(validate(node('U', 1, 0)), 0u);
  EXPECT_EQ(validate(node('U', 1, 12)), 12u);
  EXPECT_FALSE(validate(node('U', 1, 13)));
}

TEST(DtypeCode, AcceptsDatesWithUnitAndMultiple) {
  for (char letter : {'M', 'm'}) {
    for (int unit = 0; unit <= 13; ++unit) EXPECT_EQ(validate(node(letter, 1, 1, unit)), 8u) << unit;
    EXPECT_FALSE(validate(node(letter, 1, 1, 14)));
    EXPECT_EQ(validate(node(letter, 2, 25, 7)), 8u);
    EXPECT_EQ(validate(node(letter, 2, 0x7FFFFFFF, 7)), 8u);
    EXPECT_FALSE(validate(node(letter, 2, 0x80000000, 7)));
    EXPECT_FALSE(validate(node(letter, 1, 0, 7)));
    EXPECT_FALSE(validate(node(letter, 0, 1, 7)));
    EXPECT_FALSE(validate(node(letter, 1, 2, 0))) << "generic has no multiple";
  }
}

TEST(DtypeCode, RefusesObjectsAndUnknownLetters) {
  for (int letter = 0; letter < 256; ++letter) {
    if (std::string("biufcSUVMmar").find(static_cast<char>(letter)) != std::string::npos) continue;
    for (std::uint32_t size : {0u, 1u, 8u, 16u}) {
      EXPECT_FALSE(validate(node(static_cast<char>(letter), 0, size))) << letter;
      EXPECT_FALSE(validate(node(static_cast<char>(letter), 1, size))) << letter;
    }
  }
}

TEST(DtypeCode, RefusesEveryPrefixAndEverySuffix) {
  const std::string codes[] = {
      kFloat64, subarray({2, 3}, kFloat64),
      structure(16, {{0, "a", kFloat64, "title", true}, {8, "b", subarray({2}, node('i', 1, 4))}})};
  for (const std::string& code : codes) {
    ASSERT_TRUE(validate(code));
    for (std::size_t size = 0; size < code.size(); ++size)
      EXPECT_FALSE(validate(code.substr(0, size))) << size;
    EXPECT_FALSE(validate(code + '\0'));
    EXPECT_FALSE(validate(code + code));
  }
}

TEST(DtypeCode, RefusesReservedBytesThatAreNotZero) {
  EXPECT_FALSE(validate(node('f', 1, 8, 0, 1)));
  EXPECT_FALSE(validate(node('f', 1, 8, 1)));
  EXPECT_FALSE(validate(node('S', 0, 8, 1)));
  std::string code = subarray({2}, kFloat64);
  code[4] = 1;
  EXPECT_FALSE(validate(code));
}

TEST(DtypeCode, MultipliesOutSubarrays) {
  EXPECT_EQ(validate(subarray({2, 3}, kFloat64)), 48u);
  EXPECT_EQ(validate(subarray({2, 0}, kFloat64)), 0u);
  EXPECT_EQ(validate(subarray({5}, node('S', 0, 0))), 0u);
  EXPECT_EQ(validate(subarray({2}, subarray({3}, kFloat64))), 48u);
  EXPECT_FALSE(validate(subarray({}, kFloat64)));
  EXPECT_TRUE(validate(subarray(std::vector<std::uint32_t>(32, 1), kFloat64)));
  EXPECT_FALSE(validate(subarray(std::vector<std::uint32_t>(33, 1), kFloat64)));
}

TEST(DtypeCode, RefusesSubarraysWhoseSizeDoesNotFitIntoACInt) {
  EXPECT_EQ(validate(subarray({0x7FFFFFFF}, node('b', 0, 1))), 0x7FFFFFFFu);
  EXPECT_FALSE(validate(subarray({0x10000000}, kFloat64)));
  EXPECT_FALSE(validate(subarray({0x10000, 0x10000, 0x10000, 0x10000}, node('b', 0, 1))));
  EXPECT_FALSE(validate(subarray({0x10000, 0x10000, 0}, node('b', 0, 1)))) << "0 does not excuse the others";
  EXPECT_FALSE(validate(subarray({0x10000}, subarray({0x10000}, node('b', 0, 1)))));
  EXPECT_FALSE(validate(subarray({0xFFFFFFFF}, node('b', 0, 1))));
}

TEST(DtypeCode, AcceptsStructures) {
  EXPECT_EQ(validate(structure(0, {})), 0u);
  EXPECT_EQ(validate(structure(8, {})), 8u);
  EXPECT_EQ(validate(structure(24, {{0, "a", kFloat64}, {12, "b", node('i', 1, 4)}})), 24u);
  EXPECT_EQ(validate(structure(8, {{0, "whole", kFloat64}, {4, "half", node('u', 1, 4)}})), 8u)
      << "fields may overlap";
  EXPECT_EQ(validate(structure(8, {{0, "", kFloat64}})), 8u);
  EXPECT_EQ(validate(structure(8, {{8, "end", node('V', 0, 0)}})), 8u);
  for (int detail = 0; detail <= 3; ++detail)
    EXPECT_TRUE(validate(structure(8, {{0, "a", kFloat64}}, detail)));
  EXPECT_FALSE(validate(structure(8, {{0, "a", kFloat64}}, 4)));
}

TEST(DtypeCode, RefusesFieldsThatReachOutOfTheStructure) {
  EXPECT_TRUE(validate(structure(16, {{8, "a", kFloat64}})));
  EXPECT_FALSE(validate(structure(16, {{9, "a", kFloat64}})));
  EXPECT_FALSE(validate(structure(7, {{0, "a", kFloat64}})));
  EXPECT_FALSE(validate(structure(16, {{0xFFFFFFFF, "a", kFloat64}})));
  EXPECT_FALSE(validate(structure(16, {{0xFFFFFFF8, "a", kFloat64}})));
  EXPECT_FALSE(validate(structure(8, {{9, "a", node('V', 0, 0)}})));
  EXPECT_FALSE(validate(structure(16, {{0, "a", structure(24, {{16, "b", kFloat64}})}})));
}

TEST(DtypeCode, RefusesNamesAndTitlesThatAreThereTwice) {
  const std::string one = node('b', 0, 1);
  EXPECT_TRUE(validate(structure(2, {{0, "a", one, "t", true}, {1, "b", one, "u", true}})));
  EXPECT_FALSE(validate(structure(2, {{0, "a", one}, {1, "a", one}})));
  EXPECT_FALSE(validate(structure(2, {{0, "a", one, "t", true}, {1, "b", one, "t", true}})));
  EXPECT_FALSE(validate(structure(2, {{0, "a", one, "b", true}, {1, "b", one}})));
  EXPECT_FALSE(validate(structure(1, {{0, "a", one, "a", true}})));
  EXPECT_TRUE(validate(structure(2, {{0, "a", one}, {1, "b", structure(1, {{0, "a", one}})}})))
      << "other levels may";
}

TEST(DtypeCode, RefusesNamesThatAreNotUtf8) {
  const std::string one = node('b', 0, 1);
  for (const char* name :
       {"a", "\xC3\xA9", "\xE2\x82\xAC", "\xF0\x9F\x98\x80", "\xEF\xBF\xBF", "\xF4\x8F\xBF\xBF"}) {
    EXPECT_TRUE(validate(structure(1, {{0, name, one}}))) << name;
    EXPECT_TRUE(validate(structure(1, {{0, "x", one, name, true}}))) << name;
  }
  for (const char* name : {"\x80", "\xC3", "\xC0\x80", "\xC1\xBF", "\xE0\x9F\xBF", "\xE2\x82", "\xED\xA0\x80",
                           "\xF0\x8F\xBF\xBF", "\xF4\x90\x80\x80", "\xF5\x80\x80\x80", "\xC3z", "\xE2\x82z",
                           "\xF0\x9F\x98z", "\xFF"}) {
    EXPECT_FALSE(validate(structure(1, {{0, name, one}}))) << name;
    EXPECT_FALSE(validate(structure(1, {{0, "x", one, name, true}}))) << name;
  }
}

TEST(DtypeCode, BoundsTheDepth) {
  std::string code = kFloat64;
  for (int depth = 2; depth <= kMaxDtypeDepth; ++depth) code = structure(8, {{0, "a", code}});
  EXPECT_EQ(validate(code), 8u);
  EXPECT_FALSE(validate(structure(8, {{0, "a", code}})));
  EXPECT_FALSE(validate(subarray({1}, code)));
}

TEST(DtypeCode, BoundsTheNumberOfFieldsInAll) {
  auto wide = [](std::uint32_t fields) {
    std::vector<Field> list;
    for (std::uint32_t i = 0; i < fields; ++i) list.push_back({i, "f" + std::to_string(i), node('b', 0, 1)});
    return structure(fields, list);
  };
  EXPECT_EQ(validate(wide(1024)), 1024u);
  EXPECT_FALSE(validate(wide(1025)));
  EXPECT_TRUE(validate(structure(1024, {{0, "a", wide(511)}, {511, "b", wide(511)}})));
  EXPECT_FALSE(validate(structure(1024, {{0, "a", wide(511)}, {511, "b", wide(512)}})));
}

TEST(DtypeCode, RefusesAForgedNumberOfFields) {
  EXPECT_FALSE(validate(node('r', 0, 8) + raw(0xFFFFFFFFu)));
  EXPECT_FALSE(validate(node('r', 0, 8) + raw(1024u)));
  EXPECT_FALSE(validate(node('r', 0, 8) + raw(1u) + raw(0u) + raw(0xFFFFFFFEu) + raw(kNoTitle)));
}

TEST(DtypeCode, SurvivesMutationWithoutReadingOutOfBounds) {
  std::mt19937 random(20240711);
  const std::string seeds[] = {
      structure(40, {{0, "a", kFloat64, "title", true},
                     {8, "b", subarray({2, 2}, node('i', 2, 4))},
                     {24, "c", structure(16, {{0, "x", node('c', 1, 16)}}, kAligned)}}),
      subarray({3}, subarray({2}, node('M', 1, 25, 7))), node('S', 0, 5)};
  for (int round = 0; round < 20000; ++round) {
    std::string code = seeds[random() % std::size(seeds)];
    for (auto n = 1 + random() % 4; n != 0; --n) {
      code[random() % code.size()] = static_cast<char>(random() % 3 == 0 ? random() : random() % 4);
    }
    if (random() % 8 == 0) code.resize(random() % (code.size() + 1));
    std::optional<std::uint64_t> itemsize = validate(code);
    if (itemsize) {
      ASSERT_LE(*itemsize, kMaxDtypeItemsize);
    }
  }
}

}  // namespace
}  // namespace dsline::frames
