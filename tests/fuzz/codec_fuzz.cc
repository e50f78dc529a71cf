// Every codec on bytes that nobody vouches for: check, and what it accepts is decoded and attended.
#include <array>
#include <cmath>

#include "base/check.h"
#include "kernels/attention.h"
#include "kernels/codec.h"
#include "tests/fuzz/fuzz_input.h"

namespace kvant::fuzz {
namespace {

using namespace kvant::kernels;

// Ranges of one segment, each in a buffer of its own so that a sanitizer sees every byte read
// beside it.
struct Segment {
  std::vector<std::vector<std::byte>> bytes;
  std::vector<size_t> sizes;
  SegmentRanges ranges;
};

Segment TakeSegment(FuzzInput* input, const Codec& codec, SegmentKind kind,
                    const SegmentShape& shape, int cuts, bool wrong_size) {
  Segment segment;
  segment.ranges.cuts = cuts;
  for (int cut = 0; cut < cuts; ++cut) {
    size_t size = codec.range_bytes(kind, shape, cut);
    if (wrong_size && size > 0) --size;
    std::vector<std::byte> bytes(size);
    const auto taken = input->TakeBytes(size);
    std::copy(taken.begin(), taken.end(), bytes.begin());
    segment.bytes.push_back(std::move(bytes));
    segment.sizes.push_back(size);
    segment.ranges.range[cut] = segment.bytes.back().data();
  }
  return segment;
}

bool Accepted(const Codec& codec, SegmentKind kind, const SegmentShape& shape,
              const Segment& segment) {
  return codec.check(kind, shape, segment.ranges, segment.sizes).ok();
}

void Decode(const Codec& codec, SegmentKind kind, const SegmentShape& shape,
            const Segment& segment) {
  std::vector<float> out(static_cast<size_t>(shape.tokens * shape.kv_heads * shape.head_dim));
  codec.decode(kind, shape, segment.ranges, out.data());
  if (codec.id == CodecId::kTile8 || codec.id == CodecId::kTile4) {
    for (const float value : out) KV_CHECK(std::isfinite(value));
  }
}

}  // namespace

std::vector<Bytes> SeedInputs() {
  std::vector<Bytes> seeds;
  for (uint8_t codec = 0; codec < Codecs().size(); ++codec) {
    const SegmentShape shape{17, 2, 16};
    Bytes seed = {std::byte{codec}, std::byte{17}, std::byte{1}, std::byte{1},
                  std::byte{2},     std::byte{2},  std::byte{0}, std::byte{1}};
    std::vector<float> x(static_cast<size_t>(shape.tokens * shape.kv_heads * shape.head_dim));
    for (size_t i = 0; i < x.size(); ++i) x[i] = std::sin(static_cast<float>(i));
    for (const SegmentKind kind : {SegmentKind::kKey, SegmentKind::kValue}) {
      const Codec& c = *Codecs()[codec];
      std::vector<Bytes> ranges;
      MutableSegmentRanges out;
      std::array<float, kMaxCuts> error{};
      for (int cut = 0; cut < c.cuts(kind); ++cut) {
        ranges.emplace_back(c.range_bytes(kind, shape, cut));
      }
      for (size_t cut = 0; cut < ranges.size(); ++cut) out.range[cut] = ranges[cut].data();
      c.encode(kind, shape, x.data(), out, error.data());
      for (const Bytes& range : ranges) seed.insert(seed.end(), range.begin(), range.end());
    }
    seeds.push_back(std::move(seed));
  }
  return seeds;
}

}  // namespace kvant::fuzz

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  using namespace kvant::fuzz;
  using namespace kvant::kernels;
  FuzzInput input(data, size);
  const Codec& codec = *Codecs()[input.Take<uint8_t>() % Codecs().size()];
  SegmentShape shape;
  shape.tokens = 1 + (input.Take<uint8_t>() + kMaxBlockTokens - 1) % kMaxBlockTokens;
  shape.kv_heads = 1 + input.Take<uint8_t>() % 4;
  shape.head_dim = 8 * (1 + input.Take<uint8_t>() % 20);
  const int key_cuts = 1 + (input.Take<uint8_t>() + 1) % codec.key_cuts;
  const int value_cuts = 1 + (input.Take<uint8_t>() + 1) % codec.value_cuts;
  const bool wrong_size = input.Take<uint8_t>() % 16 == 15;
  const int group = 1 + input.Take<uint8_t>() % 3;
  KV_CHECK(ShapeIsValid(shape));
  const Segment keys = TakeSegment(&input, codec, SegmentKind::kKey, shape, key_cuts, wrong_size);
  const Segment values = TakeSegment(&input, codec, SegmentKind::kValue, shape, value_cuts, false);
  const bool keys_good = Accepted(codec, SegmentKind::kKey, shape, keys);
  const bool values_good = Accepted(codec, SegmentKind::kValue, shape, values);
  KV_CHECK(!(wrong_size && keys_good));
  if (keys_good) Decode(codec, SegmentKind::kKey, shape, keys);
  if (values_good) Decode(codec, SegmentKind::kValue, shape, values);
  if (!keys_good || !values_good) return 0;
  const auto rows = static_cast<size_t>(group * shape.kv_heads);
  const std::vector<float> q(rows * static_cast<size_t>(shape.head_dim), 0.25F);
  std::vector<float> max(rows);
  std::vector<float> sum(rows);
  std::vector<float> weighted(q.size());
  std::vector<float> out(q.size());
  const QueryBlock block{1,          group * shape.kv_heads, q.data(), 0.125F, max.data(),
                         sum.data(), weighted.data()};
  InitPartials(block, shape.head_dim);
  AttendTile(block, {&codec, KeysAndValues(shape), keys.ranges, values.ranges});
  FinishPartials(block, shape.head_dim, out.data());
  return 0;
}
