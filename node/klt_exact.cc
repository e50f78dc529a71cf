#include "node/klt_exact.h"

#include <algorithm>
#include <array>
#include <bit>
#include <cmath>
#include <string_view>

#include "base/bytes.h"
#include "base/check.h"
#include "cache_service/manifest.h"
#include "kernels/float_formats.h"
#include "kernels/implementation.h"
#include "node/klt_bits.h"

namespace kvant::node {
namespace {

using kernels::SegmentKind;
using kernels::SegmentShape;

// A scale s is said in half octaves: twice the exponent that a bf16 number of its size has, 1 more
// from sqrt(2) times a power of two on.
constexpr int kMostScale = 2 * 255 + 1;
constexpr uint16_t kChannelScales = 0x8000;  // a segment's scale is that of its largest channel
constexpr int kScaleHeader = 10;             // bytes: checksum and scale
constexpr int kSmallestScale = 14;           // half octaves below the segment's, of a channel
constexpr int kNoneMissing = 15;             // of the channel: all are what decoding gave

constexpr int kBias = 127;    // of exponents
constexpr int kMantissa = 7;  // bits
constexpr int kEscape = 128;  // symbol: the number's bits follow
constexpr int kEscapeBits = 16;

// What was decoded, f, is *near* zero where it is less than 4 s, else *far*. Tables are chosen by
// the octave of |f| / s, of exponents alone, the first two bits of the mantissa of f, and half
// octaves of s: from 1/4 on where f is near, up to 2^12 where it is far.
constexpr int kNearest = -8;           // quarters of octaves
constexpr int kFar = 8;                // as above
constexpr int kFarthest = 4 * 12 - 1;  // as above; more is taken for this
constexpr int kNearTables = 2 * (kFar - kNearest);
constexpr int kTables = kNearTables + 2 * (kFarthest + 1 - kFar);

// Symbols of near tables: cells of |x| by its exponent, less that of s, and the first bits of its
// mantissa. What is smaller or larger escapes.
constexpr int kLeast = -9;
constexpr int kMost = 3;
constexpr int CellBits(int octave) { return octave >= -3 ? 3 : octave >= -5 ? 1 : 0; }
constexpr int kCells = 64;  // of each sign
struct Cell {
  int first = 0;  // ordinal, were the exponent of s that of 1
  int low_bits = 0;
};
constexpr std::array<Cell, kCells> MakeCells() {
  std::array<Cell, kCells> cells{};
  size_t next = 0;
  for (int octave = kLeast; octave <= kMost; ++octave) {
    const int low_bits = kMantissa - CellBits(octave);
    for (int at = 0; at < 1 << kMantissa; at += 1 << low_bits)
      cells[next++] = {((kBias + octave) << kMantissa) + at, low_bits};
  }
  return cells;
}
constexpr std::array<Cell, kCells> kCellTable = MakeCells();
// [octave - kLeast] the first cell of each.
constexpr std::array<uint8_t, kMost - kLeast + 1> kFirstCells = [] {
  std::array<uint8_t, kMost - kLeast + 1> first{};
  for (size_t octave = 1; octave < first.size(); ++octave) {
    const int bits = CellBits(static_cast<int>(octave) - 1 + kLeast);
    first[octave] = static_cast<uint8_t>(first[octave - 1] + (1 << bits));
  }
  return first;
}();

// Symbols of far tables: steps of 2^low_bits ordinals from that of f, this one the middle.
constexpr int kMiddle = 63;
constexpr int kSteps = 2 * kMiddle + 1;
constexpr int LowBits(int quarters) { return std::max(0, 5 - quarters / 4); }

struct Place {
  uint8_t table = 0;
  bool far = false;
  uint8_t low_bits = 0;  // where it is far
};
// magnitude: bits of f without its sign.
Place PlaceOf(int magnitude, int scale) {
  const int quarters = (magnitude >> (kMantissa - 2)) - 4 * (scale / 2);
  const int half = scale & 1;
  if (quarters < kFar) {
    return {static_cast<uint8_t>(2 * (std::max(quarters, kNearest) - kNearest) + half), false, 0};
  }
  const int held = std::min(quarters, kFarthest);
  return {static_cast<uint8_t>(kNearTables + 2 * (held - kFar) + half), true,
          static_cast<uint8_t>(LowBits(held))};
}

// A number's ordinal among bf16 numbers of the sign of f, and beyond zero: +0 is 0, -0 is -1.
int OrdinalOf(uint16_t x, bool negative) {
  const int magnitude = x & 0x7FFF;
  return ((x & 0x8000U) != 0) == negative ? magnitude : -1 - magnitude;
}
uint16_t BitsOf(int ordinal, bool negative) {
  const bool is_negative = (ordinal < 0) != negative;
  return static_cast<uint16_t>((ordinal < 0 ? -1 - ordinal : ordinal) | (is_negative ? 0x8000 : 0));
}
constexpr int kLargestOrdinal = 0x7FFF;

struct Symbol {
  uint8_t symbol = kEscape;
  uint32_t low = 0;
  int low_bits = kEscapeBits;
};
// Without regard to what has a frequency.
Symbol SymbolOf(uint16_t x, uint16_t f, int scale, Place place) {
  const bool negative = (f & 0x8000U) != 0;
  const int ordinal = OrdinalOf(x, negative);
  if (place.far) {
    const int away = ordinal - (f & 0x7FFF) + ((1 << place.low_bits) >> 1);
    const int step = away >> place.low_bits;
    if (std::abs(step) > kMiddle) return {kEscape, x, kEscapeBits};
    return {static_cast<uint8_t>(step + kMiddle),
            static_cast<uint32_t>(away - (step << place.low_bits)), place.low_bits};
  }
  const int magnitude = ordinal < 0 ? -1 - ordinal : ordinal;
  const int relative = magnitude + ((kBias - scale / 2) << kMantissa);
  if (relative < kCellTable.front().first || relative >= (kBias + kMost + 1) << kMantissa)
    return {kEscape, x, kEscapeBits};
  const auto octave = static_cast<size_t>((relative >> kMantissa) - kBias - kLeast);
  size_t cell = kFirstCells[octave];
  cell += static_cast<size_t>((relative & 0x7F) >> kCellTable[cell].low_bits);
  const Cell& of = kCellTable[cell];
  return {static_cast<uint8_t>(2 * cell + (ordinal < 0 ? 1U : 0U)),
          static_cast<uint32_t>(relative - of.first), of.low_bits};
}

// Bits behind a symbol.
int LowBitsOf(uint8_t symbol, Place place) {
  if (symbol >= kEscape) return kEscapeBits;
  return place.far ? place.low_bits : kCellTable[symbol / 2].low_bits;
}

// The number of a symbol and what is behind it. False: there is none.
bool Number(uint8_t symbol, uint32_t low, uint16_t f, int scale, Place place, uint16_t* x) {
  if (symbol >= kEscape) {
    *x = static_cast<uint16_t>(low);
    return true;
  }
  int ordinal = 0;
  if (place.far) {
    ordinal = (f & 0x7FFF) + ((symbol - kMiddle) << place.low_bits) + static_cast<int>(low) -
              ((1 << place.low_bits) >> 1);
  } else {
    const int magnitude =
        kCellTable[symbol / 2].first + static_cast<int>(low) - ((kBias - scale / 2) << kMantissa);
    if (magnitude < 0) return false;
    ordinal = (symbol & 1U) != 0 ? -1 - magnitude : magnitude;
  }
  if (ordinal > kLargestOrdinal || ordinal < -1 - kLargestOrdinal) return false;
  *x = BitsOf(ordinal, (f & 0x8000U) != 0);
  return true;
}

// Number number `ordinal` of those from 0 on; half ones lie between two. Doubled: [2 ordinal].
double ValueOf(int doubled) {
  const auto value = [](int ordinal) {
    return std::ldexp(static_cast<double>((1 << kMantissa) + (ordinal & 0x7F)),
                      (ordinal >> kMantissa) - kBias - kMantissa);
  };
  return (value(doubled >> 1) + value((doubled + 1) >> 1)) / 2;
}

// What x is thought to be: around f with the standard deviation s, by Student's t of 15 degrees of
// freedom. From here to MakeTable everything is additions, products, quotients and roots, each
// rounded once, so that all machines have the same tables.
class Density {
 public:
  Density(double f, double s) : f_(f), s_(s) {}
  double Between(double low, double high) const {
    // Simpson's rule; no cell is wider than s.
    constexpr int kParts = 8;
    const double step = (high - low) / (2 * kParts);
    double sum = At(low) + At(high);
    for (int i = 1; i < 2 * kParts; ++i) sum += At(low + step * i) * (i % 2 == 1 ? 4 : 2);
    constexpr double kMass = 2.372733099721983;  // sqrt(13 pi) Gamma(15/2) / Gamma(8)
    return sum * step / (3 * kMass * s_);
  }

