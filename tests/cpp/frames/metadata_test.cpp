#include "dsline/metadata.hpp"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <functional>
#include <iterator>
#include <limits>
#include <random>
#include <string>
#include <vector>

#include "frames/code_builder.hpp"

namespace dsline::frames {
namespace {

using testing::node;
using testing::raw;
using testing::structure;

constexpr std::int64_t kMax = std::numeric_limits<std::int64_t>::max();
const std::string kFloat32 = node('f', 1, 4);

enum Type : std::uint16_t { kDtype = 1, kShape, kStrides, kColumns, kEncoding, kTag, kUnknown };

std::string entry(std::uint16_t type, const std::string& value) {
  std::string bytes =
      raw(type) + raw(std::uint16_t{0}) + raw(static_cast<std::uint32_t>(value.size())) + value;
  bytes.resize((bytes.size() + 7) / 8 * 8, '\0');
  return bytes;
}

std::string integers(const std::vector<std::int64_t>& values) {
  std::string bytes;
  for (std::int64_t value : values) bytes += raw(value);
  return bytes;
}

std::string tag(const std::string& key, int kind, const std::string& value) {
  std::string bytes;
  bytes += static_cast<char>(key.size());
  bytes += static_cast<char>(kind);
  return entry(kTag, bytes + key + value);
}

std::string array(const std::string& dtype, const std::vector<std::int64_t>& shape) {
  return entry(kDtype, dtype) + entry(kShape, integers(shape));
}

struct Parsed {
  bool ok = false;
  Metadata metadata;
  std::string why;
};

Parsed parse(const std::string& bytes) {
  // A heap block of exactly this size, so that the address sanitizer sees a read behind it.
  std::vector<char> block(bytes.begin(), bytes.end());
  Parsed parsed;
  parsed.ok = parse_metadata(block.data(), block.size(), parsed.metadata, parsed.why);
  return parsed;
}

bool refused(const std::string& bytes) {
  Parsed parsed = parse(bytes);
  return !parsed.ok && !parsed.why.empty();
}

ErrorCode code_of(const std::function<void()>& call) {
  try {
    call();
  } catch (const Error& error) {
    EXPECT_FALSE(std::string(error.what()).empty());
    return error.code();
  }
  return ErrorCode::Internal;
}

MetadataBuilder full_builder() {
  MetadataBuilder builder;
  builder.add_dtype(structure(12, {{0, "x", kFloat32, "t", true}, {4, "y", node('M', 1, 1, 10)}}));
  const std::int64_t shape[] = {2, 3, 5};
  const std::int64_t strides[] = {12, 24, 72};
  builder.add_shape(shape, 3);
  builder.add_strides(strides, 3);
  builder.add_columns({"time", "", "\xC3\xA9"});
  builder.add_encoding("rgb8");
  builder.add_tag_none("nothing");
  builder.add_tag_bool("yes", true);
  builder.add_tag_bool("no", false);
  builder.add_tag_int("least", std::numeric_limits<std::int64_t>::min());
  builder.add_tag_float("half", 0.5);
  builder.add_tag_str("camera", "front \xE2\x82\xAC");
  builder.add_tag_bytes("blob", std::string("\0\xFF\x80", 3));
  return builder;
}

TEST(Metadata, ReadsWhatTheBuilderWrote) {
  Parsed parsed = parse(full_builder().bytes());
  ASSERT_TRUE(parsed.ok) << parsed.why;
  const Metadata& m = parsed.metadata;
  EXPECT_EQ(m.dtype_code, structure(12, {{0, "x", kFloat32, "t", true}, {4, "y", node('M', 1, 1, 10)}}));
  EXPECT_EQ(m.itemsize, 12u);
  EXPECT_TRUE(m.has_shape);
  EXPECT_EQ(m.shape, (std::vector<std::int64_t>{2, 3, 5}));
  EXPECT_TRUE(m.fortran);
  EXPECT_EQ(m.strides, (std::vector<std::int64_t>{12, 24, 72}));
  EXPECT_TRUE(m.has_columns);
  EXPECT_EQ(m.columns, (std::vector<std::string>{"time", "", "\xC3\xA9"}));
  EXPECT_TRUE(m.has_encoding);
  EXPECT_EQ(m.encoding, "rgb8");
  ASSERT_EQ(m.tags.size(), 7u);
  EXPECT_EQ(m.tags[0].key, "nothing");
  EXPECT_EQ(m.tags[0].kind, static_cast<int>(TagKind::None));
  EXPECT_EQ(m.tags[1].i, 1);
  EXPECT_EQ(m.tags[1].kind, static_cast<int>(TagKind::Bool));
  EXPECT_EQ(m.tags[2].i, 0);
  EXPECT_EQ(m.tags[3].i, std::numeric_limits<std::int64_t>::min());
  EXPECT_EQ(m.tags[4].f, 0.5);
  EXPECT_EQ(m.tags[5].s, "front \xE2\x82\xAC");
  EXPECT_EQ(m.tags[6].s, std::string("\0\xFF\x80", 3));
  EXPECT_EQ(m.tags[6].kind, static_cast<int>(TagKind::Bytes));
}

TEST(Metadata, OfNothingIsNoArrayAndNoTags) {
  Metadata metadata;
  std::string why = "left over";
  ASSERT_TRUE(parse_metadata(nullptr, 0, metadata, why));
  EXPECT_TRUE(why.empty());
  EXPECT_TRUE(metadata.dtype_code.empty());
  EXPECT_FALSE(metadata.has_shape);
  std::uint64_t bytes = 0;
  EXPECT_FALSE(array_bytes(metadata, bytes));
}

TEST(Metadata, ForgetsWhatTheStructHeldBefore) {
  Parsed parsed = parse(full_builder().bytes());
  ASSERT_TRUE(parse_metadata("", 0, parsed.metadata, parsed.why));
  EXPECT_TRUE(parsed.metadata.tags.empty());
  EXPECT_TRUE(parsed.metadata.shape.empty());
  EXPECT_TRUE(parsed.metadata.columns.empty());
  EXPECT_FALSE(parsed.metadata.fortran);
  EXPECT_EQ(parsed.metadata.itemsize, 0u);
}

TEST(Metadata, KeepsTheOrderOfEntriesFree) {
  EXPECT_TRUE(parse(tag("a", 0, "") + entry(kShape, integers({2})) + entry(kDtype, kFloat32)).ok);
}

TEST(Metadata, SkipsEntriesOfUnknownTypes) {
  Parsed parsed = parse(entry(0, "x") + array(kFloat32, {2}) + entry(kUnknown, "whatever") +
                        entry(0xFFFF, "") + entry(kUnknown, "again") + tag("a", 2, raw(std::int64_t{7})));
  ASSERT_TRUE(parsed.ok) << parsed.why;
  EXPECT_EQ(parsed.metadata.shape, std::vector<std::int64_t>{2});
  ASSERT_EQ(parsed.metadata.tags.size(), 1u);
  EXPECT_EQ(parsed.metadata.tags[0].i, 7);
}

TEST(Metadata, RefusesEveryPrefixThatCutsAnEntry) {
  const std::string bytes = full_builder().bytes();
  std::vector<std::size_t> borders;
  for (std::size_t at = 0; at < bytes.size();) {
    borders.push_back(at);
    std::uint32_t length = 0;
    std::memcpy(&length, bytes.data() + at + 4, 4);
    at += 8 + (length + 7) / 8 * 8;
  }
  for (std::size_t size = 1; size < bytes.size(); ++size) {
    if (std::find(borders.begin(), borders.end(), size) != borders.end()) continue;
    EXPECT_TRUE(refused(bytes.substr(0, size))) << size;
  }
}

TEST(Metadata, RefusesLengthsThatReachOut) {
  for (std::uint32_t length : {1u, 8u, 0x7FFFFFFFu, 0xFFFFFFF8u, 0xFFFFFFFFu}) {
    EXPECT_TRUE(refused(raw(std::uint16_t{kUnknown}) + raw(std::uint16_t{0}) + raw(length))) << length;
  }
}

TEST(Metadata, RefusesReservedBytesAndPaddingThatAreNotZero) {
  std::string bytes = entry(kEncoding, "abc");
  ASSERT_TRUE(parse(bytes).ok);
  for (std::size_t at : {2u, 3u, 11u, 15u}) {
    std::string wrong = bytes;
    wrong[at] = 1;
    EXPECT_TRUE(refused(wrong)) << at;
  }
}

TEST(Metadata, RefusesEntriesTwiceThatMayOccurOnce) {
  const std::string layout = array(kFloat32, {2, 3});
  const std::string strides = entry(kStrides, integers({4, 8}));
  ASSERT_TRUE(parse(layout + strides).ok);
  EXPECT_TRUE(refused(layout + entry(kDtype, kFloat32)));
  EXPECT_TRUE(refused(layout + entry(kShape, integers({2, 3}))));
  EXPECT_TRUE(refused(layout + strides + strides));
  EXPECT_TRUE(refused(entry(kEncoding, "") + entry(kEncoding, "")));
  EXPECT_TRUE(refused(entry(kColumns, raw(0u)) + entry(kColumns, raw(0u))));
}

TEST(Metadata, RefusesTheSameTagTwice) {
  EXPECT_TRUE(parse(tag("a", 0, "") + tag("b", 0, "")).ok);
  EXPECT_TRUE(refused(tag("a", 0, "") + tag("a", 1, std::string(1, '\0'))));
}

TEST(Metadata, BoundsTheNumberOfEntries) {
  std::string user;
  for (int i = 0; i < 64; ++i) user += tag("k" + std::to_string(i), 0, "");
  EXPECT_TRUE(parse(user).ok);
  EXPECT_TRUE(parse(array(kFloat32, {2, 3}) + entry(kStrides, integers({4, 8})) + user).ok);
  EXPECT_TRUE(refused(user + tag("more", 0, "")));
  EXPECT_TRUE(refused(user + entry(kEncoding, "")));
  std::string unknown;
  for (std::size_t i = 0; i < kMaxMetadataEntries; ++i) unknown += entry(kUnknown, "");
  EXPECT_TRUE(parse(unknown).ok);
  EXPECT_TRUE(refused(unknown + entry(kUnknown, "")));
}

TEST(Metadata, BoundsTheBytesOfTheWhole) {
  EXPECT_TRUE(parse(tag("k", 5, std::string(65536 - 8 - 3, 'x'))).ok);
  EXPECT_TRUE(refused(tag("k", 5, std::string(65536 - 8 - 2, 'x'))));
}

TEST(Metadata, NeedsDtypeAndShapeTogether) {
  EXPECT_TRUE(refused(entry(kDtype, kFloat32)));
  EXPECT_TRUE(refused(entry(kShape, integers({2}))));
  EXPECT_TRUE(refused(entry(kStrides, "")));
  EXPECT_TRUE(refused(entry(kShape, "") + entry(kStrides, "")));
}

TEST(Metadata, RefusesAMalformedDtype) {
  EXPECT_TRUE(refused(array("", {2})));
  EXPECT_TRUE(refused(array(node('O', 0, 8), {2})));
  EXPECT_TRUE(refused(array(kFloat32 + kFloat32, {2})));
}

TEST(Metadata, RefusesShapesThatNoArrayCanHave) {
  EXPECT_TRUE(parse(array(kFloat32, {})).ok);
  EXPECT_TRUE(parse(array(kFloat32, {0})).ok);
  EXPECT_TRUE(parse(array(kFloat32, {kMax / 4})).ok);
  EXPECT_TRUE(parse(array(kFloat32, std::vector<std::int64_t>(64, 1))).ok);
  EXPECT_TRUE(refused(array(kFloat32, std::vector<std::int64_t>(65, 1))));
  EXPECT_TRUE(refused(array(kFloat32, {-1})));
  EXPECT_TRUE(refused(array(kFloat32, {std::numeric_limits<std::int64_t>::min()})));
  EXPECT_TRUE(refused(array(kFloat32, {kMax / 4 + 1})));
  EXPECT_TRUE(refused(array(kFloat32, {1ll << 32, 1ll << 32, 1})));
  EXPECT_TRUE(refused(array(kFloat32, {0, 1ll << 32, 1ll << 32})));
  EXPECT_TRUE(refused(array(kFloat32, {-1, 0})));
  EXPECT_TRUE(refused(array(node('V', 0, 0), {1ll << 32, 1ll << 32})));
  EXPECT_TRUE(refused(entry(kDtype, kFloat32) + entry(kShape, std::string(12, '\0'))));
}

TEST(Metadata, CountsTheBytesOfTheArray) {
  auto bytes_of = [](const std::string& dtype, const std::vector<std::int64_t>& shape) {
    Parsed parsed = parse(array(dtype, shape));
    std::uint64_t bytes = 12345;
    EXPECT_TRUE(parsed.ok && array_bytes(parsed.metadata, bytes));
    return bytes;
  };
  EXPECT_EQ(bytes_of(kFloat32, {}), 4u);
  EXPECT_EQ(bytes_of(kFloat32, {2, 3}), 24u);
  EXPECT_EQ(bytes_of(kFloat32, {2, 0, 3}), 0u);
  EXPECT_EQ(bytes_of(node('S', 0, 0), {7}), 0u);
  EXPECT_EQ(bytes_of(node('S', 0, 0), {}), 0u);
  EXPECT_EQ(bytes_of(kFloat32, {kMax / 4}), static_cast<std::uint64_t>(kMax - 3));
}

TEST(Metadata, AcceptsOnlyTheStridesOfFortranOrder) {
  const std::string layout = array(kFloat32, {2, 3, 5});
  auto strides = [](const std::vector<std::int64_t>& values) { return entry(kStrides, integers(values)); };
  EXPECT_TRUE(parse(layout + strides({4, 8, 24})).metadata.fortran);
  EXPECT_FALSE(parse(layout).metadata.fortran);
  EXPECT_TRUE(refused(layout + strides({60, 20, 4})));
  EXPECT_TRUE(refused(layout + strides({4, 8, 25})));
  EXPECT_TRUE(refused(layout + strides({-4, 8, 24})));
  EXPECT_TRUE(refused(layout + strides({4, 8})));
  EXPECT_TRUE(refused(layout + strides({4, 8, 24, 120})));
  EXPECT_TRUE(refused(layout + strides({})));
  EXPECT_TRUE(refused(layout + entry(kStrides, std::string(23, '\0'))));
}

TEST(Metadata, RefusesMalformedColumns) {
  EXPECT_TRUE(parse(entry(kColumns, raw(0u))).metadata.has_columns);
  EXPECT_TRUE(parse(entry(kColumns, raw(1u) + raw(1u) + "a")).ok);
  EXPECT_TRUE(refused(entry(kColumns, "")));
  EXPECT_TRUE(refused(entry(kColumns, raw(1u))));
  EXPECT_TRUE(refused(entry(kColumns, raw(0xFFFFFFFFu))));
  EXPECT_TRUE(refused(entry(kColumns, raw(1u) + raw(2u) + "a")));
  EXPECT_TRUE(refused(entry(kColumns, raw(1u) + raw(0xFFFFFFFFu) + "a")));
  EXPECT_TRUE(refused(entry(kColumns, raw(2u) + raw(4u) + "abcd")));
  EXPECT_TRUE(refused(entry(kColumns, raw(1u) + raw(1u) + "ab")));
  EXPECT_TRUE(refused(entry(kColumns, raw(1u) + raw(1u) + "\xFF")));
}

TEST(Metadata, RefusesMalformedTags) {
  EXPECT_TRUE(parse(tag(std::string(64, 'k'), 0, "")).ok);
  EXPECT_TRUE(refused(tag(std::string(65, 'k'), 0, "")));
  EXPECT_TRUE(refused(tag("", 0, "")));
  EXPECT_TRUE(refused(tag("\xC3", 0, "")));
  EXPECT_TRUE(refused(tag("columns", 0, "")));
  EXPECT_TRUE(refused(tag("encoding", 0, "")));
  EXPECT_TRUE(refused(entry(kTag, "")));
  EXPECT_TRUE(refused(entry(kTag, "\1")));
  EXPECT_TRUE(refused(entry(kTag, std::string("\5\0ab", 4))));
  EXPECT_TRUE(refused(tag("a", 0, "x")));
  EXPECT_TRUE(refused(tag("a", 1, "")));
  EXPECT_TRUE(refused(tag("a", 1, "\2")));
  EXPECT_TRUE(refused(tag("a", 1, "\1\1")));
  EXPECT_TRUE(refused(tag("a", 2, std::string(7, 'x'))));
  EXPECT_TRUE(refused(tag("a", 2, std::string(9, 'x'))));
  EXPECT_TRUE(refused(tag("a", 3, std::string(4, 'x'))));
  EXPECT_TRUE(refused(tag("a", 4, "\xED\xA0\x80")));
  EXPECT_TRUE(refused(tag("a", 6, "")));
  EXPECT_TRUE(refused(tag("a", 255, "")));
  EXPECT_TRUE(refused(entry(kEncoding, "\xFF")));
}

TEST(Metadata, CarriesEveryFloatBitForBit) {
  for (double value : {0.0, -0.0, 1e308, 5e-324, static_cast<double>(INFINITY), static_cast<double>(NAN)}) {
    MetadataBuilder builder;
    builder.add_tag_float("f", value);
    Parsed parsed = parse(builder.bytes());
    ASSERT_TRUE(parsed.ok);
    EXPECT_EQ(std::memcmp(&parsed.metadata.tags[0].f, &value, sizeof value), 0) << value;
  }
}

TEST(MetadataBuilder, RefusesWhatAReaderWouldRefuse) {
  const std::int64_t dims[65] = {};
  const std::int64_t negative[] = {-1};
  const std::int64_t large[] = {1ll << 40, 1ll << 40};
  const std::int64_t two[] = {2, 3};
  const std::vector<std::function<void(MetadataBuilder&)>> calls{
      [](auto& b) { b.add_dtype(""); },
      [](auto& b) { b.add_dtype(node('O', 0, 8)); },
      [](auto& b) {
        b.add_dtype(kFloat32);
        b.add_dtype(kFloat32);
      },
      [&](auto& b) { b.add_shape(two, 2); },
      [&](auto& b) {
        b.add_dtype(kFloat32);
        b.add_shape(dims, 65);
      },
      [&](auto& b) {
        b.add_dtype(kFloat32);
        b.add_shape(negative, 1);
      },
      [&](auto& b) {
        b.add_dtype(kFloat32);
        b.add_shape(large, 2);
      },
      [&](auto& b) { b.add_strides(two, 2); },
      [&](auto& b) {
        b.add_dtype(kFloat32);
        b.add_shape(two, 2);
        b.add_strides(two, 2);
      },
      [&](auto& b) {
        b.add_dtype(kFloat32);
        b.add_shape(two, 2);
        b.add_strides(two, 1);
      },
      [](auto& b) { b.add_columns({"\xFF"}); },
      [](auto& b) {
        b.add_columns({});
        b.add_columns({});
      },
      [](auto& b) { b.add_encoding("\xFF"); },
      [](auto& b) { b.add_tag_none(""); },
      [](auto& b) { b.add_tag_none(std::string(65, 'k')); },
      [](auto& b) { b.add_tag_none("\xFF"); },
      [](auto& b) { b.add_tag_none("columns"); },
      [](auto& b) { b.add_tag_int("encoding", 1); },
      [](auto& b) {
        b.add_tag_none("a");
        b.add_tag_int("a", 1);
      },
      [](auto& b) { b.add_tag_str("a", "\xFF"); },
      [](auto& b) {
        for (int i = 0; i < 65; ++i) b.add_tag_none("k" + std::to_string(i));
      },
  };
  for (std::size_t i = 0; i < calls.size(); ++i) {
    MetadataBuilder builder;
    EXPECT_EQ(code_of([&] { calls[i](builder); }), ErrorCode::InvalidArgument) << "call " << i;
    EXPECT_EQ(builder.bytes().size() % 8, 0u);
  }
}

TEST(MetadataBuilder, SaysHowManyBytesAreTooMany) {
  MetadataBuilder builder;
  builder.add_tag_bytes("k", std::string(65536 - 8 - 3, 'x'));
  EXPECT_EQ(builder.bytes().size(), 65536u);
  EXPECT_EQ(code_of([&] { builder.add_tag_none("one"); }), ErrorCode::MessageTooLarge);
  MetadataBuilder columns;
  EXPECT_EQ(code_of([&] { columns.add_columns({std::string(65536, 'x')}); }), ErrorCode::MessageTooLarge);
  try {
    builder.add_tag_none("one");
  } catch (const Error& error) {
    EXPECT_NE(std::string(error.what()).find("65552"), std::string::npos) << error.what();
    EXPECT_NE(std::string(error.what()).find("65536"), std::string::npos) << error.what();
  }
}

TEST(MetadataBuilder, IsUnchangedByACallThatThrows) {
  MetadataBuilder builder = full_builder();
  const std::string before = builder.bytes();
  EXPECT_THROW(builder.add_tag_none("camera"), Error);
  EXPECT_THROW(builder.add_tag_bytes("big", std::string(70000, 'x')), Error);
  EXPECT_EQ(builder.bytes(), before);
  builder.add_tag_none("big");
  EXPECT_TRUE(parse(builder.bytes()).ok);
}

TEST(SchemaHash, IsFnv1aAndZeroOnlyForNothing) {
  EXPECT_EQ(schema_hash(nullptr, 0), 0u);
  EXPECT_EQ(schema_hash("a", 1), 0xAF63DC4C8601EC8Cu);
  EXPECT_EQ(schema_hash("foobar", 6), 0x85944171F73967E8u);
  const std::string first = array(kFloat32, {2, 3});
  const std::string second = array(kFloat32, {3, 2});
  EXPECT_NE(schema_hash(first.data(), first.size()), schema_hash(second.data(), second.size()));
}

TEST(MetadataFuzz, NeverAcceptsLengthsOutOfBoundsNorReadsOutOfBounds) {
  std::mt19937 random(19960412);
  const std::string seeds[] = {full_builder().bytes(), array(kFloat32, {1080, 1920, 3}),
                               array(node('V', 0, 0), {}) + tag("a", 4, "text") + entry(kUnknown, "skip me"),
                               entry(kColumns, raw(2u) + raw(1u) + "a" + raw(1u) + "b")};
  const std::uint32_t interesting[] = {0,  1,          7,          8,          63,        64,
                                       65, 0x7FFFFFFF, 0x80000000, 0xFFFFFFF8, 0xFFFFFFFF};
  int accepted = 0;
  int refusals = 0;
  for (int round = 0; round < 40000; ++round) {
    std::string bytes = seeds[random() % std::size(seeds)];
    for (auto n = 1 + random() % 3; n != 0 && !bytes.empty(); --n) {
      const std::size_t at = random() % bytes.size();
      switch (random() % 6) {
        case 0:
          bytes[at] = static_cast<char>(random());
          break;
        case 1:
          bytes[at] ^= static_cast<char>(1u << (random() % 8));
          break;
        case 2:
          if (at + 4 <= bytes.size())
            std::memcpy(&bytes[at], &interesting[random() % std::size(interesting)], 4);
          break;
        case 3:
          bytes.resize(at);
          break;
        case 4:
          bytes.insert(at / 8 * 8, bytes.substr(random() % bytes.size() / 8 * 8, 8 * (1 + random() % 4)));
          break;
        default:
          bytes.erase(at / 8 * 8, 8);
          break;
      }
    }
    Parsed parsed = parse(bytes);
    if (!parsed.ok) {
      ++refusals;
      ASSERT_FALSE(parsed.why.empty());
      continue;
    }
    ++accepted;
    const Metadata& m = parsed.metadata;
    ASSERT_LE(m.shape.size(), kMaxDims);
    ASSERT_EQ(m.has_shape, !m.dtype_code.empty());
    ASSERT_EQ(m.strides.size(), m.fortran ? m.shape.size() : 0);
    ASSERT_LE(m.tags.size(), kMaxUserEntries);
    std::size_t text = m.dtype_code.size() + m.encoding.size();
    for (const std::string& name : m.columns) text += name.size();
    for (const Tag& t : m.tags) text += t.key.size() + t.s.size();
    ASSERT_LE(text, bytes.size());
    if (m.has_shape) {
      std::uint64_t size = 0;
      ASSERT_TRUE(array_bytes(m, size));
      unsigned __int128 product = m.itemsize;
      for (std::int64_t dim : m.shape) {
        ASSERT_GE(dim, 0);
        product *= static_cast<std::uint64_t>(dim);
      }
      ASSERT_TRUE(product == size && size <= static_cast<std::uint64_t>(kMax));
    }
  }
  // Both outcomes must be common, or the mutations test nothing.
  EXPECT_GT(accepted, 1000);
  EXPECT_GT(refusals, 1000);
}

}  // namespace
}  // namespace dsline::frames
