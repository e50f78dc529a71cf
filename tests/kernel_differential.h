// Bytes to a case of a kernel, which every implementation that runs here computes: all must give
// the same bits, and what they give must be as near to double precision as the kernel says. What
// kernel_property_test.cc and fuzz/kernels_fuzz.cc have in common.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <limits>
#include <numbers>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "kernels/attention.h"
#include "kernels/float_formats.h"
#include "kernels/implementation.h"
#include "kernels/quad_dot.h"
#include "kernels/tile_format.h"
#include "tests/attention_oracle.h"
#include "tests/differential_numbers.h"
#include "tests/fuzz/fuzz_input.h"
#include "tests/kernel_fixtures.h"
#include "tests/ordered_fixtures.h"

namespace kvant::kernels {

enum class DifferentialKernel : uint8_t {
  kTileEncode,
  kTileDecode,
  kAttendTile,
  kAttendRaw,
  kOrderedMultiply,
  kRowFunctions,
};
inline constexpr int kDifferentialKernels = 6;

// Of keys; the last stands for latents: rope keys of 64 and a rank of 512.
inline constexpr int kDifferentialHeadDims[] = {64, 96, 128, 192, 256, 576};
inline constexpr int kMaxGroup = 16;
// Of attention over numbers that are not encoded as tiles, of the largest result.
inline constexpr double kRawAttentionError = 1e-5;

namespace differential {

inline LayerShape TakeShape(FuzzInput* input) {
  const int head_dim = kDifferentialHeadDims[Pick(input, std::size(kDifferentialHeadDims))];
  const int kv_heads = 1 + Pick(input, 2);
  const int tokens = 1 + (Pick(input, kMaxBlockTokens) + kMaxBlockTokens - 1) % kMaxBlockTokens;
  if (head_dim == 576) return {{tokens, 1, 64}, {tokens, 1, 512}, true};
  return KeysAndValues({tokens, kv_heads, head_dim});
}

inline const TileFormat* FormatOf(const Codec& codec) {
  if (codec.id == CodecId::kTile8) return &kTile8Format;
  return codec.id == CodecId::kTile4 ? &kTile4Format : nullptr;
}

inline std::vector<float> Concatenated(const EncodedSegment& segment) {
  std::vector<float> all(segment.max_error.begin(), segment.max_error.end());
  for (const std::vector<std::byte>& bytes : segment.bytes) {
    for (const std::byte byte : bytes) all.push_back(static_cast<float>(byte));
  }
  return all;
}

inline Difference TileEncodeDifference(FuzzInput* input) {
  const Codec& codec = **FindCodec(Pick(input, 2) == 0 ? "tile8" : "tile4");
  const LayerShape shape = TakeShape(input);
  const SegmentKind kind = Pick(input, 2) == 0 ? SegmentKind::kKey : shape.value_kind();
  const SegmentShape& segment = shape.Of(kind);
  const std::vector<float> x = TakeNumbers(input, Elements(segment)).x;
  EncodedSegment encoded;
  const auto encode = [&](const Implementation& implementation) {
    encoded =
        EncodeBy(codec, kind, segment, [&](const MutableSegmentRanges& ranges, float* max_error) {
          implementation.tile_encode(*FormatOf(codec), kind, segment, x.data(), ranges, max_error);
        });
    return Concatenated(encoded);
  };
  std::vector<float> reference;
  if (Difference difference = CompareAll("tile_encode", encode, &reference); !difference.empty())
    return difference;
  const std::vector<double> exact(x.begin(), x.end());
  for (int cuts = 1; cuts <= encoded.cuts; ++cuts) {
    const std::vector<float> decoded = Decode(codec, kind, segment, encoded, cuts);
    const double most = encoded.max_error[static_cast<size_t>(cuts - 1)];
    if (Difference difference =
            CompareWithOracle("decoded", decoded, exact, [&](size_t) { return most; });
        !difference.empty())
      return difference;
  }
  return {};
}

// Of bytes that anybody may have written, as far as they are well-formed.
inline Difference TileDecodeDifference(FuzzInput* input) {
  const Codec& codec = **FindCodec(Pick(input, 2) == 0 ? "tile8" : "tile4");
  const LayerShape shape = TakeShape(input);
  const SegmentKind kind = Pick(input, 2) == 0 ? SegmentKind::kKey : shape.value_kind();
  const SegmentShape& segment = shape.Of(kind);
  const int cuts = 1 + Pick(input, codec.cuts(kind));
  Random random(input->Take<uint16_t>());
  const std::span<const std::byte> given = input->Rest();
  EncodedSegment encoded;
  size_t taken = 0;
  for (int cut = 0; cut < cuts; ++cut) {
    std::vector<std::byte>& bytes = encoded.bytes[static_cast<size_t>(cut)];
    bytes.resize(codec.range_bytes(kind, segment, cut));
    // Below 0x7B a scale is finite.
    for (std::byte& byte : bytes)
      byte = taken < given.size() ? given[taken++] : static_cast<std::byte>(random.Below(0x7B));
  }
  if (!codec.check(kind, segment, encoded.Ranges(cuts), encoded.Sizes(cuts)).ok()) return {};
  std::vector<float> reference;
  const Difference difference = CompareAll(
      "tile_decode",
      [&](const Implementation& implementation) {
        std::vector<float> out(Elements(segment));
        implementation.tile_decode(*FormatOf(codec), kind, segment, encoded.Ranges(cuts),
                                   out.data());
        return out;
      },
      &reference);
  if (!difference.empty()) return difference;
  const bool finite = std::all_of(reference.begin(), reference.end(),
                                  [](float value) { return std::isfinite(value); });
  return finite ? Difference{} : "tile_decode: not finite";
}

// Query rows and what they see.
struct Attending {
  int rows = 0;
  int q_heads = 0;
  Numbers q;
  float scale = 1.0F;
  std::vector<int> begin;
  std::vector<int> end;