 private:
  double At(double x) const {
    const double z = (x - f_) / s_;
    double power = 1 + z * z / 13;
    for (int i = 0; i < 3; ++i) power *= power;
    return 1 / power;
  }
  double f_;
  double s_;
};

kernels::RansTable MakeTable(std::span<const double> chances) {
  constexpr double kUnits = 1 << 24;
  constexpr uint32_t kRare = (1U << 24) / 8192;  // would take more than an escape is worth
  std::array<uint32_t, kEscape + 1> counts{};
  uint32_t left = 1U << 24;
  for (size_t i = 0; i < chances.size(); ++i) {
    const auto count = static_cast<uint32_t>(std::min(chances[i], 1.0) * kUnits);
    counts[i] = count < kRare ? 0 : std::min(count, left);
    left -= counts[i];
  }
  counts[kEscape] = std::max(left, 4 * kRare);
  return kernels::RansTable::FromCounts(counts);
}

// s where its exponent is that of 1.
double ScaleOf(int half) { return half == 0 ? 1.189207115002721 : 1.681792830507429; }

kernels::RansTable NearTable(int quarters, int half) {
  const int octave = (quarters - kNearest) / 4 + kNearest / 4;
  const int middle = ((kBias + octave) << kMantissa) + ((quarters & 3) << 5) + 16;
  const Density x(quarters == kNearest ? 0.125 : ValueOf(2 * middle), ScaleOf(half));
  std::array<double, 2 * kCells> chances{};
  for (size_t cell = 0; cell < kCells; ++cell) {
    const int first = kCellTable[cell].first;
    const double low = ValueOf(2 * first - 1);
    const double high = ValueOf(2 * (first + (1 << kCellTable[cell].low_bits)) - 1);
    chances[2 * cell] = x.Between(low, high);
    chances[2 * cell + 1] = x.Between(-high, -low);
  }
  return MakeTable(chances);
}

kernels::RansTable FarTable(int quarters, int half) {
  const int middle = ((kBias + quarters / 4) << kMantissa) + ((quarters & 3) << 5) + 16;
  const double f = ValueOf(2 * middle);
  // f stands anywhere in the span that rounds to it.
  const double span = ValueOf(2 * middle + 2) - f;
  const double s = std::sqrt(ScaleOf(half) * ScaleOf(half) + span * span / 12);
  const Density x(f, s);
  const int low_bits = LowBits(quarters);
  std::array<double, kSteps> chances{};
  for (int step = 0; step < kSteps; ++step) {
    const int first = middle + ((step - kMiddle) << low_bits) - ((1 << low_bits) >> 1);
    chances[static_cast<size_t>(step)] =
        x.Between(ValueOf(2 * first - 1), ValueOf(2 * (first + (1 << low_bits)) - 1));
  }
  return MakeTable(chances);
}

// A segment as it is coded.
struct Order {
  explicit Order(const ExactSegment& segment)
      : tokens(static_cast<size_t>(segment.shape.tokens)),
        channels(static_cast<size_t>(segment.shape.kv_heads * segment.shape.head_dim)),
        head_dim(static_cast<size_t>(segment.shape.head_dim)),
        by_channel(segment.kind == SegmentKind::kKey) {}
  size_t elements() const { return tokens * channels; }
  // visit(channel, where it was decoded, where it stands in `raw`), in the order of coding.
  template <typename Visit>
  bool ForEach(const Visit& visit) const {
    for (size_t token = 0, i = 0; token < tokens; ++token) {
      for (size_t channel = 0; channel < channels; ++channel, ++i) {
        if (!visit(channel, i, At(token, channel))) return false;
      }
    }
    return true;
  }
  // Where (token, channel of all heads) stands in `raw`.
  size_t At(size_t token, size_t channel) const {
    if (by_channel) return channel * tokens + token;
    return (channel / head_dim * tokens + token) * head_dim + channel % head_dim;
  }
  size_t tokens;
  size_t channels;
  size_t head_dim;
  bool by_channel;
};

// What was decoded, as bf16, [token][channel].
std::vector<uint16_t> Rounded(const ExactSegment& segment, const Order& order) {
  std::vector<uint16_t> rounded(order.elements());
  for (size_t i = 0; i < rounded.size(); ++i) rounded[i] = kernels::ToBf16(segment.decoded[i]);
  return rounded;
}

// The half octave of a scale. REQUIRES: s >= 0, or it is not finite.
int HalfOctave(double s) {
  const auto single = static_cast<float>(std::min(s, 0x1p127));
  const auto bits = std::bit_cast<uint32_t>(single);
  constexpr uint32_t kRootOfTwo = 0x3504F3;  // mantissa
  return static_cast<int>(2 * (bits >> 23)) + ((bits & 0x7FFFFF) >= kRootOfTwo ? 1 : 0);
}

// Scales of one segment.
struct Scales {
  uint16_t header = 0;
  std::vector<uint8_t> below;  // [channel], or empty: half octaves, or kNoneMissing
  int Of(size_t channel) const {
    const int largest = header & ~kChannelScales;
    return below.empty() ? largest : std::max(0, largest - below[channel]);
  }
  bool NoneMissing(size_t channel) const {
    return !below.empty() && below[channel] == kNoneMissing;
  }
};

Scales ChooseScales(const ExactSegment& segment, const Order& order,
                    std::span<const uint16_t> rounded, const uint16_t* raw) {
  // The mean magnitude of what is missing, which single large ones change less than its square, is
  // 0.8 of the deviation of a normal one.
  constexpr double kDeviation = 1.25;
  std::vector<double> missing(order.channels);
  std::vector<bool> differs(order.channels);
  double total = 0;
  for (size_t token = 0; token < order.tokens; ++token) {
    for (size_t channel = 0; channel < order.channels; ++channel) {
      const size_t i = token * order.channels + channel;
      const uint16_t x = raw[order.At(token, channel)];
      const float away = std::fabs(kernels::FromBf16(x) - segment.decoded[i]);
      if (std::isfinite(away)) missing[channel] += away;
      differs[channel] = differs[channel] || x != rounded[i];
    }
  }
  std::vector<int> of_channel;
  int largest = 0;
  for (size_t channel = 0; channel < order.channels; ++channel) {
    total += missing[channel];
    of_channel.push_back(
        HalfOctave(missing[channel] * kDeviation / static_cast<double>(order.tokens)));
    if (differs[channel]) largest = std::max(largest, of_channel.back());
  }
  Scales scales;
  const int one = HalfOctave(total * kDeviation / static_cast<double>(order.elements()));
  // Half a bit an element for each half octave, against 4 bits a channel.
  constexpr int64_t kNoneSaves = 12;
  int64_t saved = 0;
  for (size_t channel = 0; channel < order.channels; ++channel) {
    const int below = std::min(largest - of_channel[channel], kSmallestScale);
    scales.below.push_back(static_cast<uint8_t>(differs[channel] ? below : kNoneMissing));
    saved += differs[channel] ? one - (largest - below) : kNoneSaves;
  }
  if (saved * static_cast<int64_t>(order.tokens) > 8 * static_cast<int64_t>(order.channels)) {
    scales.header = static_cast<uint16_t>(largest | kChannelScales);
  } else {
    scales.below.clear();
    scales.header = static_cast<uint16_t>(one);
  }
  return scales;
}

Status Malformed(std::string_view what) { return DataLoss("an exact klt extent: {}", what); }

std::span<const std::byte> BytesOf(const uint16_t* raw, size_t elements) {
  return std::as_bytes(std::span(raw, elements));
}

}  // namespace

KltExact::KltExact() {
  std::vector<kernels::RansTable> tables;
  for (int quarters = kNearest; quarters <= kFarthest; ++quarters) {
    for (const int half : {0, 1})
      tables.push_back(quarters < kFar ? NearTable(quarters, half) : FarTable(quarters, half));
  }
  KV_CHECK(tables.size() == kTables);
  for (const kernels::RansTable& table : tables) {
    auto& coded = coded_.emplace_back();
    for (int symbol = 0; symbol <= kEscape; ++symbol) coded.push_back(table.frequency(symbol) > 0);
  }
  encode_tables_.Assign(tables);
  decode_tables_.Assign(tables);
}

void KltExact::Encode(std::span<const ExactSegment> segments, std::span<const uint16_t* const> raw,
                      std::vector<std::byte>* out) const {
  KV_CHECK(segments.size() == raw.size());
  std::vector<uint8_t> symbols;
  std::vector<uint8_t> tables;
  BitWriter low;
  for (size_t s = 0; s < segments.size(); ++s) {
    const Order order(segments[s]);
    const std::vector<uint16_t> rounded = Rounded(segments[s], order);
    const Scales scales = ChooseScales(segments[s], order, rounded, raw[s]);
    const size_t at = out->size();
    out->resize(at + kScaleHeader + (scales.below.size() + 1) / 2);
    StoreLittle(out->data() + at, PayloadChecksum(BytesOf(raw[s], order.elements())));
    StoreLittle(out->data() + at + sizeof(uint64_t), scales.header);
    for (size_t channel = 0; channel < scales.below.size(); ++channel) {
      (*out)[at + kScaleHeader + channel / 2] |=
          static_cast<std::byte>(scales.below[channel] << (channel % 2 * 4));
    }
    order.ForEach([&](size_t channel, size_t i, size_t at_raw) {
      if (scales.NoneMissing(channel)) return true;
      const uint16_t x = raw[s][at_raw];
      const int scale = scales.Of(channel);
      const Place place = PlaceOf(rounded[i] & 0x7FFF, scale);
      Symbol of = SymbolOf(x, rounded[i], scale, place);
      if (!coded_[place.table][of.symbol]) of = {kEscape, x, kEscapeBits};
      symbols.push_back(of.symbol);
      tables.push_back(place.table);
      if (of.low_bits > 0) low.Put(of.low, of.low_bits);
      return true;
    });
  }
  const size_t begin = out->size();
  out->resize(begin + sizeof(uint32_t));
  kernels::RansEncode(kernels::ActiveImplementation(), encode_tables_, tables.data(), symbols, out);
  StoreLittle(out->data() + begin, static_cast<uint32_t>(out->size() - begin - sizeof(uint32_t)));
  const std::vector<std::byte> rest = low.Take();
  out->insert(out->end(), rest.begin(), rest.end());
}

Status KltExact::Decode(std::span<const std::byte> in, std::span<const ExactSegment> segments,
                        std::span<uint16_t* const> raw) const {
  KV_CHECK(segments.size() == raw.size());
  std::vector<uint64_t> checksums;
  std::vector<Scales> scales;
  std::vector<std::vector<uint16_t>> rounded;
  std::vector<Place> places;
  std::vector<uint8_t> tables;
  for (const ExactSegment& segment : segments) {
    const Order order(segment);
    if (in.size() < kScaleHeader) return Malformed("it is too short");
    checksums.push_back(LoadLittle<uint64_t>(in.data()));
    Scales& of = scales.emplace_back();
    of.header = LoadLittle<uint16_t>(in.data() + sizeof(uint64_t));
    if ((of.header & ~kChannelScales) > kMostScale) return Malformed("a scale is too large");
    in = in.subspan(kScaleHeader);
    if ((of.header & kChannelScales) != 0) {
      const size_t bytes = (order.channels + 1) / 2;
      if (in.size() < bytes) return Malformed("scales end too early");
      for (size_t channel = 0; channel < order.channels; ++channel) {
        of.below.push_back(std::to_integer<uint8_t>(in[channel / 2]) >> (channel % 2 * 4) & 0xFU);
      }
      in = in.subspan(bytes);
    }
    const std::vector<uint16_t>& f = rounded.emplace_back(Rounded(segment, order));
    order.ForEach([&](size_t channel, size_t i, size_t) {
      if (of.NoneMissing(channel)) return true;
      places.push_back(PlaceOf(f[i] & 0x7FFF, of.Of(channel)));
      tables.push_back(places.back().table);
      return true;
    });
  }
  if (in.size() < sizeof(uint32_t)) return Malformed("it has no symbols");
  const auto stream_bytes = LoadLittle<uint32_t>(in.data());
  in = in.subspan(sizeof(uint32_t));
  if (stream_bytes > in.size()) return Malformed("its symbols are longer than it is");
  std::vector<uint8_t> symbols(tables.size());
  KV_RETURN_IF_ERROR(kernels::RansDecode(kernels::ActiveImplementation(), decode_tables_,
                                         tables.data(), in.first(stream_bytes), symbols));
  BitReader low(in.subspan(stream_bytes));
  size_t next = 0;
  for (size_t s = 0; s < segments.size(); ++s) {
    const Order order(segments[s]);
    const bool all = order.ForEach([&](size_t channel, size_t i, size_t at_raw) {
      const uint16_t f = rounded[s][i];
      uint16_t& x = raw[s][at_raw];
      x = f;
      if (scales[s].NoneMissing(channel)) return true;
      const Place place = places[next];
      const uint8_t symbol = symbols[next++];
      const int bits = LowBitsOf(symbol, place);
      const uint32_t behind = bits > 0 ? low.Take(bits) : 0;
      return Number(symbol, behind, f, scales[s].Of(channel), place, &x);
    });
    if (!all) return Malformed("a number is beyond all of bf16");
    if (low.overrun()) return Malformed("low bits end too early");
    if (PayloadChecksum(BytesOf(raw[s], order.elements())) != checksums[s]) {
      return Malformed(
          "it does not give the numbers that were coded; does this machine decode other ones?");
    }
  }
  if (!low.AtEnd()) return Malformed("bytes are left over");
  return OkStatus();
}

}  // namespace kvant::node
