#include "node/klt_weights.h"

#include <bit>
#include <cmath>
#include <memory>
#include <nlohmann/json.hpp>
#include <utility>

#include "base/bytes.h"
#include "node/json.h"
#include "node/mapped_file.h"
#include "node/safetensors.h"

namespace kvant::node {
namespace {

constexpr std::string_view kFormat = "kvant-klt-weights-1";

}  // namespace

Result<KltWeights> LoadKltWeights(const std::filesystem::path& file, int layers, int width) {
  KV_ASSIGN_OR_RETURN(const std::unique_ptr<MappedFile> mapped, MappedFile::Open(file));
  const std::string name = file.string();
  KV_ASSIGN_OR_RETURN(const TensorMap tensors, ParseSafetensors(mapped->bytes(), name));
  const auto header_bytes = LoadLittle<uint64_t>(mapped->bytes().data());
  KV_ASSIGN_OR_RETURN(const nlohmann::json header,
                      ParseJson(AsText(mapped->bytes().subspan(8, header_bytes)), name));
  const nlohmann::json* metadata = FindField(header, "__metadata__");
  const auto text_of = [&](const char* key) {
    const nlohmann::json* field =
        metadata != nullptr && metadata->is_object() ? FindField(*metadata, key) : nullptr;
    return field != nullptr && field->is_string() ? field->get<std::string>() : std::string();
  };
  if (text_of("format") != kFormat) {
    return InvalidArgument("{}: no weights of the format {}: scripts/calibrate-fisher makes them",
                           name, kFormat);
  }
  KltWeights weights;
  weights.made_on = text_of("made_on");
  if (tensors.size() != static_cast<size_t>(layers)) {
    return InvalidArgument("{}: weights of {} layers, and the model has {}: make them for it", name,
                           tensors.size(), layers);
  }
  const std::vector<int64_t> shape = {width, width};
  for (int l = 0; l < layers; ++l) {
    const std::string tensor = fmt::format("layers.{}.weight", l);
    const auto found = tensors.find(tensor);
    if (found == tensors.end() || found->second.shape != shape ||
        found->second.type != DataType::kFp32) {
      return InvalidArgument("{}: for this model it should have a tensor {} of shape [{}], in F32",
                             name, tensor, fmt::join(shape, ", "));
    }
    kernels::Matrix& weight = weights.layers.emplace_back(width, width);
    for (size_t i = 0; i < weight.values.size(); ++i) {
      const auto bits = LoadLittle<uint32_t>(found->second.bytes.data() + 4 * i);
      weight.values[i] = static_cast<double>(std::bit_cast<float>(bits));
    }
    double trace = 0;
    bool good = true;
    for (int a = 0; a < width; ++a) {
      trace += weight.At(a, a);
      good = good && weight.At(a, a) >= 0;
      for (int b = 0; b < a; ++b) {
        // What is no second moment is no weight; sums of fp32 differ in their last bits.
        const double mean = (weight.At(a, b) + weight.At(b, a)) / 2;
        const double most = std::sqrt(weight.At(a, a) * weight.At(b, b));
        good = good && std::abs(weight.At(a, b) - mean) <= 1e-4 * most &&
               std::abs(mean) <= 1.0001 * most;
        weight.At(a, b) = weight.At(b, a) = mean;
      }
    }
    if (!good || !(trace > 0) || !std::isfinite(trace)) {
      return InvalidArgument(
          "{}: tensor {} is no second moment: symmetric, finite and not all zero", name, tensor);
    }
  }
  return weights;
}

}  // namespace kvant::node
