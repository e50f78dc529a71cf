// What the cuts of a block say of its coefficients, most of which are 0.
#pragma once

#include <bit>
#include <cstddef>
#include <cstdint>
#include <vector>

namespace kvant::node {

// Coefficients of a block's tokens. A coefficient is here from its first level on that is not 0.
// Single-owner.
class KltValues {
 public:
  void Reset(size_t tokens, size_t coefficients) {
    tokens_ = tokens;
    coefficients_ = coefficients;
    words_ = (coefficients + kWord - 1) / kWord;
    here_.assign(tokens * words_, 0);
    below_.assign(tokens * words_, 0);
    values_.resize(tokens * coefficients);  // those that are not here are not read
  }
  size_t tokens() const { return tokens_; }
  size_t coefficients() const { return coefficients_; }

  // Those of one token, to be read and set.
  class Token {
   public:
    bool Here(size_t c) const { return (here_[c / kWord] & BitOf(c)) != 0; }
    // Whether its first level was below 0. REQUIRES: it is here.
    bool Below(size_t c) const { return (below_[c / kWord] & BitOf(c)) != 0; }
    // REQUIRES: it is here.
    float At(size_t c) const { return values_[c]; }
    // What refines a level counts away from zero. No branch: which sign it was says no other.
    void Refine(size_t c, float value) {
      constexpr int kSign = 31;
      const auto flip = static_cast<uint32_t>(below_[c / kWord] >> (c % kWord) & 1U) << kSign;
      values_[c] += std::bit_cast<float>(std::bit_cast<uint32_t>(value) ^ flip);
    }
    // Of the coefficients [64 word, 64 word + 64), the lowest first.
    uint64_t HereWord(size_t word) const { return here_[word]; }
    // REQUIRES: it is not here.
    void Begin(size_t c, float value, bool below) {
      here_[c / kWord] |= BitOf(c);
      if (below) below_[c / kWord] |= BitOf(c);
      values_[c] = value;
    }

   private:
    friend class KltValues;
    Token(uint64_t* here, uint64_t* below, float* values)
        : here_(here), below_(below), values_(values) {}
    uint64_t* here_;
    uint64_t* below_;
    float* values_;
  };
  Token At(size_t token) {
    return {here_.data() + token * words_, below_.data() + token * words_,
            values_.data() + token * coefficients_};
  }

  // Calls of(c, value) for a token's coefficients that are here, from `first` on, ascending.
  template <typename Of>
  void ForEach(size_t token, size_t first, Of of) const {
    for (size_t word = first / kWord; word < words_; ++word) {
      uint64_t bits = here_[token * words_ + word];
      if (word == first / kWord) bits &= ~uint64_t{0} << (first % kWord);
      for (; bits != 0; bits &= bits - 1) {
        const size_t c = word * kWord + static_cast<size_t>(std::countr_zero(bits));
        of(c, values_[token * coefficients_ + c]);
      }
    }
  }
  // All of them, [tokens][coefficients].
  std::vector<float> Dense() const {
    std::vector<float> dense(tokens_ * coefficients_);
    for (size_t token = 0; token < tokens_; ++token) {
      ForEach(token, 0, [&](size_t c, float value) { dense[token * coefficients_ + c] = value; });
    }
    return dense;
  }

 private:
  static constexpr size_t kWord = 64;
  static uint64_t BitOf(size_t c) { return uint64_t{1} << (c % kWord); }

  size_t tokens_ = 0;
  size_t coefficients_ = 0;
  size_t words_ = 0;
  std::vector<uint64_t> here_;   // [tokens][words_], a bit for each coefficient
  std::vector<uint64_t> below_;  // likewise
  std::vector<float> values_;    // [tokens][coefficients]
};

}  // namespace kvant::node
