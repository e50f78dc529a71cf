// The table of instruction sets: each row holds the hot loops, all rows give the same bits.
// Callers outside this folder use codec.h, attention.h, linear.h and vector.h.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <string_view>

#include "base/status.h"
#include "kernels/attention.h"
#include "kernels/codec.h"
#include "kernels/lossless.h"
#include "kernels/ordered_gemm.h"
#include "kernels/rans.h"
#include "kernels/tile_format.h"

namespace kvant::kernels {

// Of round_levels: below which of them x is rounded.
inline constexpr int kRoundedLevels = 64;

// All functions are pure and thread-safe. Immutable.
struct Implementation {
  std::string_view name;
  bool (*runs_here)();  // whether this CPU has the instructions

  // As Codec::encode and Codec::decode, for the tile formats.
  void (*tile_encode)(const TileFormat&, SegmentKind, const SegmentShape&, const float* x,
                      const MutableSegmentRanges& out, float* max_error);
  void (*tile_decode)(const TileFormat&, SegmentKind, const SegmentShape&, const SegmentRanges&,
                      float* out);
  void (*attend_tile)(const QueryBlock&, const LayerTile&, const Visible&, const LayerTile* next);
  void (*attend_raw)(const QueryBlock&, const RawTokens&, const Visible&);
  // As ordered_gemm.h says.
  void (*ordered_multiply)(const OrderedProduct&);
  void (*ordered_add_sparse)(const OrderedWeights&, const SparseTerms& x, float* out);
  // x[rows][inputs] as whole numbers, and a product of such.
  void (*factor_rows)(const float* x, int rows, int inputs, const CodedRows& to);
  void (*coded_multiply)(const CodedProduct&);
  void (*rms_norm)(const float* x, const float* weight, int rows, int width, float epsilon,
                   float* out);
  void (*silu_multiply)(float* gate, const float* up, size_t count);
  void (*gelu_multiply)(float* gate, const float* up, size_t count);
  void (*softmax)(float* x, size_t count);
  // Turns the pairs x[i] and x[half + i] of each of some vectors, `stride` floats apart, by angles
  // of which these are the cosines[half] and sines[half] times a factor; and takes that back.
  void (*rotate)(float* x, int vectors, size_t stride, int half, const float* cosines,
                 const float* sines);
  void (*rotate_back)(float* x, int vectors, size_t stride, int half, const float* cosines,
                      const float* sines);

  // Encodes symbols[count] with tables as RansEncodeTables has them, `alphabet` symbols long; the
  // words of the stream end at `end`, its states go to state[kRansLanes]. Returns where the words
  // begin. The 2 * count bytes before `end` may be written.
  std::byte* (*rans_encode)(const RansEncodeEntry* entries, int alphabet,
                            const uint8_t* table_of_symbol, const uint8_t* symbols, size_t count,
                            std::byte* end, uint32_t* state);
  // Decodes count symbols from the words in from[size] with state[kRansLanes], which is left as the
  // last symbols leave it. Returns the bytes not read; never 0 when words were missing.
  size_t (*rans_decode)(const uint32_t* entries, const uint8_t* table_of_symbol,
                        const std::byte* from, size_t size, uint8_t* symbols, size_t count,
                        uint32_t* state);
  // Writes the ascending indices of the bytes[count] that are not 0 to `at`, which has room for all
  // of them and 32 more. Returns how many they are. REQUIRES: count <= 65536.
  size_t (*not_zero)(const uint8_t* bytes, size_t count, uint16_t* at);
  // Rounds x[count] to the lower one, n, of the two whole numbers around it where it is below
  // parted[table][n + kRoundedLevels / 2], else to the next. folded[count]: 0, 1, -1, 2, ... as 0,
  // 1, 2, 3, ... What is not nearer to 0 than kRoundedLevels / 2 - 1 counts as 0, and makes the
  // result false. parted: of 256 tables at most, [table][kRoundedLevels].
  bool (*round_levels)(const float* x, const uint8_t* table, size_t count, const float* parted,
                       uint8_t* folded);
  // The largest exponent of each row of raw[rows][width].
  void (*lossless_tops)(const uint16_t* raw, size_t rows, size_t width, uint8_t* tops);
  // Symbols, pairs of them, and signs and mantissas of raw[rows][width], an even number of
  // elements. Returns how many symbols are kEscape.
  size_t (*lossless_split)(const uint16_t* raw, size_t rows, size_t width, const uint8_t* tops,
                           uint8_t* symbols, uint8_t* pairs, uint8_t* rest);
  // The reverse, from the pairs; what stands for kEscape is left to the caller. Returns as above.
  size_t (*lossless_merge)(const uint8_t* pairs, const uint8_t* rest, size_t rows, size_t width,
                           const uint8_t* tops, uint8_t* symbols, uint16_t* raw);
};

// In order of preference, the scalar reference last.
std::span<const Implementation* const> Implementations();

// The implementation that `name` asks for; empty: the first that runs here. kInvalidArgument lists
// the names there are; kUnsupported: this CPU lacks the instructions.
Result<const Implementation*> FindImplementation(std::string_view name);

// Chooses by the environment variable KVANT_ISA, once; later calls return the first result.
// main() calls it to report a wrong name; kernels that are used before read the variable
// themselves and end the process with the same message.
Status ChooseImplementation();
const Implementation& ActiveImplementation();

}  // namespace kvant::kernels