  Visible visible() const { return begin.empty() ? Visible{} : Visible{begin.data(), end.data()}; }
};

inline Attending TakeAttending(FuzzInput* input, const LayerShape& shape, int windowed_tokens) {
  Attending attending;
  attending.q_heads = shape.keys.kv_heads * (1 + Pick(input, kMaxGroup));
  attending.rows = 1 + Pick(input, 2);
  if (windowed_tokens > 0 && Pick(input, 2) == 1) {
    for (int row = 0; row < attending.rows; ++row) {
      attending.begin.push_back(Pick(input, windowed_tokens + 8) - 4);
      attending.end.push_back(Pick(input, windowed_tokens + 8) - 4);
    }
  }
  const int width = KeyDim(shape);
  attending.q = TakeNumbers(input, static_cast<size_t>(attending.rows * attending.q_heads * width));
  attending.scale = 1.0F / std::sqrt(static_cast<float>(width));
  return attending;
}

// max, sum and results of `attend(implementation, block)`.
template <typename Attend>
std::vector<float> AttendBy(const Implementation& implementation, const Attending& attending,
                            const LayerShape& shape, const Attend& attend) {
  const auto vectors = static_cast<size_t>(attending.rows * attending.q_heads);
  const int value_dim = shape.values.head_dim;
  std::vector<float> found(vectors * (2 + static_cast<size_t>(value_dim)));
  float* const out = found.data() + 2 * vectors;
  const QueryBlock block = {attending.rows,
                            attending.q_heads,
                            attending.q.x.data(),
                            attending.scale,
                            found.data(),
                            found.data() + vectors,
                            out};
  InitPartials(block, value_dim);
  attend(implementation, block);
  FinishPartials(block, value_dim, out);
  return found;
}

// Everything that bounds the error of attention but how the numbers are encoded. Derivation: a
// score is off by at most `score`, so that each weight is off by a factor between e^-2score and
// e^2score and each result by e^4score - 1 of what its terms come to without their signs; a result
// is also a mean of values, and so off by no more than their range. A sum of n fp32 terms is off by
// n 2^-24 of that, exponentials by 2^-20 of themselves, and weights below 2^-100 count for nothing.
inline double ResultError(double score, double magnitude, double largest, double tokens) {
  const double by_scores = std::expm1(4.0 * score) + (tokens + 64.0) * 0x1p-23 + 0x1p-18;
  return std::min(by_scores * magnitude, 2.001 * largest) + tokens * 0x1p-98 +
         largest * tokens * 0x1p-100;
}

// stated: of the largest result; 0: what can be derived. factor_error(vector): what rounding to
// factors of 15 bits (attention.h) may add to a score, and to a result by way of the weights.
template <typename FactorError>
Difference CompareAttention(std::string_view what, const Attending& attending,
                            const RawTokens& tokens, std::span<const float> found, double stated,
                            const FactorError& factor_error) {
  std::vector<float> ignored(found.size());
  const auto vectors = static_cast<size_t>(attending.rows * attending.q_heads);
  QueryBlock block = {
      attending.rows, attending.q_heads,        attending.q.x.data(),        attending.scale,
      ignored.data(), ignored.data() + vectors, ignored.data() + 2 * vectors};
  const std::vector<double> expected = AttentionOracle(block, tokens, attending.visible());
  const std::span<const float> results = found.subspan(2 * vectors);
  if (stated > 0.0) {
    double largest = 0.0;
    for (const double value : expected) largest = std::max(largest, std::fabs(value));
    return CompareWithOracle(what, results, expected,
                             [&](size_t) { return stated * largest + 1e-30; });
  }
  const int value_dim = tokens.shape.values.head_dim;
  const int key_dim = KeyDim(tokens.shape);
  std::vector<double> error(expected.size());
  ForEachOracleVector(block, tokens, attending.visible(), [&](const OracleVector& vector) {
    const auto count = static_cast<double>(vector.probability.size());
    const auto [by_scores, by_weights] = factor_error(vector);
    const double score =
        by_scores + (key_dim + 8.0) * (0x1p-22 * vector.largest_magnitude + 0x1p-100);
    for (int c = 0; c < value_dim; ++c) {
      double magnitude = 0.0;
      double largest = 0.0;
      for (size_t i = 0; i < vector.probability.size(); ++i) {
        const double value =
            std::fabs(ValueAt(tokens, vector.begin + static_cast<int>(i), vector.kv_head, c));
        magnitude += vector.probability[i] * value;
        largest = std::max(largest, value);
      }
      const double most = ResultError(score, magnitude, largest, count) + by_weights;
      // Where fp32 ends there is nothing to hold on to.
      const bool fits = vector.largest_magnitude < 0x1p120 && most + largest * count < 0x1p120;
      error[vector.index * static_cast<size_t>(value_dim) + static_cast<size_t>(c)] =
          fits ? most : std::numeric_limits<double>::infinity();
    }
  });
  return CompareWithOracle(what, results, expected, [&](size_t i) { return error[i]; });
}

// One block's layer, encoded.
struct EncodedTile {
  EncodedSegment keys;
  EncodedSegment values;
  LayerTile tile;

