// What a klt block's decoded rows lack of exact bf16 (docs/klt.md, "Exact"): segments of codec
// `raw`, coded given what the cuts before say of each of their numbers. Any bits can be coded; what
// was said well takes few.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

#include "base/status.h"
#include "kernels/codec.h"
#include "kernels/rans.h"

namespace kvant::node {

// One segment of a group and what is known of it.
struct ExactSegment {
  kernels::SegmentKind kind = kernels::SegmentKind::kKey;
  kernels::SegmentShape shape;
  const float* decoded = nullptr;  // as a LayerSink gets them: [tokens][kv_heads][head_dim]
};

// Immutable after its making, Thread-safe. Making one takes some milliseconds; its tables are the
// same on every machine.
class KltExact {
 public:
  KltExact();

  // Appends the extent of these segments to `out`, in at most Bound bytes of all their elements.
  // raw: [segment], elements in the order of `raw` (block-format.md, "Raw"), any bits.
  void Encode(std::span<const ExactSegment> segments, std::span<const uint16_t* const> raw,
              std::vector<std::byte>* out) const;
  // Reads an extent that takes all of `in`. kDataLoss: it is not well-formed, or does not give the
  // numbers that were encoded, e.g. because what was decoded before differs; raw is undefined then,
  // but was only ever written inside its bounds.
  Status Decode(std::span<const std::byte> in, std::span<const ExactSegment> segments,
                std::span<uint16_t* const> raw) const;

  // A word of rANS and 16 bits for each element; of a segment a checksum, a scale, and half a byte
  // for each channel, of which there is at least one element.
  static constexpr uint64_t Bound(uint64_t segments, uint64_t elements) {
    return segments * 11 + elements / 2 + sizeof(uint32_t) + kernels::RansBound(elements) +
           elements * 2;
  }

 private:
  kernels::RansEncodeTables encode_tables_;
  kernels::RansDecodeTables decode_tables_;
  std::vector<std::vector<bool>> coded_;  // [table][symbol]
};

}  // namespace kvant::node
