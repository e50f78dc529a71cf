#include "kernels/kernel_bench.h"

#include <algorithm>
#include <atomic>
#include <cstring>
#include <fstream>
#include <vector>

#include "base/random.h"
#include "kernels/attention.h"
#include "kernels/blas.h"
#include "kernels/float_formats.h"
#include "kernels/implementation.h"
#include "kernels/linear.h"
#include "kernels/lossless.h"
#include "kernels/ordered_gemm.h"
#include "kernels/payload_layout.h"

namespace kvant::kernels {
namespace {

// Runs `round` once uncounted, then until `at_least` has passed. Units: what one round does.
template <typename Round>
Rate Repeat(double units, Duration at_least, const Round& round) {
  round();
  const Clock& clock = SteadyClock();
  const TimePoint start = clock.Now();
  Rate rate;
  Duration spent{};
  do {
    round();
    ++rate.rounds;
    spent = clock.Now() - start;
  } while (spent < at_least);
  rate.per_second = units * static_cast<double>(rate.rounds) / Seconds(spent);
  return rate;
}

// Lowers `fastest` to what one round takes, if it takes less. For rounds so short that other work
// leaves some of them alone: it only ever adds.
template <typename Round>
void KeepFastest(const Round& round, Duration* fastest) {
  const Clock& clock = SteadyClock();
  const TimePoint start = clock.Now();
  round();
  *fastest = std::min(*fastest, Duration(clock.Now() - start));
}

std::vector<float> Normals(size_t count, uint64_t seed) {
  Random random(seed);
  std::vector<float> x(count);
  for (float& value : x) value = static_cast<float>(random.Normal());
  return x;
}

size_t Product(int a, int b) { return static_cast<size_t>(a) * static_cast<size_t>(b); }

double Operations(const GemmShape& shape) {
  return 2.0 * shape.rows * shape.out_features * shape.in_features;
}

}  // namespace

Rate MeasureRead(size_t buffer_bytes, ThreadPool* pool, Duration at_least) {
  constexpr size_t kPiece = size_t{64} << 10;
  constexpr size_t kWords = kPiece / sizeof(uint64_t);
  const size_t pieces = std::max<size_t>(1, buffer_bytes / kPiece);
  const std::vector<uint64_t> buffer(pieces * kWords, 1);
  std::atomic<uint64_t> total = 0;  // keeps the reads from being optimised away
  return Repeat(static_cast<double>(pieces * kPiece), at_least, [&] {
    pool->ParallelFor(static_cast<int>(pieces), [&](int piece) {
      const uint64_t* words = buffer.data() + static_cast<size_t>(piece) * kWords;
      uint64_t sums[16] = {};
      for (size_t i = 0; i < kWords; i += 16) {
        for (size_t lane = 0; lane < 16; ++lane) sums[lane] += words[i + lane];
      }
      uint64_t sum = 0;
      for (const uint64_t lane : sums) sum += lane;
      total.fetch_add(sum, std::memory_order_relaxed);
    });
  });
}

Rate MeasureCopy(size_t buffer_bytes, Duration at_least) {
  const std::vector<std::byte> from(buffer_bytes, std::byte{1});
  std::vector<std::byte> to(buffer_bytes);
  return Repeat(static_cast<double>(buffer_bytes), at_least,
                [&] { std::memcpy(to.data(), from.data(), buffer_bytes); });
}

Result<Rate> MeasurePlainGemm(const GemmShape& shape, ThreadPool* pool, Duration at_least) {
  KV_RETURN_IF_ERROR(LoadBlas());
  const std::vector<float> w = Normals(Product(shape.out_features, shape.in_features), 1);
  const std::vector<float> x = Normals(Product(shape.rows, shape.in_features), 2);
  std::vector<float> y(Product(shape.rows, shape.out_features));
  SgemmFunction* const sgemm = LoadedSgemm();
  const int pieces = pool->threads();
  return Repeat(Operations(shape), at_least, [&] {
    pool->ParallelFor(pieces, [&](int piece) {
      const int first = shape.out_features * piece / pieces;
      const int count = shape.out_features * (piece + 1) / pieces - first;
      if (count == 0) return;
      sgemm(kBlasRowMajor, kBlasNoTranspose, kBlasTranspose, shape.rows, count, shape.in_features,
            1.0F, x.data(), shape.in_features, w.data() + Product(first, shape.in_features),
            shape.in_features, 0.0F, y.data() + first, shape.out_features);
    });
  });
}

LinearRate MeasureLinear(const GemmShape& shape, WeightForm form, size_t weight_bytes,
                         ThreadPool* pool, Duration at_least) {
  const std::vector<float> w = Normals(Product(shape.out_features, shape.in_features), 1);
  std::vector<OrderedWeights> weights;
  double bytes = 0;
  do {
    weights.emplace_back(w.data(), shape.out_features, shape.in_features, form);
    bytes += static_cast<double>(weights.back().bytes());
  } while (bytes < static_cast<double>(weight_bytes));
  const std::vector<float> x = Normals(Product(shape.rows, shape.in_features), 2);
  std::vector<float> y(Product(shape.rows, shape.out_features));
  const double rounds = Repeat(1.0, at_least, [&] {
                          for (const OrderedWeights& matrix : weights) {
                            const LinearProduct product = {&matrix, x.data(), y.data()};
                            Linear({&product, 1}, shape.rows, pool);
                          }
                        }).per_second;
  return {Operations(shape) * static_cast<double>(weights.size()) * rounds, bytes * rounds};
}

Result<OrderedRates> MeasureOrdered(const GemmShape& shape, int matrices, Duration at_least) {
  KV_RETURN_IF_ERROR(LoadBlas());
  const size_t size = Product(shape.out_features, shape.in_features);
  std::vector<float> w = Normals(size * static_cast<size_t>(matrices), 1);
  std::vector<OrderedWeights> bf16;
  std::vector<OrderedWeights> fp32;
  for (int i = 0; i < matrices; ++i) {
    float* matrix = w.data() + static_cast<size_t>(i) * size;
    fp32.emplace_back(matrix, shape.out_features, shape.in_features);
    for (size_t j = 0; j < size; ++j) matrix[j] = FromBf16(ToBf16(matrix[j]));
    bf16.emplace_back(matrix, shape.out_features, shape.in_features);
  }
  const std::vector<float> x = Normals(Product(shape.rows, shape.in_features), 2);
  std::vector<float> y(Product(shape.rows, shape.out_features));
  SgemmFunction* const sgemm = LoadedSgemm();
  Duration of_bf16 = Duration::max();
  Duration of_fp32 = Duration::max();
  Duration of_sgemm = Duration::max();
  const Clock& clock = SteadyClock();
  const TimePoint end = clock.Now() + at_least;
  for (size_t i = 0; i < bf16.size() || clock.Now() < end; ++i) {
    const size_t matrix = i % bf16.size();
    KeepFastest([&] { OrderedMultiply(bf16[matrix], x.data(), shape.rows, nullptr, y.data()); },
                &of_bf16);
    KeepFastest([&] { OrderedMultiply(fp32[matrix], x.data(), shape.rows, nullptr, y.data()); },
                &of_fp32);
    KeepFastest(
        [&] {
          sgemm(kBlasRowMajor, kBlasNoTranspose, kBlasTranspose, shape.rows, shape.out_features,
                shape.in_features, 1.0F, x.data(), shape.in_features, w.data() + matrix * size,
                shape.in_features, 0.0F, y.data(), shape.out_features);
        },
        &of_sgemm);
  }
  const double operations = Operations(shape);
  return OrderedRates{operations / Seconds(of_bf16), operations / Seconds(of_fp32),
                      operations / Seconds(of_sgemm)};
}

TileRates MeasureTile(const Codec& codec, const SegmentShape& shape, int key_cuts, int value_cuts,
                      int q_heads, int rows, size_t working_set_bytes, Duration at_least) {
  // Every block is a layer of one payload.
  const size_t block_bytes = PayloadLayout(codec, KeysAndValues(shape), 1).total_bytes();
  const int blocks = static_cast<int>(std::max<size_t>(1, working_set_bytes / block_bytes));
  const PayloadLayout layout(codec, KeysAndValues(shape), blocks);
  std::vector<std::byte> payload(layout.total_bytes());
  const size_t elements =
      Product(shape.tokens, shape.kv_heads) * static_cast<size_t>(shape.head_dim);
  std::vector<float> x = Normals(elements, 3);
  const double bf16_bytes = 4.0 * static_cast<double>(elements) * blocks;

  TileRates rates;
  float max_error[kMaxCuts];
  rates.encode = Repeat(bf16_bytes, at_least, [&] {
                   for (int layer = 0; layer < blocks; ++layer) {
                     for (const SegmentKind kind : {SegmentKind::kKey, SegmentKind::kValue}) {
                       codec.encode(kind, shape, x.data(),
                                    layout.MutableRanges(kind, layer, payload.data()), max_error);
                     }
                   }
                 }).per_second;
  rates.decode =
      Repeat(bf16_bytes, at_least, [&] {
        for (int layer = 0; layer < blocks; ++layer) {
          codec.decode(SegmentKind::kKey, shape,
                       layout.Ranges(SegmentKind::kKey, layer, key_cuts, payload.data()), x.data());
          codec.decode(SegmentKind::kValue, shape,
                       layout.Ranges(SegmentKind::kValue, layer, value_cuts, payload.data()),
                       x.data());
        }
      }).per_second;

  const size_t vectors = Product(rows, q_heads);
  const std::vector<float> q = Normals(vectors * static_cast<size_t>(shape.head_dim), 4);
  std::vector<float> max(vectors);
  std::vector<float> sum(vectors);
  std::vector<float> weighted(q.size());
  const QueryBlock block = {rows,       q_heads,    q.data(),       0.125F,
                            max.data(), sum.data(), weighted.data()};
  InitPartials(block, shape.head_dim);
  rates.attend =
      Repeat(bf16_bytes, at_least, [&] {
        for (int layer = 0; layer < blocks; ++layer) {
          AttendTile(block,
                     {&codec, layout.shape(),
                      layout.Ranges(SegmentKind::kKey, layer, key_cuts, payload.data()),
                      layout.Ranges(SegmentKind::kValue, layer, value_cuts, payload.data())});
        }
      }).per_second;
  rates.attend_encoded =
      rates.attend * static_cast<double>(layout.BytesOfCuts(key_cuts, value_cuts)) / bf16_bytes;
  return rates;
}

LosslessRates MeasureLossless(SegmentKind kind, const SegmentShape& shape, size_t working_set_bytes,
                              Duration at_least) {
  const size_t elements =
      Product(shape.tokens, shape.kv_heads) * static_cast<size_t>(shape.head_dim);
  const size_t segments = std::max<size_t>(1, working_set_bytes / (elements * sizeof(uint16_t)));
  std::vector<uint16_t> raw;
  for (const float value : Normals(segments * elements, 5)) raw.push_back(ToBf16(value));
  std::vector<uint16_t> copy(raw.size());
  std::vector<std::byte> encoded;
  std::vector<size_t> ends;
  LosslessCoder coder;
  const double bytes = static_cast<double>(raw.size() * sizeof(uint16_t));

  Duration encode = Duration::max();
  Duration decode = Duration::max();
  Duration copying = Duration::max();
  const Clock& clock = SteadyClock();
  const TimePoint end = clock.Now() + at_least;
  do {
    KeepFastest(
        [&] {
          encoded.clear();
          ends.assign(1, 0);
          for (size_t s = 0; s < segments; ++s) {
            coder.Encode(kind, shape, raw.data() + s * elements, &encoded);
            ends.push_back(encoded.size());
          }
        },
        &encode);
    KeepFastest(
        [&] {
          for (size_t s = 0; s < segments; ++s) {
            const auto segment = std::span(encoded).subspan(ends[s], ends[s + 1] - ends[s]);
            KV_CHECK(coder.Decode(kind, shape, segment, copy.data() + s * elements).ok());
          }
        },
        &decode);
    KeepFastest([&] { std::memcpy(copy.data(), raw.data(), raw.size() * sizeof(uint16_t)); },
                &copying);
  } while (clock.Now() < end);
  return {bytes / Seconds(encode), bytes / Seconds(decode), bytes / Seconds(copying),
          bytes / static_cast<double>(encoded.size())};
}

RansRates MeasureRans(size_t symbols, int alphabet, int tables, Duration at_least) {
  Random random(6);
  std::vector<uint32_t> counts(static_cast<size_t>(alphabet), 1);
  std::vector<uint8_t> plane(symbols);
  std::vector<uint8_t> table_of_symbol(symbols);
  for (size_t i = 0; i < symbols; ++i) {
    plane[i] = static_cast<uint8_t>(random.Below(1 + random.Below(counts.size())));
    table_of_symbol[i] = static_cast<uint8_t>(i % static_cast<size_t>(tables));
    ++counts[plane[i]];
  }
  const std::vector<RansTable> all(static_cast<size_t>(tables), RansTable::FromCounts(counts));
  RansEncodeTables encode_tables;
  encode_tables.Assign(all);
  RansDecodeTables decode_tables;
  decode_tables.Assign(all);
  const Implementation& kernels = ActiveImplementation();
  std::vector<std::byte> stream;
  Duration encode = Duration::max();
  Duration decode = Duration::max();
  const Clock& clock = SteadyClock();
  const TimePoint end = clock.Now() + at_least;
  do {
    KeepFastest(
        [&] {
          stream.clear();
          RansEncode(kernels, encode_tables, table_of_symbol.data(), plane, &stream);
        },
        &encode);
    KeepFastest(
        [&] {
          KV_CHECK(RansDecode(kernels, decode_tables, table_of_symbol.data(), stream, plane).ok());
        },
        &decode);
  } while (clock.Now() < end);
  return {static_cast<double>(symbols) / Seconds(encode),
          static_cast<double>(symbols) / Seconds(decode)};
}

AttentionRates MeasureAttention(const AttentionWork& work, ThreadPool* pool, Duration at_least) {
  constexpr int kPiece = 8;  // blocks that one thread takes at once, as a node does
  const LayerShape& shape = work.shape;
  const int blocks = work.context / shape.keys.tokens;
  const PayloadLayout layout(*work.codec, shape, 1);
  std::vector<std::byte> one(layout.total_bytes());
  for (const SegmentKind kind : {SegmentKind::kKey, shape.value_kind()}) {
    const SegmentShape& segment = shape.Of(kind);
    const std::vector<float> x =
        Normals(Product(segment.tokens, segment.kv_heads * segment.head_dim), 3);
    float max_error[kMaxCuts];
    work.codec->encode(kind, segment, x.data(), layout.MutableRanges(kind, 0, one.data()),
                       max_error);
  }
  std::vector<std::byte> all;
  all.reserve(one.size() * Product(blocks, work.layers));
  for (int i = 0; i < blocks * work.layers; ++i) all.insert(all.end(), one.begin(), one.end());

  const int value_dim = shape.values.head_dim;
  const int pieces = (blocks + kPiece - 1) / kPiece;
  const auto heads = static_cast<size_t>(work.q_heads);
  const size_t value_width = heads * static_cast<size_t>(value_dim);
  const std::vector<float> q = Normals(heads * static_cast<size_t>(KeyDim(shape)), 4);
  std::vector<float> max(Product(pieces, work.q_heads));
  std::vector<float> sum(max.size());
  std::vector<float> weighted(static_cast<size_t>(pieces) * value_width);
  std::vector<float> out(value_width);
  const auto query = [&](int piece) {
    const auto at = static_cast<size_t>(piece);
    return QueryBlock{1,
                      work.q_heads,
                      q.data(),
                      0.1F,
                      max.data() + at * heads,
                      sum.data() + at * heads,
                      weighted.data() + at * value_width};
  };
  // stride: from one block to the next.
  const auto step = [&](size_t stride) {
    for (int layer = 0; layer < work.layers; ++layer) {
      pool->ParallelFor(pieces, [&](int piece) {
        const QueryBlock block = query(piece);
        InitPartials(block, value_dim);
        const auto tile = [&](int i) {
          const std::byte* payload =
              all.data() + (Product(layer, blocks) + static_cast<size_t>(i)) * stride;
          return LayerTile{
              work.codec, shape, layout.Ranges(SegmentKind::kKey, 0, work.codec->key_cuts, payload),
              layout.Ranges(shape.value_kind(), 0, work.codec->cuts(shape.value_kind()), payload)};
        };
        const int end = std::min(blocks, (piece + 1) * kPiece);
        LayerTile now = tile(piece * kPiece);
        for (int i = piece * kPiece; i < end; ++i) {
          const LayerTile next = i + 1 < end ? tile(i + 1) : now;
          AttendTile(block, now, {}, &next);
          now = next;
        }
      });
      for (int piece = 1; piece < pieces; ++piece) MergePartials(query(piece), query(0), value_dim);
      FinishPartials(query(0), value_dim, out.data());
    }
  };
  AttentionRates rates;
  rates.step_bytes = static_cast<double>(all.size());
  rates.steps = Repeat(1, at_least, [&] { step(one.size()); }).per_second;
  rates.steps_in_cache = Repeat(1, at_least, [&] { step(0); }).per_second;
  return rates;
}

std::string CpuName() {
  std::ifstream file("/proc/cpuinfo");
  for (std::string line; std::getline(file, line);) {
    const size_t value = line.find(": ");
    if (line.starts_with("model name") && value != std::string::npos) return line.substr(value + 2);
  }
  return "unknown";
}

std::string_view CompilerName() {
#ifdef __clang__
  return "clang++ " __clang_version__;
#else
  return "g++ " __VERSION__;
#endif
}

}  // namespace kvant::kernels
