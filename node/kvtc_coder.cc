#include "node/kvtc_coder.h"

#include <fmt/format.h>
#include <zlib.h>

#include <algorithm>
#include <iterator>
#include <utility>
#include <vector>

#include "base/check.h"
#include "kernels/blas.h"
#include "kernels/float_formats.h"

namespace kvant::node {
namespace {

size_t Size(int count) { return static_cast<size_t>(count); }

// Numbers of a few bits each, one after the other. Value.
class BitString {
 public:
  void Append(uint16_t value, int bits) {
    for (int i = 0; i < bits; ++i) {
      if (used_ % 8 == 0) bytes_.push_back(0);
      bytes_.back() = static_cast<uint8_t>(bytes_.back() | (((value >> i) & 1) << (used_ % 8)));
      ++used_;
    }
  }
  // The next number begins a byte.
  void Align() { used_ = 8 * bytes_.size(); }
  uint64_t DeflatedBytes() const {
    std::vector<uint8_t> out(compressBound(bytes_.size()));
    uLongf size = out.size();
    KV_CHECK(compress2(out.data(), &size, bytes_.data(), bytes_.size(), Z_BEST_COMPRESSION) ==
             Z_OK);
    return size;
  }

 private:
  std::vector<uint8_t> bytes_;
  size_t used_ = 0;  // bits
};

// What is stored of some tokens' components.
struct Codes {
  int tokens = 0;
  int reached = 0;               // components
  std::vector<uint16_t> codes;   // [tokens][reached]
  std::vector<uint16_t> scales;  // [tokens][groups][2]
};

// All that is stored, in the order that DEFLATE likes best.
uint64_t StoredBytes(const std::vector<KvtcGroup>& groups, const Codes& codes) {
  BitString by_token;      // a token's groups, each behind its shift and scale
  BitString by_component;  // packed; shifts and scales of all tokens first
  BitString by_byte;       // the same, one code a byte
  const auto scale = [&](size_t token, size_t group, size_t which) {
    return codes.scales[(token * groups.size() + group) * 2 + which];
  };
  const auto code = [&](size_t token, size_t component) {
    return codes.codes[token * Size(codes.reached) + component];
  };
  const size_t tokens = Size(codes.tokens);
  for (size_t token = 0; token < tokens; ++token) {
    size_t component = 0;
    for (size_t g = 0; g < groups.size(); ++g) {
      if (groups[g].bits != kKvtcPlain) {
        for (size_t which : {0, 1}) by_token.Append(scale(token, g, which), 16);
      }
      for (int i = 0; i < groups[g].size; ++i) {
        by_token.Append(code(token, component++), groups[g].bits);
      }
      by_token.Align();
    }
  }
  size_t first = 0;
  for (size_t g = 0; g < groups.size(); ++g) {
    const bool plain = groups[g].bits == kKvtcPlain;
    for (size_t which = 0; which < 2 && !plain; ++which) {
      for (size_t token = 0; token < tokens; ++token) {
        by_component.Append(scale(token, g, which), 16);
        by_byte.Append(scale(token, g, which), 16);
      }
    }
    for (size_t i = 0; i < Size(groups[g].size); ++i) {
      for (size_t token = 0; token < tokens; ++token) {
        by_component.Append(code(token, first + i), groups[g].bits);
        by_byte.Append(code(token, first + i), plain ? 16 : 8);
      }
      by_component.Align();
    }
    first += Size(groups[g].size);
  }
  return 1 + std::min(
                 {by_token.DeflatedBytes(), by_component.DeflatedBytes(), by_byte.DeflatedBytes()});
}

class KvtcCoder final : public StateCoder {
 public:
  KvtcCoder(std::string name, const Model* model, std::shared_ptr<const KvtcPack> pack, int window)
      : name_(std::move(name)), model_(*model), pack_(std::move(pack)), window_(window) {}

  std::string_view name() const override { return name_; }
  std::vector<std::string> wires() const override {
    std::vector<std::string> names;
    for (const int ratio : kKvtcRatios) names.push_back(fmt::format("{}x", ratio));
    return names;
  }
  bool blockwise() const override { return false; }
  uint64_t table_bytes() const override {
    return pack_->keys.table_bytes() + pack_->values.table_bytes();
  }

