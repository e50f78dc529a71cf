// Fits a codec pack to rows of state: predictors, transforms, and how often levels come
// (docs/klt.md, "Calibration").
#pragma once

#include <cstdint>
#include <memory>
#include <span>
#include <vector>

#include "base/status.h"
#include "kernels/dense_algebra.h"
#include "kernels/thread_pool.h"
#include "node/klt.h"
#include "node/klt_pack.h"

namespace kvant::node {

// Single-owner; borrows all. The pack has its geometry, weights and sink step, and transforms
// without bases.
class KltFit {
 public:
  KltFit(const Model* model, kernels::ThreadPool* pool, KltPack* pack)
      : model_(*model), pool_(pool), pack_(*pack) {}

  // A block to fit to. entering: [transform], as of KltCoder::Encode. rows:
  // [layer][kBlockTokens][width].
  void Add(int position, std::span<const std::vector<float>> entering, const KltCoder::Rows& rows);
  size_t blocks() const { return blocks_.size(); }

  // Sets all transforms' bases. importance: [transform][group], KltBasis's. Coefficients of less
  // than `least` are left out; sources are coded with `step`. kInvalidArgument: the rows don't
  // suffice, or are not finite.
  Status FitBases(std::span<const std::vector<std::vector<float>>> importance, float step,
                  float least);
  // Counts the levels of a part of the blocks at each of the coders' cuts, by all transforms,
  // twice: rounded to the nearest, then by what that costs; and sets the tables from `first_table`
  // on, `count` of them. cuts: of pack->cuts, as of KltCoder.
  void Count(std::span<const std::vector<size_t>> cuts, size_t first_table, size_t count);

 private:
  struct Block {
    int position = 0;
    std::vector<std::vector<uint16_t>> normalized;  // [transform], KltCoder::Normalized in bf16
    std::vector<std::vector<uint16_t>> rows;        // [layer][kBlockTokens][width], bf16
    std::vector<kernels::SparseRows> first;         // [group], as KltCoder::Code
  };
  // Sums over tokens, of a predictor's inputs z (the last one 1) and rows x.
  struct Moments {
    Moments(int inputs, int width) : zz(inputs, inputs), xz(width, inputs), xx(width, width) {}
    kernels::Matrix zz;
    kernels::Matrix xz;
    kernels::Matrix xx;
    int64_t tokens = 0;
  };
  struct Counts;
  std::unique_ptr<Counts> CountOnce(std::span<const std::vector<size_t>> cuts) const;

  // Those below are of a coder's transform.
  static std::vector<float> RowsOf(const KltCoder& coder, const Block& block, size_t group);
  std::vector<float> NormalizedOf(const KltCoder& coder, const Block& block) const;
  // What predicts a group, [kBlockTokens][KltBasis::inputs].
  std::vector<float> InputsOf(const KltCoder& coder, const Block& block, size_t group) const;
  // A group as CodeGroup codes it.
  void Code(const KltCoder& coder, const Block& block, size_t group,
            std::span<const kernels::SparseRows> first, const KltCoder::Watch* watch,
            KltCoder::Code* code) const;
  Moments MomentsOf(const KltCoder& coder, size_t group) const;
  // Sets everything of a basis but what sinks need.
  Status Solve(Moments moments, const KltGroup& group, float least, KltBasis* basis) const;
  // Sets what sinks need, and what the group's first coefficients are in all blocks.
  void Finish(const KltCoder& coder, size_t group, KltBasis* basis);

  const Model& model_;
  kernels::ThreadPool* pool_;
  KltPack& pack_;
  std::vector<Block> blocks_;
};

}  // namespace kvant::node