  // bf16 numbers at the front of a head of a tile segment.
  std::vector<double> Scales(const TileFormat& format, SegmentKind kind, int head,
                             int count) const {
    const SegmentShape& shape = tile.shape.Of(kind);
    const std::byte* from = (kind == SegmentKind::kKey ? keys : values).bytes[0].data() +
                            static_cast<size_t>(head) * HeadBytes(format, kind, shape, 0);
    std::vector<double> scales;
    for (int i = 0; i < count; ++i) {
      uint16_t bits;
      std::memcpy(&bits, from + static_cast<size_t>(i) * kScaleBytes, kScaleBytes);
      scales.push_back(static_cast<double>(FromBf16(bits)));
    }
    return scales;
  }
};

// first_token: of each tile, and behind the last one.
inline std::pair<double, double> FactorErrorOf(const TileFormat& format,
                                               const std::vector<EncodedTile>& tiles,
                                               const std::vector<int>& first_token,
                                               const Attending& attending,
                                               const OracleVector& vector) {
  const double half = 1 << (2 * format.plane_bits - 1);  // the largest code, its bias added
  const double step = half * (1.0 / (2 * kLargestFactor) + 0x1p-20);
  double by_scores = 0.0;
  double by_weights = 0.0;
  for (size_t i = 0; i < tiles.size(); ++i) {
    const LayerShape& shape = tiles[i].tile.shape;
    const int key_dim = KeyDim(shape);
    const float* q = attending.q.x.data() + vector.index * static_cast<size_t>(key_dim);
    const auto query = [&](int c) {
      return std::fabs(static_cast<double>(q[c])) * static_cast<double>(attending.scale);
    };
    const int width = shape.keys.head_dim;
    const std::vector<double> key_scales =
        tiles[i].Scales(format, SegmentKind::kKey, vector.kv_head, width);
    double largest = 0.0;
    for (int c = 0; c < width; ++c)
      largest = std::max(largest, query(c) * key_scales[static_cast<size_t>(c)]);
    double score = width * step * (largest + 0x1p-100);

    const int tokens = shape.values.tokens;
    const int groups = ValueGroups(shape.values.head_dim);
    const std::vector<double> value_scales =
        tiles[i].Scales(format, shape.value_kind(), vector.kv_head, tokens * groups);
    double heaviest = 0.0;
    for (int g = 0; g < groups; ++g) {
      double scale = 0.0;
      for (int t = 0; t < tokens; ++t) {
        const double of = value_scales[static_cast<size_t>(t * groups + g)];
        scale = std::max(scale, of);
        const int seen = first_token[i] + t - vector.begin;
        if (seen < 0 || seen >= static_cast<int>(vector.probability.size())) continue;
        heaviest = std::max(heaviest, vector.probability[static_cast<size_t>(seen)] * of);
      }
      if (!shape.latent) continue;
      double factor = 0.0;
      const int end = std::min(shape.values.head_dim, (g + 1) * kValueGroup);
      for (int c = g * kValueGroup; c < end; ++c) factor = std::max(factor, query(width + c));
      score += kValueGroup * step * (factor + 0x1p-100) * scale;
    }
    by_scores = std::max(by_scores, score);
    by_weights += tokens * step * heaviest;
  }
  // The heaviest weight may itself be off by what scores are.
  return {by_scores, by_weights * std::exp(std::min(4.0 * by_scores, 80.0)) +
                         0x1p-92 * static_cast<double>(tiles.size())};
}

inline Difference AttendTileDifference(FuzzInput* input) {
  const Codec& codec = *Codecs()[input->Take<uint8_t>() % Codecs().size()];
  const LayerShape first = TakeShape(input);
  const int count = 1 + Pick(input, 3);
  const int key_cuts = 1 + (Pick(input, codec.key_cuts) + codec.key_cuts - 1) % codec.key_cuts;
  const int value_cuts =
      1 + (Pick(input, codec.value_cuts) + codec.value_cuts - 1) % codec.value_cuts;
  const Attending attending = TakeAttending(input, first, count == 1 ? first.keys.tokens : 0);
  bool ordinary = attending.q.ordinary;
  std::vector<EncodedTile> tiles(static_cast<size_t>(count));
  std::vector<int> first_token;
  std::vector<float> keys;
  std::vector<float> values;
  int tokens = 0;
  for (EncodedTile& tile : tiles) {
    LayerShape shape = first;
    // Others have a length of their own.
    if (tokens > 0) shape.keys.tokens = shape.values.tokens = 1 + Pick(input, kMaxBlockTokens);
    first_token.push_back(tokens);
    tokens += shape.keys.tokens;
    const auto encode = [&](SegmentKind kind, int cuts, EncodedSegment* encoded,
                            std::vector<float>* all) {
      const Numbers numbers = TakeNumbers(input, Elements(shape.Of(kind)));
      ordinary = ordinary && numbers.ordinary;
      *encoded = Encode(codec, kind, shape.Of(kind), numbers.x.data());
      const std::vector<float> decoded = Decode(codec, kind, shape.Of(kind), *encoded, cuts);
      all->insert(all->end(), decoded.begin(), decoded.end());
    };
    encode(SegmentKind::kKey, key_cuts, &tile.keys, &keys);
    encode(shape.value_kind(), value_cuts, &tile.values, &values);
    tile.tile = {&codec, shape, tile.keys.Ranges(key_cuts), tile.values.Ranges(value_cuts)};
  }
  const auto attend = [&](const Implementation& implementation) {
    return AttendBy(implementation, attending, first,
                    [&](const Implementation& by, const QueryBlock& block) {
                      for (const EncodedTile& tile : tiles)
                        by.attend_tile(block, tile.tile, attending.visible(), nullptr);
                    });
  };
  std::vector<float> found;
  if (Difference difference = CompareAll("attend_tile", attend, &found); !difference.empty())
    return difference;
  LayerShape whole = first;
  whole.keys.tokens = whole.values.tokens = tokens;
  const TileFormat* format = FormatOf(codec);
  const double stated = format != nullptr ? kTileAttentionError : kRawAttentionError;
  return CompareAttention("attend_tile", attending, {keys.data(), values.data(), whole}, found,
                          ordinary ? stated : 0.0, [&](const OracleVector& vector) {
                            if (format == nullptr) return std::pair(0.0, 0.0);
                            return FactorErrorOf(*format, tiles, first_token, attending, vector);
                          });
}

inline Difference AttendRawDifference(FuzzInput* input) {
  LayerShape shape = TakeShape(input);
  // Beyond what is read at a time, too.
  shape.keys.tokens += kMaxBlockTokens * Pick(input, 3);
  shape.values.tokens = shape.keys.tokens;
  const Attending attending = TakeAttending(input, shape, shape.keys.tokens);
  Numbers keys = TakeNumbers(input, Elements(shape.keys));
  Numbers values = TakeNumbers(input, Elements(shape.values));
  // What stands behind all that rows see may be anything.
  if (!attending.end.empty()) {
    const int end = *std::max_element(attending.end.begin(), attending.end.end());
    const int seen = std::clamp(end, 0, shape.keys.tokens);
    const auto spoil = [&](const SegmentShape& segment, float with, Numbers* numbers) {
      std::fill(numbers->x.begin() + seen * segment.kv_heads * segment.head_dim, numbers->x.end(),
                with);
    };
    spoil(shape.keys, std::numeric_limits<float>::quiet_NaN(), &keys);
    spoil(shape.values, std::numeric_limits<float>::infinity(), &values);
  }
  const RawTokens tokens = {keys.x.data(), values.x.data(), shape};
  const auto attend = [&](const Implementation& implementation) {
    return AttendBy(implementation, attending, shape,
                    [&](const Implementation& by, const QueryBlock& block) {
                      by.attend_raw(block, tokens, attending.visible());
                    });
  };
  std::vector<float> found;
  if (Difference difference = CompareAll("attend_raw", attend, &found); !difference.empty())
    return difference;
  const bool ordinary = attending.q.ordinary && keys.ordinary && values.ordinary;
  return CompareAttention("attend_raw", attending, tokens, found,
                          ordinary ? kRawAttentionError : 0.0,
                          [](const OracleVector&) { return std::pair(0.0, 0.0); });
}

inline Difference OrderedDifference(FuzzInput* input) {
  const int rows = 1 + Pick(input, 66);
  const int inputs = 1 + input->Take<uint16_t>() % 1200;
  const int outputs = 1 + Pick(input, 100);
  const bool bf16 = Pick(input, 2) == 0;
  const int exponent = input->Take<int8_t>();
  const auto start = static_cast<OrderedStart>(Pick(input, 3));
  Random random(input->Take<uint16_t>());
  constexpr int kLargest = 100;  // no sum comes near what fp32 holds
  OrderedCase made =
      MakeOrderedCase(rows, inputs, outputs, bf16, std::min(exponent, kLargest), &random);
  made.x = TakeNumbers(input, made.x.size(), kLargest).x;
  const OrderedWeights weights(made.weights.data(), outputs, inputs);
  std::vector<double> expected;
  std::vector<double> error;
  for (int r = 0; r < rows; ++r) {
    for (int n = 0; n < outputs; ++n) {
      auto sum = static_cast<double>(StartOf(made, start, r, n));
      double magnitude = std::fabs(sum);
      for (int k = 0; k < inputs; ++k) {
        const double term =
            static_cast<double>(made.X(r, k)) * static_cast<double>(made.Weight(n, k));
        sum += term;
        magnitude += std::fabs(term);
      }
      expected.push_back(sum);
      // Each of the roundings adds at most 2^-24 of a sum, or half of the smallest number there is.
      error.push_back((inputs + 1) * (magnitude * 0x1p-24 * 1.001 + 0x1p-150));
    }
  }
  const auto check = [&](std::string_view what, const auto& compute) {
    std::vector<float> found;
    Difference difference = CompareAll(what, compute, &found);
    if (!difference.empty()) return difference;
    return CompareWithOracle(what, found, expected, [&](size_t i) { return error[i]; });
  };
  Difference difference = check("ordered_multiply", [&](const Implementation& implementation) {
    return OrderedRowsBy(implementation, weights, made, start, 0, rows);
  });
  if (!difference.empty() || start != OrderedStart::kHeld) return difference;
  SparseRows sparse;
  for (int r = 0; r < rows; ++r) {
    for (int k = 0; k < inputs; ++k) {
      if (made.X(r, k) != 0.0F) sparse.Add(static_cast<size_t>(k), made.X(r, k));
    }
    sparse.EndRow();
  }
  return check("ordered_add_sparse", [&](const Implementation& implementation) {
    std::vector<float> out = made.held;
    implementation.ordered_add_sparse(weights, SparseTerms(sparse), out.data());
    return out;
  });
}

inline Difference RmsNormDifference(FuzzInput* input) {
  const int rows = 1 + Pick(input, 3);
  const int width = 1 + input->Take<uint16_t>() % 700;
  const auto columns = static_cast<size_t>(width);
  constexpr int kLargest = 58;  // whose squares can be summed up
  constexpr float kEpsilon = 1e-6F;
  const std::vector<float> x = TakeNumbers(input, static_cast<size_t>(rows) * columns, kLargest).x;
  const std::vector<float> weight = TakeNumbers(input, columns, kLargest).x;
  std::vector<float> found;
  const Difference difference = CompareAll(
      "rms_norm",
      [&](const Implementation& implementation) {
        std::vector<float> out(x.size());
        implementation.rms_norm(x.data(), weight.data(), rows, width, kEpsilon, out.data());
        return out;
      },
      &found);
  if (!difference.empty()) return difference;
  std::vector<double> expected;
  for (size_t r = 0; r < static_cast<size_t>(rows); ++r) {
    const auto row = std::span(x).subspan(r * columns, columns);
    double squares = 0.0;
    for (const float value : row) squares += static_cast<double>(value) * value;
    const double factor = 1.0 / std::sqrt(squares / width + static_cast<double>(kEpsilon));
    for (size_t c = 0; c < columns; ++c)
      expected.push_back(static_cast<double>(row[c]) * factor * weight[c]);
  }
  return CompareWithOracle("rms_norm", found, expected, [&](size_t i) {
    const double scale = std::fabs(static_cast<double>(weight[i % columns]));
    return (width + 16) * 0x1p-23 * std::fabs(expected[i]) + 0x1p-148 * (1.0 + scale);
  });
}

// silu or gelu, times another number.
inline Difference GateDifference(FuzzInput* input) {
  const bool silu = Pick(input, 2) == 0;
  const size_t count = 1 + input->Take<uint16_t>() % 700;
  const std::vector<float> gate = TakeNumbers(input, count).x;
  const std::vector<float> up = TakeNumbers(input, count).x;
  const std::string_view what = silu ? "silu_multiply" : "gelu_multiply";
  std::vector<float> found;
  const Difference difference = CompareAll(
      what,
      [&](const Implementation& implementation) {
        std::vector<float> out = gate;
        (silu ? implementation.silu_multiply : implementation.gelu_multiply)(out.data(), up.data(),
                                                                             count);
        return out;
      },
      &found);
  if (!difference.empty()) return difference;
  std::vector<double> expected;
  for (size_t i = 0; i < count; ++i) {
    const auto g = static_cast<double>(gate[i]);
    const double u = std::sqrt(2.0 / std::numbers::pi) * (g + 0.044715 * g * g * g);
    expected.push_back((silu ? g / (1.0 + std::exp(-g)) : 0.5 * g * (1.0 + std::tanh(u))) * up[i]);
  }
  return CompareWithOracle(what, found, expected, [&](size_t i) {
    if (std::fabs(expected[i]) > 0x1p120) return std::numeric_limits<double>::infinity();
    // Exponentials end near 2^127, so that what is left of gates far below 0 is 2^-120 of them.
    const double size =
        (1.0 + std::fabs(static_cast<double>(gate[i]))) * std::fabs(static_cast<double>(up[i]));
    return (silu ? 1e-6 * std::fabs(expected[i]) + 0x1p-120 * size : 1e-6 * size) + 1e-30;
  });
}

inline Difference SoftmaxDifference(FuzzInput* input) {
  const size_t count = 1 + input->Take<uint16_t>() % 4200;
  const bool hidden = Pick(input, 2) == 1;
  std::vector<float> x = TakeNumbers(input, count).x;
  // Some may be hidden, but not all.
  for (size_t i = 1; hidden && i < count; i += 3) x[i] = -std::numeric_limits<float>::infinity();
  std::vector<float> found;
  const Difference difference = CompareAll(
      "softmax",
      [&](const Implementation& implementation) {
        std::vector<float> out = x;
        implementation.softmax(out.data(), count);
        return out;
      },
      &found);
  if (!difference.empty()) return difference;
  const auto max = static_cast<double>(*std::max_element(x.begin(), x.end()));
  std::vector<double> expected;
  double sum = 0.0;
  for (const float value : x) {
    expected.push_back(std::exp(static_cast<double>(value) - max));
    sum += expected.back();
  }
  for (double& value : expected) value /= sum;
  // x - max carries half a unit in its last place, and exp makes that relative.
  return CompareWithOracle("softmax", found, expected,
                           [&](size_t i) { return 1e-5 * expected[i] + 1e-30; });
}

// There and back again.
inline Difference RotateDifference(FuzzInput* input) {
  const int vectors = 1 + Pick(input, 3);
  const int half = 1 + Pick(input, 100);
  const auto pairs = static_cast<size_t>(half);
  const size_t stride = 2 * pairs + static_cast<size_t>(Pick(input, 3));
  constexpr int kLargest = 58;
  const std::vector<float> x =
      TakeNumbers(input, static_cast<size_t>(vectors) * stride, kLargest).x;
  std::vector<float> cosines;
  std::vector<float> sines;
  for (size_t i = 0; i < pairs; ++i) {
    const double angle = input->Take<uint16_t>();
    cosines.push_back(static_cast<float>(std::cos(angle)));
    sines.push_back(static_cast<float>(std::sin(angle)));
  }
  const auto rotated = [&](const Implementation& implementation) {
    std::vector<float> out = x;
    implementation.rotate(out.data(), vectors, stride, half, cosines.data(), sines.data());
    return out;
  };
  std::vector<double> expected(x.begin(), x.end());
  std::vector<double> size(x.size(), 0.0);
  for (size_t v = 0; v < static_cast<size_t>(vectors); ++v) {
    for (size_t i = 0; i < pairs; ++i) {
      const size_t low = v * stride + i;
      const size_t high = low + pairs;
      const double a = x[low];
      const double b = x[high];
      expected[low] = a * cosines[i] - b * sines[i];
      expected[high] = b * cosines[i] + a * sines[i];
      size[low] = size[high] = std::fabs(a) + std::fabs(b);
    }
  }
  const auto error = [&](size_t i) { return size[i] * 0x1p-21 + 0x1p-147; };
  std::vector<float> found;
  Difference difference = CompareAll("rotate", rotated, &found);
  if (difference.empty()) difference = CompareWithOracle("rotate", found, expected, error);
  if (!difference.empty()) return difference;
  difference = CompareAll(
      "rotate_back",
      [&](const Implementation& implementation) {
        std::vector<float> out = rotated(implementation);
        implementation.rotate_back(out.data(), vectors, stride, half, cosines.data(), sines.data());
        return out;
      },
      &found);
  if (!difference.empty()) return difference;
  return CompareWithOracle("rotate_back", found, std::vector<double>(x.begin(), x.end()), error);
}

inline Difference RowFunctionDifference(FuzzInput* input) {
  switch (Pick(input, 4)) {
    case 0:
      return RmsNormDifference(input);
    case 1:
      return GateDifference(input);
    case 2:
      return RotateDifference(input);
    default:
      return SoftmaxDifference(input);
  }
}

}  // namespace differential

// Computes the case that bytes stand for; all bytes are one. Empty where all is well, else what is
// not.
inline std::string FindDifference(DifferentialKernel kernel, const uint8_t* data, size_t size) {
  fuzz::FuzzInput input(data, size);
  switch (kernel) {
    case DifferentialKernel::kTileEncode:
      return differential::TileEncodeDifference(&input);
    case DifferentialKernel::kTileDecode:
      return differential::TileDecodeDifference(&input);
    case DifferentialKernel::kAttendTile:
      return differential::AttendTileDifference(&input);
    case DifferentialKernel::kAttendRaw:
      return differential::AttendRawDifference(&input);
    case DifferentialKernel::kOrderedMultiply:
      return differential::OrderedDifference(&input);
    case DifferentialKernel::kRowFunctions:
      return differential::RowFunctionDifference(&input);
  }
  return {};
}

// Attention of ordinary numbers, by index of codec and head size: three tiles, all
// cuts.
inline std::vector<uint8_t> AttendTileCase(int codec, int head_dim, int group) {
  std::vector<uint8_t> bytes = {static_cast<uint8_t>(codec),
                                static_cast<uint8_t>(head_dim),
                                0,  // one kv head
                                0,  // 64 tokens
                                2,  // three tiles
                                0,  // all cuts of keys
                                0,  // all cuts of values
                                static_cast<uint8_t>(group - 1),
                                1};  // two rows
  const auto numbers = [&](uint8_t seed) { bytes.insert(bytes.end(), {0, 0, 0, seed, 0}); };
  numbers(1);
  for (uint8_t tile = 0; tile < 3; ++tile) {
    if (tile > 0) bytes.push_back(static_cast<uint8_t>(20 * tile));  // tokens of another length
    numbers(static_cast<uint8_t>(2 * tile + 2));
    numbers(static_cast<uint8_t>(2 * tile + 3));
  }
  return bytes;
}

}  // namespace kvant::kernels
