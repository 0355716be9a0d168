#include "base/crc32c.hpp"

#include <gtest/gtest.h>

#include <array>
#include <cstdint>
#include <cstring>
#include <random>
#include <string>
#include <vector>

namespace dsline::base {
namespace {

using Crc = std::uint32_t (*)(const void*, std::size_t, std::uint32_t) noexcept;

std::vector<std::uint8_t> random_bytes(std::size_t size, std::uint32_t seed) {
  std::mt19937 random(seed);
  std::vector<std::uint8_t> bytes(size);
  for (std::uint8_t& b : bytes) b = static_cast<std::uint8_t>(random());
  return bytes;
}

/// Bit by bit from the definition: shares nothing with the code under test.
std::uint32_t crc32c_by_definition(const std::vector<std::uint8_t>& bytes) {
  std::uint32_t r = 0xFFFFFFFF;
  for (std::uint8_t b : bytes) {
    r ^= b;
    for (int bit = 0; bit < 8; ++bit) r = (r & 1) != 0 ? (r >> 1) ^ 0x82F63B78 : r >> 1;
  }
  return ~r;
}

class Crc32c : public testing::TestWithParam<Crc> {};

INSTANTIATE_TEST_SUITE_P(Backends, Crc32c, testing::Values(&crc32c, &crc32c_table), [](const auto& backend) {
  return std::string(backend.index == 0 ? "chosen" : "table");
});

// RFC 3720, appendix B.4. The RFC prints the CRC's bytes in the order they are sent.
TEST_P(Crc32c, GivesTheVectorsOfRfc3720) {
  std::array<std::uint8_t, 32> bytes{};
  EXPECT_EQ(GetParam()(bytes.data(), 32, 0), 0x8A9136AAu);
  bytes.fill(0xFF);
  EXPECT_EQ(GetParam()(bytes.data(), 32, 0), 0x62A8AB43u);
  for (std::size_t i = 0; i < 32; ++i) bytes[i] = static_cast<std::uint8_t>(i);
  EXPECT_EQ(GetParam()(bytes.data(), 32, 0), 0x46DD794Eu);
  for (std::size_t i = 0; i < 32; ++i) bytes[i] = static_cast<std::uint8_t>(31 - i);
  EXPECT_EQ(GetParam()(bytes.data(), 32, 0), 0x113FDB5Cu);
  const std::array<std::uint8_t, 48> read_command{
      0x01, 0xC0, 0, 0,    0, 0, 0, 0,    0,    0, 0, 0, 0, 0, 0, 0, 0x14, 0, 0, 0, 0, 0, 0x04, 0,
      0,    0,    0, 0x14, 0, 0, 0, 0x18, 0x28, 0, 0, 0, 0, 0, 0, 0, 0x02, 0, 0, 0, 0, 0, 0,    0};
  EXPECT_EQ(GetParam()(read_command.data(), read_command.size(), 0), 0xD9963A56u);
}

TEST_P(Crc32c, GivesTheCheckValueOfTheDigits) { EXPECT_EQ(GetParam()("123456789", 9, 0), 0xE3069283u); }

TEST_P(Crc32c, OfNothingIsWhatItContinues) {
  EXPECT_EQ(GetParam()(nullptr, 0, 0), 0u);
  EXPECT_EQ(GetParam()("", 0, 0x12345678), 0x12345678u);
}

TEST_P(Crc32c, AgreesWithTheDefinitionAtEveryLength) {
  for (std::size_t size = 0; size <= 300; ++size) {
    std::vector<std::uint8_t> bytes = random_bytes(size, static_cast<std::uint32_t>(size));
    ASSERT_EQ(GetParam()(bytes.data(), size, 0), crc32c_by_definition(bytes)) << size;
  }
}

TEST_P(Crc32c, AgreesWithTheDefinitionAroundTheLanes) {
  for (std::size_t size : {767u, 768u, 769u, 1535u, 1536u, 12287u, 12288u, 12289u, 13056u, 25344u, 50000u}) {
    std::vector<std::uint8_t> bytes = random_bytes(size, static_cast<std::uint32_t>(size));
    EXPECT_EQ(GetParam()(bytes.data(), size, 0), crc32c_by_definition(bytes)) << size;
  }
}

TEST_P(Crc32c, ChainsAtEveryCut) {
  const std::vector<std::uint8_t> bytes = random_bytes(1600, 7);
  const std::uint32_t whole = GetParam()(bytes.data(), bytes.size(), 0);
  for (std::size_t cut = 0; cut <= bytes.size(); ++cut) {
    std::uint32_t first = GetParam()(bytes.data(), cut, 0);
    ASSERT_EQ(GetParam()(bytes.data() + cut, bytes.size() - cut, first), whole) << cut;
  }
}

TEST_P(Crc32c, SeesEverySingleFlippedBit) {
  std::vector<std::uint8_t> bytes = random_bytes(60, 3);
  const std::uint32_t whole = GetParam()(bytes.data(), bytes.size(), 0);
  for (std::size_t bit = 0; bit < bytes.size() * 8; ++bit) {
    bytes[bit / 8] ^= static_cast<std::uint8_t>(1u << (bit % 8));
    ASSERT_NE(GetParam()(bytes.data(), bytes.size(), 0), whole) << bit;
    bytes[bit / 8] ^= static_cast<std::uint8_t>(1u << (bit % 8));
  }
}

TEST(Crc32cHardware, AgreesWithTheTableAtEveryLengthAndAlignment) {
  if (!crc32c_hardware_available()) GTEST_SKIP() << "this processor has no CRC32C instruction";
  const std::vector<std::uint8_t> bytes = random_bytes(1024 + 16, 11);
  for (std::size_t alignment = 0; alignment < 16; ++alignment) {
    for (std::size_t size = 0; size <= 1024; ++size) {
      ASSERT_EQ(crc32c(bytes.data() + alignment, size), crc32c_table(bytes.data() + alignment, size))
          << size << " bytes at " << alignment;
    }
  }
}

TEST(Crc32cHardware, IsNamedByTheBackend) {
  EXPECT_EQ(std::string(crc32c_backend()) == "table", !crc32c_hardware_available());
#if defined(__x86_64__)
  EXPECT_TRUE(!crc32c_hardware_available() || std::string(crc32c_backend()) == "sse4.2");
#elif defined(__aarch64__)
  EXPECT_TRUE(!crc32c_hardware_available() || std::string(crc32c_backend()) == "armv8-crc");
#endif
}

}  // namespace
}  // namespace dsline::base
