#include "node/klt_levels.h"

#include <algorithm>
#include <array>
#include <bit>
#include <cmath>
#include <cstring>
#include <limits>

#include "base/bytes.h"
#include "base/check.h"
#include "kernels/implementation.h"
#include "node/klt_bits.h"

namespace kvant::node {
namespace {

// A bit is worth this much squared error, in steps: the slope of a fine quantizer, 2 ln 2 / 12
// (Gish and Pierce 1968, "Asymptotically efficient quantizing", section III).
constexpr float kBitsWorth = 0.1155F;
constexpr int kEscapeBits = 22;  // of what follows a last symbol
// Of eight bytes at once: their lower bits, what gathers the lowest of each, and escapes.
constexpr uint64_t kLow7 = 0x7F7F7F7F7F7F7F7FU;
constexpr uint64_t kGather = 0x0102040810204080U;
constexpr uint64_t kEscapes = 0x0101010101010101U * (kKltSymbols - 1);
static_assert(std::endian::native == std::endian::little);
constexpr float kNever = 1e6F;  // bits of a symbol that can't be coded

Status Malformed(std::string_view what) {
  return DataLoss("a klt block: {}; was it coded with another pack or cut?", what);
}

// floor(4 log2(ratio) + 1/2) without a logarithm, whose last bits differ between libraries:
// 2^(-7/8), 2^(-5/8), 2^(-3/8) and 2^(-1/8) part a mantissa from 1/2 to 1.
// REQUIRES: ratio > 0.
int QuartersOf(float ratio) {
  constexpr float kParts[] = {0x1.172b84p-1F, 0x1.4bfdaep-1F, 0x1.8ace54p-1F, 0x1.d5818ep-1F};
  int exponent = 0;
  // Infinity has no exponent.
  const float mantissa = std::frexp(std::min(ratio, std::numeric_limits<float>::max()), &exponent);
  int quarters = 4 * exponent - 4;
  for (const float part : kParts) quarters += mantissa >= part ? 1 : 0;
  return quarters;
}

}  // namespace

int KltQuarters(float deviation, float step) {
  const float ratio = deviation / step;
  return ratio > 0 ? QuartersOf(ratio) : 2 * kKltNever;
}

KltPlace FirstPlace(int quarters) {
  if (quarters < 4 * kKltLowest) return {};
  if (quarters < 4 * kKltHighest) return {static_cast<int16_t>(quarters - 4 * kKltLowest), 0};
  // Of the shared ones, whose symbols stand for a span that grows with the deviation.
  const int above = std::min(quarters - 4 * kKltHighest, 4 * kKltMostLowBits - 1);
  return {static_cast<int16_t>(kKltRatios + above % 4), static_cast<int16_t>(1 + above / 4)};
}

KltPlace RefinedPlace(int refinement, bool significant, int quarters) {
  KV_DCHECK(refinement >= 1 && refinement <= kKltRefinements);
  if (quarters <= kKltNever || (quarters < 4 * kKltLowest && !significant)) return {};
  const int place = std::clamp(quarters - 4 * kKltLowest, 0, kKltRatios - 1);
  const int first = kKltFirstTables + (2 * (refinement - 1) + (significant ? 1 : 0)) * kKltRatios;
  return {static_cast<int16_t>(first + place), 0};
}

bool KltTableRefines(size_t table) {
  return table >= kKltFirstTables && (table - kKltFirstTables) / kKltRatios % 2 == 1;
}

void KltPlaces::Clear() {
  end.clear();
  first.clear();
  other.clear();
  table.clear();
  low_bits.clear();
}

void KltPlaces::Add(size_t of_coefficient, KltPlace place) {
  if (place.table < 0) return;
  other.push_back(static_cast<uint16_t>(of_coefficient));
  table.push_back(static_cast<uint8_t>(place.table));
  low_bits.push_back(static_cast<uint8_t>(place.low_bits));
}

void KltPlaces::BeginToken(std::span<const uint8_t> tables) {
  first.push_back(tables.size());
  table.insert(table.end(), tables.begin(), tables.end());
  low_bits.resize(table.size());
}

std::byte ByteOf(KltToken token) {
  return static_cast<std::byte>((token.finer - kKltLeastFiner) << 4 |
                                (token.louder - kKltLeastLouder));
}

KltToken TokenOf(std::byte byte) {
  const auto bits = static_cast<int>(byte);
  return {static_cast<int8_t>((bits >> 4) + kKltLeastFiner),
          static_cast<int8_t>((bits & 0xF) + kKltLeastLouder)};
}

float StepOf(KltToken token, float step) {
  constexpr float kHalf = 0x1.6a09e6p-1F;  // of an octave
  const int octaves = token.finer >> 1;    // rounded down
  const float whole = std::ldexp(step, -octaves);
  return (token.finer & 1) != 0 ? whole * kHalf : whole;
}

void KltLevelsRead::SetFolded(size_t i, uint32_t folded) {
  folded_[i] = static_cast<uint8_t>(std::min<uint32_t>(folded, kLarger));
  if (folded >= kLarger) larger_.emplace_back(i, Unfolded(folded));
}

int32_t KltLevelsRead::Larger(size_t i) const {
  return std::lower_bound(larger_.begin(), larger_.end(), std::pair(i, -kKltLargestLevel))->second;
}

size_t KltLevelsRead::NotZero(size_t begin, size_t end, uint16_t* at) const {
  return kernels::ActiveImplementation().not_zero(folded_.data() + begin, end - begin, at);
}

uint64_t KltLevelsRead::NotZeroWord(size_t at) const {
  uint64_t word = 0;
  for (size_t i = 0; i < 64; i += sizeof(uint64_t)) {
    uint64_t eight = 0;
    std::memcpy(&eight, folded_.data() + at + i, sizeof(eight));
    // Bits 8 j + 7 of bytes that are not 0, gathered.
    const uint64_t flags = (((eight & kLow7) + kLow7) | eight) & ~kLow7;
    word |= ((flags >> 7) * kGather >> 56) << i;
  }
  return word;
}

KltLevels::KltLevels(const KltStatistics& statistics) : mean_(statistics.mean) {
  for (size_t table = 0; table < kKltTables; ++table) {
    auto& value = value_.emplace_back();
    for (uint32_t folded = 0; folded < kKltSymbols; ++folded)
      value[folded] = Value(Unfolded(folded), {static_cast<int16_t>(table), 0});
  }
  if (statistics.tables.empty()) return;
  KV_CHECK(statistics.tables.size() == kKltTables);
  for (const kernels::RansTable& table : statistics.tables) {
    auto& bits = bits_.emplace_back();
    auto& symbol_of = symbol_.emplace_back();
    for (int symbol = 0; symbol < kKltSymbols; ++symbol) {
      const auto s = static_cast<size_t>(symbol);
      const bool coded = table.frequency(symbol) > 0;
      KV_CHECK(coded || symbol != kEscape);  // any level can be coded
      symbol_of[s] = static_cast<uint8_t>(coded ? symbol : kEscape);
      bits[s] = coded ? static_cast<float>(kernels::kRansBits) -
                            std::log2(static_cast<float>(table.frequency(symbol)))
                      : kNever;
    }
    bits[kEscape] += kEscapeBits;
  }
  for (size_t table = 0; table < kKltTables; ++table) {
    auto& parted = parted_.emplace_back();
    for (int32_t i = 0; i < kParted; ++i) {
      // (x - a)^2 + worth of a's bits = (x - b)^2 + worth of b's: linear in x.
      const KltPlace place{static_cast<int16_t>(table), 0};
      const int32_t level = kFirstParted + i;
      const double below = static_cast<double>(Value(level, place));
      const double above = static_cast<double>(Value(level + 1, place));
      const double dearer =
          kBitsWorth * (static_cast<double>(Bits(level + 1, place)) - Bits(level, place));
      parted[static_cast<size_t>(i)] =
          static_cast<float>((below + above) / 2 + dearer / (2 * (above - below)));
    }
  }
  encode_tables_.Assign(statistics.tables);
  decode_tables_.Assign(statistics.tables);
}

float KltLevels::Bits(int32_t level, KltPlace place) const {
  return bits_[static_cast<size_t>(place.table)][SymbolOf(level, place)];
}

bool KltLevels::LowerCostsLess(float x, int32_t below, KltPlace place) const {
  const auto cost = [&](int32_t level) {
    const float error = x - Value(level, place);
    return error * error + kBitsWorth * Bits(level, place);
  };
  return cost(below) < cost(below + 1);
}

void KltLevels::RoundAll(std::span<const float> x, const KltPlaces& places,
                         KltLevelsRead* levels) const {
  const size_t coded = places.coded();
  KV_CHECK(x.size() == coded);
  levels->Reset(coded);
  const auto round_one = [&](size_t i) { levels->Set(i, Round(x[i], places.At(i))); };
  if (parted_.empty()) {
    for (size_t i = 0; i < coded; ++i) round_one(i);
    return;
  }
  const bool all_near = kernels::ActiveImplementation().round_levels(
      x.data(), places.table.data(), coded, parted_.front().data(), levels->folded_.data());
  for (size_t i = 0; i < coded; i += sizeof(uint64_t)) {
    const size_t count = std::min(sizeof(uint64_t), coded - i);
    uint64_t low_bits = 0;
    std::memcpy(&low_bits, places.low_bits.data() + i, count);
    if (low_bits == 0 && all_near) continue;
    for (size_t at = i; at < i + count; ++at) {
      if (places.low_bits[at] > 0 || !IsNear(x[at])) round_one(at);
    }
  }
}

int32_t KltLevels::Round(float x, KltPlace place) const {
  if (!parted_.empty() && place.low_bits == 0 && IsNear(x)) {
    const auto table = static_cast<uint8_t>(place.table);
    uint8_t folded = 0;
    kernels::ActiveImplementation().round_levels(&x, &table, 1, parted_.front().data(), &folded);
    return Unfolded(folded);
  }
  constexpr auto kMost = static_cast<float>(kKltLargestLevel - 1);
  // What is no number, of a state that overflowed, goes somewhere as well.
  const float clamped = x > -kMost ? std::min(x, kMost) : -kMost;
  if (parted_.empty() || place.low_bits > 0)
    return static_cast<int32_t>(std::floor(clamped + 0.5F));
  const auto below = static_cast<int32_t>(std::floor(clamped));
  return LowerCostsLess(clamped, below, place) ? below : below + 1;
}

void KltLevels::Write(const KltLevelsRead& levels, const KltPlaces& places,
                      std::vector<std::byte>* out) const {
  KV_CHECK(levels.size() == places.coded());
  std::vector<uint8_t> symbols(levels.size());
  BitWriter low;
  for (size_t i = 0; i < levels.size(); ++i) {
    const KltPlace place = places.At(i);
    const uint32_t folded = levels.FoldedLevel(i);
    symbols[i] = SymbolOfFolded(folded, place);
    if (symbols[i] == kEscape) low.Put(folded >> place.low_bits, kEscapeBits);
    if (place.low_bits > 0) low.Put(folded & ((1U << place.low_bits) - 1), place.low_bits);
  }
  // [bytes of the symbols][symbols][low bits]
  const size_t begin = out->size();
  out->resize(begin + sizeof(uint32_t));
  kernels::RansEncode(kernels::ActiveImplementation(), encode_tables_, places.table.data(), symbols,
                      out);
  StoreLittle(out->data() + begin, static_cast<uint32_t>(out->size() - begin - sizeof(uint32_t)));
  const std::vector<std::byte> rest = low.Take();
  out->insert(out->end(), rest.begin(), rest.end());
}

Status KltLevels::Read(std::span<const std::byte> in, const KltPlaces& places,
                       KltLevelsRead* read) const {
  if (in.size() < sizeof(uint32_t)) return Malformed("an extent is too short");
  const auto stream_bytes = LoadLittle<uint32_t>(in.data());
  in = in.subspan(sizeof(uint32_t));
  if (stream_bytes > in.size()) return Malformed("its symbols are longer than an extent");
  const size_t coded = places.coded();
  read->Reset(coded);
  std::vector<uint8_t>& symbols = read->folded_;
  KV_RETURN_IF_ERROR(kernels::RansDecode(kernels::ActiveImplementation(), decode_tables_,
                                         places.table.data(), in.first(stream_bytes),
                                         std::span(symbols).first(coded)));
  BitReader low(in.subspan(stream_bytes));
  for (size_t i = 0; i < coded; i += sizeof(uint64_t)) {
    uint64_t eight = 0;
    uint64_t eight_bits = 0;
    const size_t count = std::min(sizeof(uint64_t), coded - i);
    std::memcpy(&eight, symbols.data() + i, sizeof(eight));
    std::memcpy(&eight_bits, places.low_bits.data() + i, count);
    // Those that say more than a symbol: most have none among them.
    const uint64_t escaped = eight ^ kEscapes;
    const uint64_t plain = ((escaped & kLow7) + kLow7) | escaped;
    if (eight_bits == 0 && (~plain & ~kLow7) == 0) continue;
    for (size_t at = i; at < i + count; ++at) {
      const int bits = places.low_bits[at];
      if (bits == 0 && symbols[at] != kEscape) continue;
      // An escaped number and its low bits take 42.
      uint64_t folded = symbols[at];
      if (folded == kEscape) folded = low.Take(kEscapeBits);
      if (bits > 0) folded = folded << bits | low.Take(bits);
      if (low.overrun()) return Malformed("low bits end too early");
      if (folded > 2U * static_cast<uint32_t>(kKltLargestLevel)) {
        return Malformed("a level is too large");
      }
      read->SetFolded(at, static_cast<uint32_t>(folded));
    }
  }
  if (!low.AtEnd()) return Malformed("bytes are left over");
  return OkStatus();
}

}  // namespace kvant::node
