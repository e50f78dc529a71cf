// Norms, gates, softmax and rotary positions against double precision.
#include "kernels/vector.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <numbers>

#include "base/random.h"
#include "kernels/implementation.h"
#include "kernels/portable_math.h"

namespace kvant::kernels {
namespace {

std::vector<float> Normals(size_t count, double size, Random* random) {
  std::vector<float> x(count);
  for (float& value : x) value = static_cast<float>(size * random->Normal());
  return x;
}

TEST(RmsNormTest, AgreesWithDoubleAndRowsAreIndependent) {
  Random random(41);
  for (const int width : {8, 31, 64, 1000}) {
    const auto columns = static_cast<size_t>(width);
    const std::vector<float> x = Normals(5 * columns, 3.0, &random);
    const std::vector<float> weight = Normals(columns, 1.0, &random);
    std::vector<float> all(x.size());
    RmsNorm(x.data(), weight.data(), 5, width, 1e-5F, all.data());
    for (size_t r = 0; r < 5; ++r) {
      double squares = 0.0;
      for (size_t c = 0; c < columns; ++c) {
        squares += std::pow(static_cast<double>(x[r * columns + c]), 2);
      }
      const double factor = 1.0 / std::sqrt(squares / width + 1e-5);
      for (size_t c = 0; c < columns; ++c) {
        const double expected = static_cast<double>(x[r * columns + c]) * factor * weight[c];
        EXPECT_NEAR(all[r * columns + c], expected, 2e-6 * (1.0 + std::fabs(expected)));
      }
      std::vector<float> in_place(x.begin() + static_cast<ptrdiff_t>(r * columns),
                                  x.begin() + static_cast<ptrdiff_t>((r + 1) * columns));
      RmsNorm(in_place.data(), weight.data(), 1, width, 1e-5F, in_place.data());
      for (size_t c = 0; c < columns; ++c) ASSERT_EQ(in_place[c], all[r * columns + c]);
    }
  }
}

TEST(SiluMultiplyTest, AgreesWithDouble) {
  std::vector<float> gate;
  for (float g = -120.0F; g <= 120.0F; g += 0.37F) gate.push_back(g);
  const std::vector<float> inputs = gate;
  const std::vector<float> up(gate.size(), 1.5F);
  SiluMultiply(gate.data(), up.data(), gate.size());
  for (size_t i = 0; i < gate.size(); ++i) {
    const double g = static_cast<double>(inputs[i]);
    const double expected = 1.5 * g / (1.0 + std::exp(-g));
    EXPECT_NEAR(gate[i], expected, 1e-6 * std::fabs(expected) + 1e-30) << g;
  }
}

TEST(SoftmaxTest, AgreesWithDouble) {
  Random random(42);
  for (const size_t count : {1U, 2U, 15U, 16U, 17U, 4099U}) {
    std::vector<float> x = Normals(count, 20.0, &random);
    if (count > 2) x[1] = -std::numeric_limits<float>::infinity();
    std::vector<double> expected;
    double max = static_cast<double>(x[0]);
    for (const float value : x) max = std::max(max, static_cast<double>(value));
    double sum = 0.0;
    for (const float value : x) {
      expected.push_back(std::exp(static_cast<double>(value) - max));
      sum += expected.back();
    }
    Softmax(x.data(), count);
    for (size_t i = 0; i < count; ++i) {
      // x - max carries half a unit in its last place, and exp makes that relative.
      EXPECT_NEAR(x[i], expected[i] / sum, 1e-5 * expected[i] / sum + 1e-30);
    }
  }
}

TEST(VectorTest, EveryImplementationGivesTheBitsOfTheReference) {
  Random random(43);
  const Implementation& reference = *Implementations().back();
  for (const Implementation* implementation : Implementations()) {
    if (!implementation->runs_here()) continue;
    for (const size_t count : {1U, 17U, 333U}) {
      const std::vector<float> x = Normals(count, 5.0, &random);
      const std::vector<float> y = Normals(count, 5.0, &random);
      std::vector<float> a = x;
      std::vector<float> b = x;
      reference.silu_multiply(a.data(), y.data(), count);
      implementation->silu_multiply(b.data(), y.data(), count);
      EXPECT_EQ(a, b) << implementation->name;
      reference.softmax(a.data(), count);
      implementation->softmax(b.data(), count);
      EXPECT_EQ(a, b) << implementation->name;
      reference.rms_norm(x.data(), y.data(), 1, static_cast<int>(count), 1e-6F, a.data());
      implementation->rms_norm(x.data(), y.data(), 1, static_cast<int>(count), 1e-6F, b.data());
      EXPECT_EQ(a, b) << implementation->name;
    }
  }
}

TEST(RopeTest, RotatesHalvesByPositionTimesFrequency) {
  Random random(44);
  const RopeTable table(64, 10000.0, {}, 300);
  const std::vector<float> x = Normals(2 * 64, 1.0, &random);
  for (const int position : {0, 1, 17, 299}) {
    std::vector<float> rotated = x;
    table.Apply(rotated.data(), 2, 64, position);
    for (size_t h = 0; h < 2; ++h) {
      for (size_t i = 0; i < 32; ++i) {
        const double angle = position * std::pow(10000.0, -2.0 * static_cast<double>(i) / 64.0);
        const double a = static_cast<double>(x[h * 64 + i]);
        const double b = static_cast<double>(x[h * 64 + 32 + i]);
        EXPECT_NEAR(rotated[h * 64 + i], a * std::cos(angle) - b * std::sin(angle), 1e-6);
        EXPECT_NEAR(rotated[h * 64 + 32 + i], b * std::cos(angle) + a * std::sin(angle), 1e-6);
      }
    }
    if (position == 0) {
      EXPECT_EQ(rotated, x);
    }
  }
}

TEST(PortableMath, IsThatOfTheLibraryAndTheSameBitsEverywhere) {
  Random random(47);
  for (int i = 0; i < 20000; ++i) {
    const double x = 30.0 * (2.0 * random.Unit() - 1.0);
    EXPECT_NEAR(PortableExp(x) / std::exp(x), 1.0, 0x1p-50);
    const double y = std::exp(x);
    EXPECT_NEAR(PortableLog(y), std::log(y), 0x1p-50 * std::max(1.0, std::fabs(x)));
    const double angle = std::ldexp(random.Unit(), static_cast<int>(random.Below(21)));
    const SineCosine of = PortableSineCosine(angle);
    EXPECT_NEAR(of.sine, std::sin(angle), 0x1p-50);
    EXPECT_NEAR(of.cosine, std::cos(angle), 0x1p-50);
  }
  EXPECT_EQ(PortableExp(0.0), 1.0);
  EXPECT_EQ(PortableLog(1.0), 0.0);
  EXPECT_EQ(PortableLog(10000.0), 0x1.26bb1bbb55516p+3);
  EXPECT_EQ(PortableExp(-9.21), 0x1.a392bc5c49422p-14);
  const SineCosine of = PortableSineCosine(12345.678);
  EXPECT_EQ(of.sine, -0x1.687d5890974a5p-1);
  EXPECT_EQ(of.cosine, 0x1.6b94c3bbe24b8p-1);
}

// DeepSeek's layout is the other one with its channels dealt out in turn.
TEST(RopeTest, InterleavedIsTheSameRotation) {
  Random random(46);
  const RopeTable table(16, 10000.0, {}, 100);
  const std::vector<float> halves = Normals(3 * 20, 1.0, &random);  // vectors stand 20 apart
  std::vector<float> pairs = halves;
  for (size_t h = 0; h < 3; ++h) {
    for (size_t i = 0; i < 16; ++i) pairs[h * 20 + i] = halves[h * 20 + i / 2 + (i % 2) * 8];
  }
  std::vector<float> expected = halves;
  table.Apply(expected.data(), 3, 20, 77);
  table.ApplyInterleaved(pairs.data(), 3, 20, 77);
  EXPECT_EQ(pairs, expected);
}

TEST(VectorTest, GeluIsTheTanhApproximation) {
  std::vector<float> gate;
  for (float x = -12.0F; x <= 12.0F; x += 0.037F) gate.push_back(x);
  const std::vector<float> x = gate;
  const std::vector<float> up(gate.size(), 2.0F);
  GeluTanhMultiply(gate.data(), up.data(), gate.size());
  for (size_t i = 0; i < x.size(); ++i) {
    const double u = std::sqrt(2.0 / std::numbers::pi) * (x[i] + 0.044715 * std::pow(x[i], 3));
    EXPECT_NEAR(gate[i], x[i] * (1.0 + std::tanh(u)), 2e-6 * (1.0 + std::fabs(x[i])));
  }
}

TEST(RopeTest, ScoresDependOnDistanceAlone) {
  Random random(45);
  const RopeTable table(128, 500000.0, {}, 2000);
  const std::vector<float> q = Normals(128, 1.0, &random);
  const std::vector<float> k = Normals(128, 1.0, &random);
  const auto score = [&](int q_position, int k_position) {
    std::vector<float> a = q;
    std::vector<float> b = k;
    table.Apply(a.data(), 1, 128, q_position);
    table.Apply(b.data(), 1, 128, k_position);
    double sum = 0.0;
    for (size_t c = 0; c < 128; ++c) sum += static_cast<double>(a[c]) * static_cast<double>(b[c]);
    return sum;
  };
  EXPECT_NEAR(score(30, 10), score(1520, 1500), 1e-4);
}

TEST(RopeTest, ScalingStretchesFrequencies) {
  const std::vector<double> plain = RopeFrequencies(128, 500000.0, {});
  EXPECT_EQ(plain[0], 1.0);

  RopeScaling linear;
  linear.kind = RopeScaling::Kind::kLinear;
  linear.factor = 4.0;
  const std::vector<double> stretched = RopeFrequencies(128, 500000.0, linear);
  for (size_t i = 0; i < plain.size(); ++i) EXPECT_DOUBLE_EQ(stretched[i], plain[i] / 4.0);

  // Llama 3.1: wavelengths below 8192 / 4 stay, above 8192 / 1 are stretched by 8.
  RopeScaling llama3;
  llama3.kind = RopeScaling::Kind::kLlama3;
  llama3.factor = 8.0;
  const std::vector<double> scaled = RopeFrequencies(128, 500000.0, llama3);
  for (size_t i = 0; i < plain.size(); ++i) {
    const double wavelength = 2.0 * std::numbers::pi / plain[i];
    if (wavelength < 2048.0) {
      EXPECT_DOUBLE_EQ(scaled[i], plain[i]);
    } else if (wavelength > 8192.0) {
      EXPECT_DOUBLE_EQ(scaled[i], plain[i] / 8.0);
    } else {
      const double smooth = (8192.0 / wavelength - 1.0) / 3.0;
      EXPECT_NEAR(scaled[i], (1.0 - smooth) * plain[i] / 8.0 + smooth * plain[i], 1e-15);
    }
  }
}

}  // namespace
}  // namespace kvant::kernels
