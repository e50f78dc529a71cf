// Levels of conditional transform coding: what coefficients are rounded to, and those as bytes
// (docs/klt.md, "Bytes of an extent"). Integers alone decide how bytes are read.
#pragma once

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <span>
#include <utility>
#include <vector>

#include "base/status.h"
#include "kernels/implementation.h"
#include "kernels/rans.h"

namespace kvant::node {

// Tables of frequencies by a coefficient's deviation in steps: quarters of an octave from
// 2^kKltLowest to 2^kKltHighest, and four more that all larger ones share (FirstPlace).
inline constexpr int kKltLowest = -3;
inline constexpr int kKltHighest = 3;
inline constexpr int kKltRatios = 4 * (kKltHighest - kKltLowest);
inline constexpr int kKltFirstTables = kKltRatios + 4;
// Cuts of a block behind the first, each with tables of its own: for coefficients that were 0 so
// far, and for those that were not.
inline constexpr int kKltRefinements = 2;
inline constexpr int kKltTables = kKltFirstTables + kKltRefinements * 2 * kKltRatios;
// Symbols of a table; the last one says that a larger number follows.
inline constexpr int kKltSymbols = 64;
// Folded levels whose mean is known for each table; the last one stands for all larger.
inline constexpr int kKltMeans = 8;

// How a coefficient is coded. Its level, folded (0, 1, -1, 2, -2, ... become 0, 1, 2, 3, 4, ...) is
// cut: the lower `low_bits` are stored as they are, the rest is a symbol of the table.
struct KltPlace {
  int16_t table = -1;  // -1: it is not coded
  int16_t low_bits = 0;
};
// As many, whatever a pack says: a level has no more.
inline constexpr int kKltMostLowBits = 20;
// floor(4 log2(deviation / step) + 1/2), the quarters of an octave that a coefficient is above its
// step; kKltNever or less, if there is nothing of it.
inline constexpr int kKltNever = -(1 << 20);
int KltQuarters(float deviation, float step);
// In a block's first cut.
KltPlace FirstPlace(int quarters);
// In refinement 1.. of it. significant: a level of an earlier cut was not 0.
KltPlace RefinedPlace(int refinement, bool significant, int quarters);

// Coefficients of a block that one cut codes, in the order of their coding: by token, then
// coefficient. Value.
struct KltPlaces {
  std::vector<size_t> end;        // [tokens]: behind those of each
  std::vector<size_t> first;      // [tokens]: so many of them are the coefficients 0, 1, 2, ...
  std::vector<uint16_t> other;    // which coefficients the rest are, all tokens' together
  std::vector<uint8_t> table;     // [coded], of KltPlace
  std::vector<uint8_t> low_bits;  // [coded], of KltPlace

  size_t coded() const { return table.size(); }
  KltPlace At(size_t i) const { return {table[i], low_bits[i]}; }
  void Clear();
  // To the token under work; a place without a table is left out.
  void Add(size_t of_coefficient, KltPlace place);
  // The first coefficients of a token, of these tables, without low bits. Before any others of it.
  void BeginToken(std::span<const uint8_t> tables);
  void EndToken() { end.push_back(coded()); }
};

// Larger levels are clamped: 2^20 steps are beyond what a float's mantissa tells apart.
inline constexpr int32_t kKltLargestLevel = 1 << 20;
constexpr uint32_t Folded(int32_t level) {
  return level > 0 ? 2 * static_cast<uint32_t>(level) - 1 : 2 * static_cast<uint32_t>(-level);
}
constexpr int32_t Unfolded(uint32_t folded) {
  return (folded & 1U) != 0 ? static_cast<int32_t>((folded + 1) / 2)
                            : -static_cast<int32_t>(folded / 2);
}

// Levels at such places as they were read. Value.
class KltLevelsRead {
 public:
  // Behind the last level, so that several may be looked at at once.
  static constexpr size_t kPadding = 64;

  // count zeros.
  void Reset(size_t count) {
    folded_.assign(count + kPadding, 0);
    larger_.clear();
  }
  // REQUIRES: i ascends from call to call.
  void Set(size_t i, int32_t level) { SetFolded(i, Folded(level)); }
  void SetFolded(size_t i, uint32_t folded);
  size_t size() const { return folded_.size() - kPadding; }
  int32_t Level(size_t i) const { return folded_[i] < kLarger ? Unfolded(folded_[i]) : Larger(i); }
  uint32_t FoldedLevel(size_t i) const {
    return folded_[i] < kLarger ? folded_[i] : Folded(Larger(i));
  }
  // The level folded, as far as a byte says it.
  uint8_t FoldedByte(size_t i) const { return folded_[i]; }
  // Where levels from `begin` to before `end` are not 0: writes their places less `begin` to `at`,
  // which has room for kPadding more, and returns how many.
  size_t NotZero(size_t begin, size_t end, uint16_t* at) const;
  // Bit b says whether level `at` + b is not 0. REQUIRES: at <= size().
  uint64_t NotZeroWord(size_t at) const;

 private:
  friend class KltLevels;
  static constexpr uint8_t kLarger = 255;  // and more

