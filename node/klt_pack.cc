#include "node/klt_pack.h"

#include <algorithm>
#include <bit>
#include <cctype>
#include <charconv>
#include <cmath>
#include <fstream>
#include <limits>
#include <memory>
#include <nlohmann/json.hpp>
#include <system_error>
#include <utility>

#include "base/bytes.h"
#include "base/check.h"
#include "kernels/blas.h"
#include "kernels/float_formats.h"
#include "node/json.h"
#include "node/klt.h"
#include "node/mapped_file.h"
#include "node/requests.h"
#include "node/safetensors.h"

namespace kvant::node {
namespace {

using nlohmann::json;

constexpr std::string_view kFormat = "kvant-klt-4";
constexpr size_t kMaxCutsOfPack = 16;
constexpr size_t kMaxTransforms = 8;

std::string NameOf(std::string_view of, size_t number, std::string_view part) {
  return fmt::format("{}.{}.{}", of, number, part);
}
std::string NameOf(const KltTransform& transform, size_t group, std::string_view part) {
  const std::string of_group = NameOf("groups", group, part);
  return transform.recomputed == 0
             ? of_group
             : NameOf("recomputed", static_cast<size_t>(transform.recomputed), of_group);
}

// Tensors of a mapped file, taken out with their sizes checked.
class Reader {
 public:
  Reader(const TensorMap* tensors, std::string name) : tensors_(*tensors), name_(std::move(name)) {}

  // shape: expected.
  Result<std::vector<float>> Floats(const std::string& tensor, std::vector<int64_t> shape) const {
    const auto found = tensors_.find(tensor);
    if (found == tensors_.end() || found->second.shape != shape ||
        (found->second.type != DataType::kBf16 && found->second.type != DataType::kFp32)) {
      return InvalidArgument("{}: it should have a tensor {} of shape [{}], in F32 or BF16", name_,
                             tensor, fmt::join(shape, ", "));
    }
    const bool wide = found->second.type == DataType::kFp32;
    const std::byte* from = found->second.bytes.data();
    std::vector<float> values(found->second.bytes.size() / (wide ? 4 : 2));
    for (size_t i = 0; i < values.size(); ++i) {
      values[i] = wide ? std::bit_cast<float>(LoadLittle<uint32_t>(from + 4 * i))
                       : kernels::FromBf16(LoadLittle<uint16_t>(from + 2 * i));
      if (!std::isfinite(values[i])) {
        return InvalidArgument("{}: tensor {} has a number that is not finite", name_, tensor);
      }
    }
    return values;
  }

 private:
  const TensorMap& tensors_;
  std::string name_;
};

class Writer {
 public:
  void Add(const std::string& tensor, std::vector<int64_t> shape, std::span<const float> values,
           bool wide) {
    const size_t begin = data_.size();
    data_.resize(begin + values.size() * (wide ? 4 : 2));
    std::byte* to = data_.data() + begin;
    for (size_t i = 0; i < values.size(); ++i) {
      if (wide) {
        StoreLittle(to + 4 * i, std::bit_cast<uint32_t>(values[i]));
      } else {
        StoreLittle(to + 2 * i, kernels::ToBf16(values[i]));
      }
    }
    header_[tensor] = {{"dtype", wide ? "F32" : "BF16"},
                       {"shape", std::move(shape)},
                       {"data_offsets", {begin, data_.size()}}};
  }
  void SetMetadata(json metadata) { header_["__metadata__"] = std::move(metadata); }
  std::string File() const {
    std::string text = header_.dump();
    text.resize((text.size() + 7) / 8 * 8, ' ');
    std::string file(8, '\0');
    StoreLittle(reinterpret_cast<std::byte*>(file.data()), static_cast<uint64_t>(text.size()));
    file += text;
    file.append(reinterpret_cast<const char*>(data_.data()), data_.size());
    return file;
  }

