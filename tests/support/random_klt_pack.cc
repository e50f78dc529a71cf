#include "tests/support/random_klt_pack.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <functional>

#include "base/bytes.h"
#include "kernels/dense_algebra.h"
#include "kernels/float_formats.h"

namespace kvant::support {
namespace {

using kernels::Matrix;

float Bf16(double value) { return kernels::FromBf16(kernels::ToBf16(static_cast<float>(value))); }

std::vector<float> Normals(size_t count, double deviation, Random* random) {
  std::vector<float> numbers(count);
  for (float& number : numbers) number = static_cast<float>(deviation * random->Normal());
  return numbers;
}
std::vector<float> Rounded(const std::vector<double>& values) {
  std::vector<float> rounded;
  for (const double value : values) rounded.push_back(Bf16(value));
  return rounded;
}

// I - 2 v v^T / v^T v, its own inverse (Householder 1958).
Matrix Reflection(int size, Random* random) {
  std::vector<double> v;
  double square = 0;
  for (int i = 0; i < size; ++i) {
    v.push_back(random->Normal());
    square += v.back() * v.back();
  }
  Matrix out(size, size);
  for (int i = 0; i < size; ++i) {
    for (int j = 0; j < size; ++j) {
      out.At(i, j) =
          (i == j ? 1 : 0) - 2 * v[static_cast<size_t>(i)] * v[static_cast<size_t>(j)] / square;
    }
  }
  return out;
}

// A weight of one layer, and the inverse of its root.
struct Weight {
  Matrix weight;
  Matrix inverse_root;
};
Weight RandomWeight(int size, bool weighted, Random* random) {
  const Matrix turn = Reflection(size, random);
  Matrix of_weight(size, size);
  Matrix of_root(size, size);
  for (int i = 0; i < size; ++i) {
    const double root = std::exp2(random->Unit() - 0.5);
    of_weight.At(i, i) = weighted ? root * root : 1;
    of_root.At(i, i) = weighted ? 1 / root : 1;
  }
  if (!weighted) return {of_weight, of_root};
  const auto turned = [&](const Matrix& diagonal) {
    return kernels::Product(kernels::Product(turn, diagonal), turn);
  };
  return {turned(of_weight), turned(of_root)};
}

std::vector<float> Deviations(int count, Random* random) {
  std::vector<float> deviations;
  for (int c = 0; c < count; ++c)
    deviations.push_back(static_cast<float>(std::exp2(-6 + 13 * random->Unit())));
  return deviations;
}

// inverse_roots: of the group's layers.
node::KltBasis RandomBasis(const node::KltPack& pack, const node::KltTransform& transform,
                           const std::vector<Matrix>& inverse_roots, Random* random) {
  const size_t group = transform.bases.size();
  node::KltBasis basis;
  basis.width = pack.width * static_cast<int>(inverse_roots.size());
  basis.coefficients = group == 0 ? basis.width : basis.width * 3 / 4;
  basis.inputs = node::InputsOf(pack, transform, group);
  const auto width = static_cast<size_t>(basis.width);
  basis.bias = Normals(width, 1, random);
  basis.sink_bias = Normals(width, 1, random);
  basis.importance = Normals(1 + 2 * inverse_roots.size(), 0.3, random);
  std::vector<float> predictor = Normals(width * static_cast<size_t>(basis.inputs), 0.1, random);
  for (float& number : predictor) number = Bf16(static_cast<double>(number));
  basis.predictor = kernels::OrderedWeights(predictor.data(), basis.width, basis.inputs);

  const Matrix turn = Reflection(basis.width, random);
  std::vector<double> synthesis;
  for (size_t l = 0; l < inverse_roots.size(); ++l) {
    Matrix rows(pack.width, basis.coefficients);
    for (int i = 0; i < pack.width; ++i) {
      for (int c = 0; c < basis.coefficients; ++c)
        rows.At(i, c) = turn.At(static_cast<int>(l) * pack.width + i, c);
    }
    const Matrix product = kernels::Product(inverse_roots[l], rows);
    synthesis.insert(synthesis.end(), product.values.begin(), product.values.end());
  }
  basis.synthesis =
      kernels::OrderedWeights(Rounded(synthesis).data(), basis.width, basis.coefficients);
  basis.deviation = Deviations(basis.coefficients, random);
  std::sort(basis.deviation.begin(), basis.deviation.end(), std::greater<>());
  for (auto& deviation : basis.sink_deviation) deviation = Deviations(basis.coefficients, random);
  node::SetAnalysis(pack, transform.groups[group], &basis);
  return basis;
}

}  // namespace

node::KltPack RandomKltPack(const node::Model& model, Random* random,
                            const RandomKltPackOptions& options) {
  node::KltPack pack;
  pack.width = node::StateWidth(model.config());
  pack.hidden = model.config().hidden;
  pack.layers = model.config().layers;
  pack.model = ToHex(model.digest());
  pack.calibrated_on = "nothing";
  pack.group_width = options.group_width;
  const std::vector<node::KltCut> cuts = {
      {"finest", 0.125F, 1e-4F}, {"fine", 0.5F, 1e-3F}, {"medium", 1, 1e-2F}, {"coarse", 2, 0.1F}};
  pack.refining = {3, 1, 0};
  pack.sink_step = 0.0625F;
  std::vector<Matrix> inverse_roots;
  for (int layer = 0; layer < pack.layers; ++layer) {
    Weight weight = RandomWeight(pack.width, options.weighted, random);
    pack.weights.push_back(Rounded(weight.weight.values));
    inverse_roots.push_back(std::move(weight.inverse_root));
  }
  // A reader may recompute one layer, if that leaves any.
  for (int recomputed = 0; recomputed < std::min(2, pack.layers - 1); ++recomputed) {
    node::KltTransform transform;
    transform.recomputed = recomputed;
    transform.cuts = cuts;
    transform.groups = node::KltGroups(model.config(), transform.first_layer(), pack.group_width);
    for (const node::KltGroup& group : transform.groups) {
      std::vector<Matrix> of_group;
      for (const int layer : group.layers)
        of_group.push_back(inverse_roots[static_cast<size_t>(layer)]);
      transform.bases.push_back(RandomBasis(pack, transform, of_group, random));
    }
    pack.transforms.push_back(std::move(transform));
  }
  for (size_t table = 0; table < node::kKltTables; ++table) {
    std::array<uint32_t, node::kKltSymbols> counts{};
    // Some symbols have no frequency: what calibration never saw.
    for (uint32_t& count : counts) count = static_cast<uint32_t>(random->Below(30));
    counts[node::kKltSymbols - 1] += 1;
    pack.statistics.tables.push_back(kernels::RansTable::FromCounts(counts));
    for (float& mean : pack.statistics.mean[table])
      mean = static_cast<float>(0.1 * (random->Unit() - 0.5));
    if (!node::KltTableRefines(table)) pack.statistics.mean[table][0] = 0;
  }
  return pack;
}

KltBlock RandomKltBlock(const node::Model& model, double deviation, Random* random) {
  const node::ModelConfig& config = model.config();
  KltBlock block;
  for (int i = 0; i < node::kBlockTokens; ++i)
    block.tokens.push_back(
        static_cast<int32_t>(random->Below(static_cast<uint64_t>(config.vocab))));
  const auto size = static_cast<size_t>(node::kBlockTokens * node::StateWidth(config));
  for (int layer = 0; layer < config.layers; ++layer)
    block.rows.push_back(Normals(size, deviation, random));
  return block;
}

}  // namespace kvant::support