  int32_t Larger(size_t i) const;

  std::vector<uint8_t> folded_;
  std::vector<std::pair<size_t, int32_t>> larger_;  // those of them, ascending
};

// How a token of a group differs from most: its step is finer by half octaves, because more
// depends on it, and its coefficients are larger by quarters of an octave. A byte says both.
struct KltToken {
  int8_t finer = 0;
  int8_t louder = 0;
  bool operator==(const KltToken&) const = default;
  // Quarters of an octave that its coefficients are above its step, more than others.
  int quarters() const { return louder + 2 * finer; }
};
inline constexpr int kKltLeastFiner = -3;
inline constexpr int kKltMostFiner = 12;
inline constexpr int kKltLeastLouder = -8;
inline constexpr int kKltMostLouder = 7;
std::byte ByteOf(KltToken token);
KltToken TokenOf(std::byte byte);
// step * 2^(-finer / 2).
float StepOf(KltToken token, float step);

// What tables say of levels.
struct KltStatistics {
  std::vector<kernels::RansTable> tables;  // [kKltTables]
  // [table][folded level]: how far the mean of what was rounded to a level lies above it, in steps.
  // Of level 0 only where an earlier cut found something (KltTableRefines): else it stands for
  // nothing, so that what a block does not say takes no time.
  std::array<std::array<float, kKltMeans>, kKltTables> mean{};
};
// Whether a table is of coefficients of which a level of an earlier cut was not 0.
bool KltTableRefines(size_t table);

// Immutable after its making, Thread-safe.
class KltLevels {
 public:
  // No tables: levels are rounded to the nearest, and can't be coded yet (under calibration).
  explicit KltLevels(const KltStatistics& statistics);

  // The level of x (in steps) that costs least, error and bits together, of the two around it.
  int32_t Round(float x, KltPlace place) const;
  // The same of all of x [places.coded()], which are in steps.
  void RoundAll(std::span<const float> x, const KltPlaces& places, KltLevelsRead* levels) const;
  // What a level stands for, in steps.
  float Value(int32_t level, KltPlace place) const {
    const auto of_level = static_cast<float>(level);
    if (place.low_bits > 0) return of_level;
    const size_t mean = std::min<size_t>(Folded(level), kKltMeans - 1);
    return of_level + mean_[static_cast<size_t>(place.table)][mean];
  }
  // The same of the level at i.
  float ValueAt(size_t i, const KltLevelsRead& read, const KltPlaces& places) const {
    const uint8_t folded = read.FoldedByte(i);
    const bool plain = places.low_bits[i] == 0;
    if (plain && folded < kKltSymbols) return value_[places.table[i]][folded];
    if (!plain && folded < KltLevelsRead::kLarger) return static_cast<float>(Unfolded(folded));
    return Value(read.Level(i), places.At(i));
  }
  // The symbol that a level has, and one that is folded.
  uint8_t SymbolOf(int32_t level, KltPlace place) const {
    return SymbolOfFolded(Folded(level), place);
  }
  uint8_t SymbolOfFolded(uint32_t folded, KltPlace place) const {
    const uint32_t high = std::min<uint32_t>(folded >> place.low_bits, kEscape);
    // What calibration never saw has no frequency.
    return symbol_.empty() ? static_cast<uint8_t>(high)
                           : symbol_[static_cast<size_t>(place.table)][high];
  }

  // Appends levels [places.coded()] to `out`.
  void Write(const KltLevelsRead& levels, const KltPlaces& places,
             std::vector<std::byte>* out) const;
  // Reads what Write made of as many levels at these places, and that takes all of `in`.
  // kDataLoss: it is something else; what was read is undefined then.
  Status Read(std::span<const std::byte> in, const KltPlaces& places, KltLevelsRead* read) const;

 private:
  // Levels between which rounding is a comparison: below the one level, or else the next.
  static constexpr int32_t kParted = kernels::kRoundedLevels;
  static constexpr int32_t kFirstParted = -kParted / 2;
  static constexpr int kEscape = kKltSymbols - 1;

  static bool IsNear(float x) {
    constexpr auto kNear = static_cast<float>(-kFirstParted - 1);
    return x > -kNear && x < kNear;
  }
  float Bits(int32_t level, KltPlace place) const;
  bool LowerCostsLess(float x, int32_t below, KltPlace place) const;

  std::array<std::array<float, kKltMeans>, kKltTables> mean_;
  // [table][folded level]: Value without low bits.
  std::vector<std::array<float, kKltSymbols>> value_;
  std::vector<std::array<float, kKltSymbols>> bits_;  // [table][symbol]; escapes with what follows
  // [table][symbol]: itself, or the last one where it has no frequency.
  std::vector<std::array<uint8_t, kKltSymbols>> symbol_;
  // [table][level - kFirstParted]: where the level below begins to cost more than the next one.
  std::vector<std::array<float, kParted>> parted_;
  kernels::RansEncodeTables encode_tables_;
  kernels::RansDecodeTables decode_tables_;
};

}  // namespace kvant::node