  void Code(const PrefixState& exact, const Sink& sink) const override {
    const int first = std::min(kKvtcSinks, exact.tokens());
    const int end = std::max(first, exact.tokens() - window_);
    PrefixState decoded = exact;
    for (int layer = 0; layer < exact.layers(); ++layer) {
      const auto tokens = Size(exact.tokens());
      Round(decoded.keys(layer), tokens * exact.key_width());
      Round(decoded.values(layer), tokens * exact.value_width());
    }
    const uint64_t kept =
        16 * exact.elements() / Size(exact.tokens()) * Size(exact.tokens() - (end - first));
    const std::vector<float> keys = Components(exact, true, first, end);
    const std::vector<float> values = Components(exact, false, first, end);
    for (size_t wire = 0; wire < std::size(kKvtcRatios); ++wire) {
      uint64_t bits = kept;
      if (end > first) {
        bits += CodePart(keys, true, wire, first, end, &decoded);
        bits += CodePart(values, false, wire, first, end, &decoded);
      }
      sink(wire, decoded, {.bits = bits});
    }
  }

 private:
  static void Round(float* x, size_t count) {
    std::transform(x, x + count, x, [](float v) { return kernels::FromBf16(kernels::ToBf16(v)); });
  }

  const KvtcBasis& BasisOf(bool of_keys) const { return of_keys ? pack_->keys : pack_->values; }

  // [end - first][rank]
  std::vector<float> Components(const PrefixState& exact, bool of_keys, int first, int end) const {
    const KvtcBasis& basis = BasisOf(of_keys);
    std::vector<float> rows = KvtcRows(model_, exact, of_keys, first, end);
    for (size_t i = 0; i < rows.size(); ++i) rows[i] -= basis.mean[i % basis.mean.size()];
    std::vector<float> components(Size(end - first) * Size(basis.rank));
    if (components.empty()) return components;
    kernels::LoadedSgemm()(kernels::kBlasRowMajor, kernels::kBlasNoTranspose,
                           kernels::kBlasTranspose, end - first, basis.rank, basis.width, 1.0F,
                           rows.data(), basis.width, basis.vectors.data(), basis.width, 0.0F,
                           components.data(), basis.rank);
    return components;
  }

  uint64_t CodePart(std::vector<float> components, bool of_keys, size_t wire, int first, int end,
                    PrefixState* decoded) const {
    const KvtcBasis& basis = BasisOf(of_keys);
    const std::vector<KvtcGroup>& groups = basis.allocations[wire];
    Codes stored;
    stored.tokens = end - first;
    for (const KvtcGroup& group : groups) stored.reached += group.size;
    stored.codes.resize(Size(stored.tokens) * Size(stored.reached));
    stored.scales.resize(Size(stored.tokens) * groups.size() * 2);
    for (size_t token = 0; token < Size(stored.tokens); ++token) {
      float* x = components.data() + token * Size(basis.rank);
      uint16_t* codes = stored.codes.data() + token * Size(stored.reached);
      for (size_t g = 0; g < groups.size(); ++g) {
        QuantizeKvtcGroup(groups[g], x, codes,
                          stored.scales.data() + (token * groups.size() + g) * 2);
        x += groups[g].size;
        codes += groups[g].size;
      }
    }
    std::vector<float> rows(Size(stored.tokens) * Size(basis.width));
    for (size_t i = 0; i < rows.size(); ++i) rows[i] = basis.mean[i % basis.mean.size()];
    if (stored.reached > 0) {
      kernels::LoadedSgemm()(kernels::kBlasRowMajor, kernels::kBlasNoTranspose,
                             kernels::kBlasNoTranspose, stored.tokens, basis.width, stored.reached,
                             1.0F, components.data(), basis.rank, basis.vectors.data(), basis.width,
                             1.0F, rows.data(), basis.width);
    }
    SetKvtcRows(model_, rows, of_keys, first, end, decoded);
    return 8 * StoredBytes(groups, stored);
  }

  std::string name_;
  const Model& model_;
  std::shared_ptr<const KvtcPack> pack_;
  int window_;
};

}  // namespace

std::unique_ptr<StateCoder> MakeKvtcCoder(std::string name, const Model* model,
                                          std::shared_ptr<const KvtcPack> pack, int window) {
  return std::make_unique<KvtcCoder>(std::move(name), model, std::move(pack), window);
}

}  // namespace kvant::node