 private:
  json header_ = json::object();
  std::vector<std::byte> data_;
};

// Cuts as the metadata have them: a JSON list of [name, step, mean KL].
json JsonOf(const std::vector<KltCut>& cuts) {
  json list = json::array();
  for (const KltCut& cut : cuts) list.push_back({cut.name, cut.step, cut.mean_kl});
  return list;
}
bool IsCut(const json& entry) {
  if (!entry.is_array() || entry.size() != 3 || !entry[0].is_string()) return false;
  const auto& name = entry[0].get_ref<const std::string&>();
  const auto fits = [](const json& number) {
    return number.is_number() && number.get<double>() >= 0 &&
           number.get<double>() <= static_cast<double>(std::numeric_limits<float>::max());
  };
  // They are parts of other names.
  return !name.empty() &&
         std::all_of(name.begin(), name.end(),
                     [](char c) { return std::isalnum(static_cast<unsigned char>(c)) != 0; }) &&
         fits(entry[1]) && fits(entry[2]);
}
Result<std::vector<KltCut>> CutsOf(const json& list, const std::string& name) {
  std::vector<KltCut> cuts;
  bool good = list.is_array() && !list.empty() && list.size() <= kMaxCutsOfPack;
  for (size_t i = 0; good && i < list.size(); ++i) {
    good = IsCut(list[i]);
    if (!good) break;
    KltCut cut{list[i][0].get<std::string>(), list[i][1].get<float>(), list[i][2].get<float>()};
    good = cut.step > 0 && (i == 0 || cuts[i - 1].step < cut.step) &&
           std::none_of(cuts.begin(), cuts.end(),
                        [&](const KltCut& other) { return other.name == cut.name; });
    cuts.push_back(std::move(cut));
  }
  if (good) return cuts;
  return InvalidArgument(
      "{}: its metadata have no list of cuts, [name, step, mean KL], names of letters and digits, "
      "steps ascending",
      name);
}

// The names of `refining`, of cuts that get finer.
Result<std::vector<size_t>> RefiningOf(const std::string& text, const KltPack& pack,
                                       const std::string& name) {
  KV_ASSIGN_OR_RETURN(const json list, ParseJson(text, name));
  std::vector<size_t> refining;
  bool good = list.is_array() && list.size() <= kKltRefinements + 1;
  for (size_t i = 0; good && i < list.size(); ++i) {
    const Result<size_t> cut = list[i].is_string() ? pack.FindCut(list[i].get<std::string>())
                                                   : Result<size_t>(InvalidArgument("no name"));
    good = cut.ok() && (i == 0 || *cut < refining.back());
    if (good) refining.push_back(*cut);
  }
  if (good) return refining;
  return InvalidArgument("{}: refining in its metadata is no list of at most {} cuts, each finer",
                         name, kKltRefinements + 1);
}

// Of a transform's group; those before it are there.
Result<KltBasis> BasisOf(const Reader& reader, const KltPack& pack, const KltTransform& transform,
                         const TensorMap& tensors, const std::string& name) {
  KltBasis basis;
  const size_t group = transform.bases.size();
  basis.width = pack.width * static_cast<int>(transform.groups[group].layers.size());
  const auto name_of = [&](std::string_view part) { return NameOf(transform, group, part); };
  const auto found = tensors.find(name_of("deviation"));
  if (found != tensors.end() && found->second.shape.size() == 1 && found->second.shape[0] >= 1 &&
      found->second.shape[0] <= basis.width) {
    basis.coefficients = static_cast<int>(found->second.shape[0]);
  } else {
    return InvalidArgument("{}: it should have a tensor {} of 1 to {} numbers", name,
                           name_of("deviation"), basis.width);
  }
  basis.inputs = InputsOf(pack, transform, group);
  const int64_t width = basis.width;
  const int64_t coefficients = basis.coefficients;
  const auto floats = [&](const char* part, std::vector<int64_t> shape) {
    return reader.Floats(name_of(part), std::move(shape));
  };
  KV_ASSIGN_OR_RETURN(basis.bias, floats("bias", {width}));
  KV_ASSIGN_OR_RETURN(basis.sink_bias, floats("sink_bias", {width}));
  const auto features = 2 * static_cast<int64_t>(transform.groups[group].layers.size());
  KV_ASSIGN_OR_RETURN(basis.importance, floats("importance", {1 + features}));
  KV_ASSIGN_OR_RETURN(const std::vector<float> predictor,
                      floats("predictor", {width, basis.inputs}));
  basis.predictor = kernels::OrderedWeights(predictor.data(), basis.width, basis.inputs);
  KV_ASSIGN_OR_RETURN(const std::vector<float> synthesis,
                      floats("synthesis", {width, coefficients}));
  basis.synthesis = kernels::OrderedWeights(synthesis.data(), basis.width, basis.coefficients);
  KV_ASSIGN_OR_RETURN(basis.deviation, floats("deviation", {coefficients}));
  if (!std::is_sorted(basis.deviation.rbegin(), basis.deviation.rend())) {
    return InvalidArgument("{}: tensor {} does not descend", name, name_of("deviation"));
  }
  KV_ASSIGN_OR_RETURN(basis.sink_deviation[0], floats("first_deviation", {coefficients}));
  KV_ASSIGN_OR_RETURN(basis.sink_deviation[1], floats("sink_deviation", {coefficients}));
  return basis;
}

void AddBases(const KltTransform& transform, Writer* writer) {
  for (size_t group = 0; group < transform.bases.size(); ++group) {
    const KltBasis& basis = transform.bases[group];
    const int64_t coefficients = basis.coefficients;
    const auto add = [&](const char* part, std::vector<int64_t> shape,
                         std::span<const float> values, bool wide) {
      writer->Add(NameOf(transform, group, part), std::move(shape), values, wide);
    };
    add("bias", {basis.width}, basis.bias, true);
    add("sink_bias", {basis.width}, basis.sink_bias, true);
    add("importance", {static_cast<int64_t>(basis.importance.size())}, basis.importance, true);
    add("predictor", {basis.width, basis.inputs}, basis.predictor.RowMajor(), false);
    add("synthesis", {basis.width, coefficients}, basis.synthesis.RowMajor(), false);
    add("deviation", {coefficients}, basis.deviation, true);
    add("first_deviation", {coefficients}, basis.sink_deviation[0], true);
    add("sink_deviation", {coefficients}, basis.sink_deviation[1], true);
  }
}

// What `cuts` and `recomputed` in the metadata list, without bases.
Result<std::vector<KltTransform>> TransformsOf(const std::string& cuts,
                                               const std::string& recomputed,
                                               const ModelConfig& config, int group_width,
                                               const std::string& name) {
  KV_ASSIGN_OR_RETURN(const json of_none, ParseJson(cuts, name));
  KV_ASSIGN_OR_RETURN(const json list, ParseJson(recomputed, name));
  std::vector<KltTransform> transforms(1);
  KV_ASSIGN_OR_RETURN(transforms[0].cuts, CutsOf(of_none, name));
  bool good = list.is_array() && list.size() < kMaxTransforms;
  for (size_t i = 0; good && i < list.size(); ++i) {
    const json& entry = list[i];
    // At least one layer is coded.
    good = entry.is_array() && entry.size() == 2 && entry[0].is_number_integer() &&
           entry[0].get<int64_t>() > transforms.back().recomputed &&
           entry[0].get<int64_t>() < config.layers - 1;
    if (!good) break;
    KltTransform& transform = transforms.emplace_back();
    transform.recomputed = entry[0].get<int>();
    KV_ASSIGN_OR_RETURN(transform.cuts, CutsOf(entry[1], name));
    good = std::equal(transform.cuts.begin(), transform.cuts.end(), transforms[0].cuts.begin(),
                      transforms[0].cuts.end(),
                      [](const KltCut& a, const KltCut& b) { return a.name == b.name; });
  }
  if (!good) {
    return InvalidArgument(
        "{}: recomputed in its metadata is no list of at most {} entries, [layers, cuts], layers "
        "ascending below {}, cuts with the names of those for no layers",
        name, kMaxTransforms - 1, config.layers - 1);
  }
  for (KltTransform& transform : transforms)
    transform.groups = KltGroups(config, transform.first_layer(), group_width);
  return transforms;
}

}  // namespace

int InputsOf(const KltPack& pack, const KltTransform& transform, size_t group) {
  int inputs = pack.hidden;
  for (const int source : transform.groups[group].sources)
    inputs += SourceCoefficients(transform.bases[static_cast<size_t>(source)]);
  return inputs;
}

void SetAnalysis(const KltPack& pack, const KltGroup& group, KltBasis* basis) {
  const std::vector<float> synthesis = basis->synthesis.RowMajor();
  const auto coefficients = static_cast<size_t>(basis->coefficients);
  const auto width = static_cast<size_t>(pack.width);
  const auto all = static_cast<size_t>(basis->width);
  std::vector<float> analysis(coefficients * all);
  std::vector<float> turned(coefficients * width);
  std::vector<float> product(turned.size());
  size_t at = 0;
  for (const int layer : group.layers) {
    for (size_t c = 0; c < coefficients; ++c) {
      for (size_t i = 0; i < width; ++i)
        turned[c * width + i] = synthesis[(at + i) * coefficients + c];
    }
    const kernels::OrderedWeights weight(pack.weights[static_cast<size_t>(layer)].data(),
                                         pack.width, pack.width);
    kernels::OrderedMultiply(weight, turned.data(), basis->coefficients, nullptr, product.data());
    for (size_t c = 0; c < coefficients; ++c) {
      std::copy_n(product.data() + c * width, width, analysis.data() + c * all + at);
    }
    at += width;
  }
  // Newton's step for an inverse, 2 A - (A S) A: what is off by 2^-9 is off by its square.
  std::vector<float> columns(coefficients * all);  // synthesis, transposed
  std::vector<float> rows(coefficients * all);     // analysis, transposed
  for (size_t c = 0; c < coefficients; ++c) {
    for (size_t i = 0; i < all; ++i) {
      columns[c * all + i] = synthesis[i * coefficients + c];
      rows[i * coefficients + c] = analysis[c * all + i];
    }
  }
  std::vector<float> off(coefficients * coefficients);
  kernels::OrderedMultiply(
      kernels::OrderedWeights(columns.data(), basis->coefficients, basis->width), analysis.data(),
      basis->coefficients, nullptr, off.data());
  for (size_t c = 0; c < coefficients; ++c) {
    for (size_t i = 0; i < coefficients; ++i)
      off[c * coefficients + i] = (c == i ? 1.0F : 0.0F) - off[c * coefficients + i];
  }
  kernels::OrderedMultiplyAdd(
      kernels::OrderedWeights(rows.data(), basis->width, basis->coefficients), off.data(),
      basis->coefficients, analysis.data());
  basis->analysis = kernels::OrderedWeights(analysis.data(), basis->coefficients, basis->width);
}

Status KltPack::CheckFits(const Model& of) const {
  if (model == ToHex(of.digest())) return OkStatus();
  return InvalidArgument(
      "the codec pack was made for the model {:.16}, not for {:.16}; make one with kvant calibrate",
      model, ToHex(of.digest()));
}

Result<size_t> KltPack::FindCut(std::string_view name) const {
  std::vector<std::string> names;
  for (size_t cut = 0; cut < cuts().size(); ++cut) {
    if (cuts()[cut].name == name) return cut;
    names.push_back(cuts()[cut].name);
  }
  return InvalidArgument("the codec pack has no cut '{}': use {}", name, fmt::join(names, ", "));
}

Result<size_t> KltPack::FindTransform(int recomputed) const {
  std::vector<int> known;
  for (size_t i = 0; i < transforms.size(); ++i) {
    if (transforms[i].recomputed == recomputed) return i;
    known.push_back(transforms[i].recomputed);
  }
  return InvalidArgument(
      "the codec pack has nothing for {} recomputed layers, but for {}; kvant calibrate "
      "--recompute {} makes one that has",
      recomputed, fmt::join(known, ", "), recomputed);
}

Result<std::shared_ptr<const KltPack>> FindKltPack(const std::string& named,
                                                   const std::filesystem::path& from,
                                                   const Model& model) {
  std::filesystem::path file = named;
  if (named.empty()) file = std::filesystem::is_regular_file(from) ? from.parent_path() : from;
  if (std::filesystem::is_directory(file) || named.empty()) file /= kDefaultPack;
  if (!std::filesystem::is_regular_file(file)) {
    return InvalidArgument(
        "klt needs the model's codec pack, and there is no {}: name it with --pack, or make one "
        "with kvant calibrate",
        file.string());
  }
  KV_ASSIGN_OR_RETURN(KltPack pack, LoadKltPack(file, model));
  return std::make_shared<const KltPack>(std::move(pack));
}

Result<KltPack> LoadKltPack(const std::filesystem::path& file, const Model& model) {
  KV_ASSIGN_OR_RETURN(const std::unique_ptr<MappedFile> mapped, MappedFile::Open(file));
  return ParseKltPack(mapped->bytes(), file.string(), model);
}

Result<KltPack> ParseKltPack(std::span<const std::byte> file, const std::string& name,
                             const Model& model) {
  KV_ASSIGN_OR_RETURN(const TensorMap tensors, ParseSafetensors(file, name));
  const auto header_bytes = LoadLittle<uint64_t>(file.data());
  KV_ASSIGN_OR_RETURN(const json header, ParseJson(AsText(file.subspan(8, header_bytes)), name));
  const json* metadata = FindField(header, "__metadata__");
  const auto text_of = [&](const char* key) {
    const json* field =
        metadata != nullptr && metadata->is_object() ? FindField(*metadata, key) : nullptr;
    return field != nullptr && field->is_string() ? field->get<std::string>() : std::string();
  };
  if (text_of("format") != kFormat) {
    return InvalidArgument("{}: no codec pack of the format {}: kvant calibrate makes one", name,
                           kFormat);
  }
  KltPack pack;
  pack.model = text_of("model");
  if (const Status fits = pack.CheckFits(model); !fits.ok())
    return InvalidArgument("{}: {}", name, fits.message());
  pack.calibrated_on = text_of("calibrated_on");
  pack.weighed_by = text_of("weighed_by");
  pack.file_bytes = file.size();
  pack.digest = Sha256(file);
  pack.width = StateWidth(model.config());
  pack.hidden = model.config().hidden;
  pack.layers = model.config().layers;
  if (const std::string width = text_of("group_width"); !width.empty()) {
    const auto [end, error] =
        std::from_chars(width.data(), width.data() + width.size(), pack.group_width);
    if (error != std::errc() || end != width.data() + width.size() || pack.group_width < 1 ||
        pack.group_width > kKltMostGroupWidth) {
      return InvalidArgument("{}: group_width in its metadata is no number from 1 to {}", name,
                             kKltMostGroupWidth);
    }
  }
  KV_ASSIGN_OR_RETURN(pack.transforms, TransformsOf(text_of("cuts"), text_of("recomputed"),
                                                    model.config(), pack.group_width, name));
  KV_ASSIGN_OR_RETURN(pack.refining, RefiningOf(text_of("refining"), pack, name));
  const Reader reader(&tensors, name);
  const int64_t width = pack.width;
  for (int layer = 0; layer < pack.layers; ++layer) {
    KV_ASSIGN_OR_RETURN(
        pack.weights.emplace_back(),
        reader.Floats(NameOf("layers", static_cast<size_t>(layer), "weight"), {width, width}));
  }
  KV_ASSIGN_OR_RETURN(const std::vector<float> sink_step, reader.Floats("sink_step", {1}));
  pack.sink_step = sink_step[0];
  if (!(pack.sink_step > 0)) return InvalidArgument("{}: sink_step is not above 0", name);
  for (KltTransform& transform : pack.transforms) {
    for (const KltGroup& group : transform.groups) {
      KV_ASSIGN_OR_RETURN(KltBasis basis, BasisOf(reader, pack, transform, tensors, name));
      SetAnalysis(pack, group, &basis);
      transform.bases.push_back(std::move(basis));
    }
  }
  KV_ASSIGN_OR_RETURN(const std::vector<float> mean,
                      reader.Floats("mean", {kKltTables, kKltMeans}));
  for (size_t table = 0; table < kKltTables; ++table) {
    std::copy_n(mean.begin() + static_cast<ptrdiff_t>(table * kKltMeans), kKltMeans,
                pack.statistics.mean[table].begin());
    if (pack.statistics.mean[table][0] != 0 && !KltTableRefines(table)) {
      return InvalidArgument(
          "{}: tensor mean of table {} has a level 0 that stands for something, which only tables "
          "of what an earlier cut found may have",
          name, table);
    }
  }
  KV_ASSIGN_OR_RETURN(const std::vector<float> frequencies,
                      reader.Floats("frequencies", {kKltTables, kKltSymbols}));
  for (size_t table = 0; table < kKltTables; ++table) {
    std::array<uint32_t, kKltSymbols> counts{};
    for (size_t s = 0; s < kKltSymbols; ++s) {
      const float frequency = frequencies[table * kKltSymbols + s];
      const bool last = s == kKltSymbols - 1;  // any level can be coded
      if (!(frequency >= (last ? 1 : 0) && frequency <= kernels::kRansTotal)) {
        return InvalidArgument("{}: tensor frequencies has a number outside of {} to {}", name,
                               last ? 1 : 0, kernels::kRansTotal);
      }
      counts[s] = static_cast<uint32_t>(frequency);
    }
    pack.statistics.tables.push_back(kernels::RansTable::FromCounts(counts));
  }
  return pack;
}

Status SaveKltPack(const std::filesystem::path& file, const Model& model, KltPack* pack) {
  Writer writer;
  const int64_t width = pack->width;
  for (size_t layer = 0; layer < pack->weights.size(); ++layer) {
    writer.Add(NameOf("layers", layer, "weight"), {width, width}, pack->weights[layer], false);
  }
  json recomputed = json::array();
  for (const KltTransform& transform : pack->transforms) {
    if (transform.recomputed > 0)
      recomputed.push_back({transform.recomputed, JsonOf(transform.cuts)});
    AddBases(transform, &writer);
  }
  std::vector<float> mean;
  std::vector<float> frequencies;
  for (size_t table = 0; table < kKltTables; ++table) {
    const auto& of_table = pack->statistics.mean[table];
    mean.insert(mean.end(), of_table.begin(), of_table.end());
    for (int s = 0; s < kKltSymbols; ++s) {
      frequencies.push_back(static_cast<float>(pack->statistics.tables[table].frequency(s)));
    }
  }
  writer.Add("mean", {kKltTables, kKltMeans}, mean, true);
  writer.Add("frequencies", {kKltTables, kKltSymbols}, frequencies, true);
  writer.Add("sink_step", {1}, std::span(&pack->sink_step, 1), true);
  json refining = json::array();
  for (const size_t cut : pack->refining) refining.push_back(pack->cuts()[cut].name);
  writer.SetMetadata({{"format", kFormat},
                      {"model", pack->model},
                      {"calibrated_on", pack->calibrated_on},
                      {"weighed_by", pack->weighed_by},
                      {"group_width", std::to_string(pack->group_width)},
                      {"cuts", JsonOf(pack->cuts()).dump()},
                      {"recomputed", recomputed.dump()},
                      {"refining", refining.dump()}});
  KV_RETURN_IF_ERROR(WriteFile(file.string(), writer.File()));
  KV_ASSIGN_OR_RETURN(*pack, LoadKltPack(file, model));
  return OkStatus();
}

}  // namespace kvant::node
