#include "node/klt_fit.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <memory>
#include <mutex>
#include <utility>

#include "base/check.h"
#include "kernels/float_formats.h"

namespace kvant::node {
namespace {

using kernels::Matrix;

constexpr double kRidge = 1e-4;   // of the mean square of an input
constexpr int kPanelBlocks = 32;  // whose products are taken together
constexpr size_t kCounted = 96;   // blocks whose levels are counted, at most
constexpr int64_t kFewest = 50;   // levels that give a mean

float Rounded(double value) {
  return kernels::FromBf16(kernels::ToBf16(static_cast<float>(value)));
}

// A weight's root, and the inverse of that.
struct Roots {
  Matrix root;
  Matrix inverse;
};
Result<Roots> RootsOf(const std::vector<float>& weight, int width) {
  Matrix matrix(width, width);
  std::copy(weight.begin(), weight.end(), matrix.values.begin());
  KV_ASSIGN_OR_RETURN(const kernels::Eigen eigen, kernels::SymmetricEigen(std::move(matrix)));
  const auto power = [&](double exponent) {
    Matrix scaled = eigen.vectors;
    Matrix turned(width, width);
    for (int i = 0; i < width; ++i) {
      const double value =
          std::max(eigen.values[static_cast<size_t>(i)], eigen.values.back() * 1e-9);
      for (int c = 0; c < width; ++c) {
        turned.At(c, i) = scaled.At(i, c);
        scaled.At(i, c) *= std::pow(value, exponent);
      }
    }
    return kernels::Product(turned, scaled);
  };
  return Roots{power(0.5), power(-0.5)};
}

std::vector<uint16_t> Halves(std::span<const float> from) {
  std::vector<uint16_t> halves;
  halves.reserve(from.size());
  for (const float number : from) halves.push_back(kernels::ToBf16(number));
  return halves;
}
std::vector<float> Floats(std::span<const uint16_t> from) {
  std::vector<float> floats;
  floats.reserve(from.size());
  for (const uint16_t number : from) floats.push_back(kernels::FromBf16(number));
  return floats;
}

void Add(const Matrix& from, Matrix* to) {
  for (size_t i = 0; i < to->values.size(); ++i) to->values[i] += from.values[i];
}

}  // namespace

void KltFit::Add(int position, std::span<const std::vector<float>> entering,
                 const KltCoder::Rows& rows) {
  KV_CHECK(entering.size() == pack_.transforms.size());
  Block& block = blocks_.emplace_back();
  block.position = position;
  for (const std::vector<float>& of_transform : entering)
    block.normalized.push_back(Halves(KltCoder::Normalized(of_transform, pack_.hidden)));
  for (const std::vector<float>& of_layer : rows) block.rows.push_back(Halves(of_layer));
}

std::vector<float> KltFit::RowsOf(const KltCoder& coder, const Block& block, size_t group) {
  KltCoder::Rows rows(block.rows.size());
  for (const int layer : coder.transform().groups[group].layers)
    rows[static_cast<size_t>(layer)] = Floats(block.rows[static_cast<size_t>(layer)]);
  return coder.Gathered(group, rows);
}

std::vector<float> KltFit::NormalizedOf(const KltCoder& coder, const Block& block) const {
  const auto transform = static_cast<size_t>(&coder.transform() - pack_.transforms.data());
  return Floats(block.normalized[transform]);
}

std::vector<float> KltFit::InputsOf(const KltCoder& coder, const Block& block, size_t group) const {
  const auto inputs = static_cast<size_t>(coder.transform().bases[group].inputs);
  const auto hidden = static_cast<size_t>(pack_.hidden);
  const std::vector<float> normalized = NormalizedOf(coder, block);
  std::vector<float> all(kBlockTokens * inputs);
  for (size_t token = 0; token < kBlockTokens; ++token) {
    float* to = all.data() + token * inputs;
    std::copy_n(normalized.data() + token * hidden, hidden, to);
    to += hidden;
    for (const int of : coder.transform().groups[group].sources) {
      const auto source = static_cast<size_t>(of);
      const kernels::SparseRows& first = block.first[source];
      for (size_t t = first.begin()[token]; t < first.begin()[token + 1]; ++t)
        to[first.inputs()[t]] = first.factors()[t];
      to += SourceCoefficients(coder.transform().bases[source]);
    }
  }
  return all;
}

void KltFit::Code(const KltCoder& coder, const Block& block, size_t group,
                  std::span<const kernels::SparseRows> first, const KltCoder::Watch* watch,
                  KltCoder::Code* code) const {
  std::vector<float> left = RowsOf(coder, block, group);
  const std::vector<int8_t> finer = coder.Finer(group, left);
  const KltSide side = KltSide::OfNormalized(&coder, NormalizedOf(coder, block));
  std::vector<float> predicted;
  coder.Predict(group, side, first, block.position, &predicted);
  for (size_t i = 0; i < left.size(); ++i) left[i] -= predicted[i];
  coder.CodeGroup(group, block.position, left, finer, code, watch);
}

KltFit::Moments KltFit::MomentsOf(const KltCoder& coder, size_t group) const {
  const KltBasis& basis = coder.transform().bases[group];
  const int inputs = basis.inputs + 1;
  const int panels = static_cast<int>((blocks_.size() + kPanelBlocks - 1) / kPanelBlocks);
  Moments sums(inputs, basis.width);
  std::mutex mutex;
  const int workers = std::min(panels, pool_->threads());
  pool_->ParallelFor(workers, [&](int worker) {
    Moments own(inputs, basis.width);
    std::vector<float> z;
    std::vector<float> x;
    for (int panel = worker; panel < panels; panel += workers) {
      z.clear();
      x.clear();
      const size_t begin = static_cast<size_t>(panel) * kPanelBlocks;
      for (size_t b = begin; b < std::min(begin + kPanelBlocks, blocks_.size()); ++b) {
        const Block& block = blocks_[b];
        const std::vector<float> of_block = InputsOf(coder, block, group);
        const std::vector<float> rows = RowsOf(coder, block, group);
        for (int token = block.position == 0 ? kKltSinks : 0; token < kBlockTokens; ++token) {
          const auto at = of_block.begin() + static_cast<ptrdiff_t>(token) * basis.inputs;
          z.insert(z.end(), at, at + basis.inputs);
          z.push_back(1.0F);
          const auto row = rows.begin() + static_cast<ptrdiff_t>(token) * basis.width;
          x.insert(x.end(), row, row + basis.width);
        }
      }
      const int tokens = static_cast<int>(x.size()) / basis.width;
      kernels::AddProducts(z.data(), z.data(), tokens, inputs, inputs, &own.zz);
      kernels::AddProducts(x.data(), z.data(), tokens, basis.width, inputs, &own.xz);
      kernels::AddProducts(x.data(), x.data(), tokens, basis.width, basis.width, &own.xx);
      own.tokens += tokens;
    }
    const std::lock_guard<std::mutex> lock(mutex);
    node::Add(own.zz, &sums.zz);
    node::Add(own.xz, &sums.xz);
    node::Add(own.xx, &sums.xx);
    sums.tokens += own.tokens;
  });
  return sums;
}

Status KltFit::Solve(Moments moments, const KltGroup& group, float least, KltBasis* basis) const {
  const int width = basis->width;
  const int inputs = basis->inputs + 1;
  // Ridge regression. The parts of the input differ in scale: each is held by its own square.
  double trace = 0;
  for (int i = 0; i < inputs; ++i) trace += moments.zz.At(i, i);
  Matrix held = moments.zz;
  for (int i = 0; i < inputs; ++i)
    held.At(i, i) += kRidge * (held.At(i, i) + 1e-3 * trace / inputs);
  KV_ASSIGN_OR_RETURN(Matrix solved, kernels::SolvePositive(std::move(held), moments.xz));
  std::vector<float> predictor;
  predictor.reserve(static_cast<size_t>(width) * static_cast<size_t>(basis->inputs));
  basis->bias.clear();
  for (int c = 0; c < width; ++c) {
    for (int i = 0; i < basis->inputs; ++i) {
      predictor.push_back(Rounded(solved.At(c, i)));
      solved.At(c, i) = static_cast<double>(predictor.back());
    }
    basis->bias.push_back(static_cast<float>(solved.At(c, basis->inputs)));
  }
  basis->predictor = kernels::OrderedWeights(predictor.data(), width, basis->inputs);

  // What is left: sum of (x - P z)(x - P z)^T = xx - P zx - (P zx)^T + P zz P^T.
  const Matrix explained = kernels::ProductTransposed(solved, moments.xz);
  const Matrix squared = kernels::ProductTransposed(kernels::Product(solved, moments.zz), solved);
  Matrix& left = moments.xx;
  for (int a = 0; a < width; ++a) {
    for (int b = 0; b < width; ++b)
      left.At(a, b) += squared.At(a, b) - explained.At(a, b) - explained.At(b, a);
  }
  // Into the space where an error costs the same in every direction, layer by layer.
  const auto& layers = group.layers;
  std::vector<Roots> roots;
  for (const int layer : layers) {
    KV_ASSIGN_OR_RETURN(roots.emplace_back(),
                        RootsOf(pack_.weights[static_cast<size_t>(layer)], pack_.width));
  }
  std::vector<float> weighted(static_cast<size_t>(width) * static_cast<size_t>(width));
  for (size_t a = 0; a < layers.size(); ++a) {
    for (size_t b = 0; b < layers.size(); ++b) {
      const int row = static_cast<int>(a) * pack_.width;
      const int column = static_cast<int>(b) * pack_.width;
      Matrix part(pack_.width, pack_.width);
      for (int i = 0; i < pack_.width; ++i) {
        for (int j = 0; j < pack_.width; ++j)
          part.At(i, j) = left.At(row + i, column + j) / static_cast<double>(moments.tokens);
      }
      part = kernels::Product(kernels::Product(roots[a].root, part), roots[b].root);
      for (int i = 0; i < pack_.width; ++i) {
        for (int j = 0; j < pack_.width; ++j)
          weighted[static_cast<size_t>((row + i) * width + column + j)] =
              static_cast<float>(part.At(i, j));
      }
    }
  }
  std::vector<float> squares;
  KV_RETURN_IF_ERROR(kernels::SymmetricEigen(width, weighted.data(), &squares));

  // The largest first.
  basis->deviation.clear();
  for (int i = width - 1; i >= 0; --i) {
    const float deviation = std::sqrt(std::max(squares[static_cast<size_t>(i)], 0.0F));
    if (deviation < least && !basis->deviation.empty()) break;
    basis->deviation.push_back(deviation);
  }
  basis->coefficients = static_cast<int>(basis->deviation.size());
  Matrix vectors(basis->coefficients, width);
  for (int c = 0; c < basis->coefficients; ++c) {
    for (int i = 0; i < width; ++i)
      vectors.At(c, i) =
          static_cast<double>(weighted[static_cast<size_t>((width - 1 - c) * width + i)]);
  }
  std::vector<float> synthesis;
  for (size_t a = 0; a < layers.size(); ++a) {
    Matrix part(basis->coefficients, pack_.width);
    for (int c = 0; c < basis->coefficients; ++c) {
      for (int i = 0; i < pack_.width; ++i)
        part.At(c, i) = vectors.At(c, static_cast<int>(a) * pack_.width + i);
    }
    // inverse is symmetric
    const Matrix rows = kernels::ProductTransposed(roots[a].inverse, part);
    for (const double value : rows.values) synthesis.push_back(Rounded(value));
  }
  basis->synthesis = kernels::OrderedWeights(synthesis.data(), width, basis->coefficients);
  SetAnalysis(pack_, group, basis);
  return OkStatus();
}

void KltFit::Finish(const KltCoder& coder, size_t group, KltBasis* basis) {
  const auto width = static_cast<size_t>(basis->width);
  const auto count = static_cast<size_t>(basis->coefficients);
  std::vector<double> first_rows(width);
  size_t sequences = 0;
  for (const Block& block : blocks_) {
    if (block.position != 0) continue;
    ++sequences;
    const std::vector<float> rows = RowsOf(coder, block, group);
    for (size_t i = 0; i < width; ++i) first_rows[i] += static_cast<double>(rows[i]);
  }
  basis->sink_bias.clear();
  for (const double sum : first_rows)
    basis->sink_bias.push_back(
        static_cast<float>(sum / static_cast<double>(std::max<size_t>(1, sequences))));
  basis->sink_deviation.fill(basis->deviation);

  std::array<std::vector<double>, 2> squares{std::vector<double>(count),
                                             std::vector<double>(count)};
  std::mutex mutex;
  pool_->ParallelFor(static_cast<int>(blocks_.size()), [&](int b) {
    Block& block = blocks_[static_cast<size_t>(b)];
    KltCoder::Code code;
    Code(coder, block, group, block.first, nullptr, &code);
    block.first[group] = code.first;
    if (block.position != 0) return;
    const std::lock_guard<std::mutex> lock(mutex);
    for (size_t i = 0; i < kKltSinks * count; ++i)
      squares[i < count ? 0 : 1][i % count] += std::pow(code.coefficients[i], 2);
  });
  for (size_t kind = 0; kind < 2; ++kind) {
    const double tokens = static_cast<double>(sequences) * (kind == 0 ? 1 : kKltSinks - 1);
    for (size_t c = 0; c < count && sequences > 0; ++c)
      basis->sink_deviation[kind][c] = static_cast<float>(std::sqrt(squares[kind][c] / tokens));
  }
}

Status KltFit::FitBases(std::span<const std::vector<std::vector<float>>> importance, float step,
                        float least) {
  if (blocks_.empty()) return InvalidArgument("there is no block to fit a codec pack to");
  for (size_t t = 0; t < pack_.transforms.size(); ++t) {
    KltTransform& transform = pack_.transforms[t];
    transform.cuts = {{"", step, 0}};
    for (Block& block : blocks_) block.first.assign(transform.groups.size(), {});
    for (size_t group = 0; group < transform.groups.size(); ++group) {
      const int inputs = node::InputsOf(pack_, transform, group);
      KltBasis& basis = transform.bases.emplace_back();
      basis.width = pack_.width * static_cast<int>(transform.groups[group].layers.size());
      basis.inputs = inputs;
      basis.importance = importance[t][group];
      // A coder knows the bases that there are when it is made.
      const KltCoder before(&model_, &pack_, {0}, t);
      KV_RETURN_IF_ERROR(Solve(MomentsOf(before, group), transform.groups[group], least, &basis));
      const KltCoder coder(&model_, &pack_, {0}, t);
      Finish(coder, group, &basis);
    }
  }
  return OkStatus();
}

struct KltFit::Counts {
  struct Mean {
    double total = 0;
    int64_t count = 0;
  };
  std::array<std::array<uint32_t, kKltSymbols>, kKltTables> levels{};
  std::array<std::array<Mean, kKltMeans>, kKltTables> means{};
};

std::unique_ptr<KltFit::Counts> KltFit::CountOnce(std::span<const std::vector<size_t>> cuts) const {
  std::vector<std::unique_ptr<KltCoder>> coders;
  for (size_t t = 0; t < pack_.transforms.size(); ++t) {
    for (const std::vector<size_t>& of : cuts)
      coders.push_back(std::make_unique<KltCoder>(&model_, &pack_, of, t));
  }
  const KltLevels levels(pack_.statistics);
  const size_t every = std::max<size_t>(1, blocks_.size() / kCounted);
  const size_t counted = blocks_.size() / every;
  auto sums = std::make_unique<Counts>();
  std::mutex mutex;
  pool_->ParallelFor(static_cast<int>(counted), [&](int piece) {
    const Block& block = blocks_[static_cast<size_t>(piece) * every];
    auto own = std::make_unique<Counts>();
    for (const std::unique_ptr<KltCoder>& coder : coders) {
      std::vector<kernels::SparseRows> first;
      KltCoder::Code code;
      const KltCoder::Watch watch = [&](size_t cut, const KltCoder::Code& code_so_far) {
        const KltCoder::Code::OfCut& of = code_so_far.cuts[cut];
        for (size_t i = 0; i < of.read.size(); ++i) {
          const KltPlace place = of.places.At(i);
          const auto table = static_cast<size_t>(place.table);
          const int32_t level = of.read.Level(i);
          ++own->levels[table][levels.SymbolOf(level, place)];
          if (place.low_bits > 0) continue;
          Counts::Mean& mean = own->means[table][std::min<size_t>(Folded(level), kKltMeans - 1)];
          mean.total += static_cast<double>(of.rounded[i]) - level;
          ++mean.count;
        }
      };
      for (size_t group = 0; group < coder->groups(); ++group) {
        Code(*coder, block, group, first, &watch, &code);
        first.push_back(code.first);
      }
    }
    const std::lock_guard<std::mutex> lock(mutex);
    for (size_t t = 0; t < kKltTables; ++t) {
      for (size_t s = 0; s < kKltSymbols; ++s) sums->levels[t][s] += own->levels[t][s];
      for (size_t m = 0; m < kKltMeans; ++m) {
        sums->means[t][m].total += own->means[t][m].total;
        sums->means[t][m].count += own->means[t][m].count;
      }
    }
  });

  return sums;
}

void KltFit::Count(std::span<const std::vector<size_t>> cuts, size_t first_table, size_t count) {
  KltStatistics counted = std::move(pack_.statistics);
  pack_.statistics = {};
  for (int pass = 0; pass < 2; ++pass) {
    const std::unique_ptr<Counts> sums = CountOnce(cuts);
    std::vector<kernels::RansTable> tables;
    for (size_t table = 0; table < kKltTables; ++table) {
      const bool wanted = table >= first_table && table < first_table + count;
      if (!wanted && !counted.tables.empty()) {
        tables.push_back(counted.tables[table]);
        continue;
      }
      auto& levels = sums->levels[table];
      levels[0] += 1;
      levels[kKltSymbols - 1] += 1;
      tables.push_back(kernels::RansTable::FromCounts(levels));
      for (size_t m = 0; m < kKltMeans; ++m) {
        const Counts::Mean& mean = sums->means[table][m];
        const bool nothing = m == 0 && !KltTableRefines(table);
        counted.mean[table][m] =
            nothing || mean.count < kFewest
                ? 0.0F
                : static_cast<float>(mean.total / static_cast<double>(mean.count));
      }
    }
    counted.tables = std::move(tables);
    pack_.statistics = counted;
  }
}

}  // namespace kvant::node
