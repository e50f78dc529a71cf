#include "node/gguf_weights.h"

#include <fmt/ranges.h>

#include <algorithm>
#include <cstring>
#include <utility>

#include "base/check.h"
#include "kernels/vector.h"

namespace kvant::node {
namespace {

using Names = std::pair<std::string_view, std::string_view>;

constexpr Names kModelNames[] = {
    {"model.embed_tokens", "token_embd"},
    {"model.norm", "output_norm"},
    {"lm_head", "output"},
};
// Behind "model.layers.N." and "blk.N.".
constexpr Names kLayerNames[] = {
    {"input_layernorm", "attn_norm"},    {"self_attn.q_proj", "attn_q"},
    {"self_attn.k_proj", "attn_k"},      {"self_attn.v_proj", "attn_v"},
    {"self_attn.o_proj", "attn_output"}, {"self_attn.q_norm", "attn_q_norm"},
    {"self_attn.k_norm", "attn_k_norm"}, {"mlp.gate_proj", "ffn_gate"},
    {"mlp.up_proj", "ffn_up"},           {"mlp.down_proj", "ffn_down"},
};
constexpr Names kTwoNorms[] = {{"post_attention_layernorm", "ffn_norm"}};
constexpr Names kFourNorms[] = {
    {"post_attention_layernorm", "post_attention_norm"},
    {"pre_feedforward_layernorm", "ffn_norm"},
    {"post_feedforward_layernorm", "post_ffw_norm"},
};

std::optional<std::string_view> Translate(std::span<const Names> names, std::string_view name) {
  const auto found =
      std::find_if(names.begin(), names.end(), [&](const Names& n) { return n.first == name; });
  if (found == names.end()) return std::nullopt;
  return found->second;
}

// Cuts `prefix` off the front of `text` if it stands there.
bool Skip(std::string_view prefix, std::string_view* text) {
  if (text->substr(0, prefix.size()) != prefix) return false;
  text->remove_prefix(prefix.size());
  return true;
}

DataType PlainType(const kernels::GgmlType& type) {
  switch (type.id) {
    case kernels::kGgmlF32:
      return DataType::kFp32;
    case kernels::kGgmlF16:
      return DataType::kFp16;
    case kernels::kGgmlBf16:
      return DataType::kBf16;
    default:
      return DataType::kOther;
  }
}

size_t ValueCount(const GgufTensor& tensor) {
  return tensor.bytes.size() / tensor.type->block_bytes * tensor.type->block_values;
}

// The values of a tensor in fp32, whatever its type. REQUIRES: plain, or decoded.
std::vector<float> Values(const GgufTensor& tensor) {
  std::vector<float> values(ValueCount(tensor));
  const DataType plain = PlainType(*tensor.type);
  if (plain == DataType::kOther) {
    kernels::DequantizeBlocks(*tensor.type, tensor.bytes, values);
  } else if (plain == DataType::kFp32) {
    std::memcpy(values.data(), tensor.bytes.data(), tensor.bytes.size());
  } else {
    std::vector<uint16_t> halves(values.size());  // the file's may be misaligned
    std::memcpy(halves.data(), tensor.bytes.data(), tensor.bytes.size());
    const auto widen = plain == DataType::kBf16 ? kernels::WidenBf16 : kernels::WidenFp16;
    widen(halves.data(), values.data(), values.size());
  }
  return values;
}

// Decodes a quantized tensor piece by piece, so that its fp32 values never all exist.
void DecodeToBf16(const GgufTensor& tensor, uint16_t* out) {
  constexpr size_t kPieceBlocks = 16;  // 16 KiB of fp32 at most
  const kernels::GgmlType& type = *tensor.type;
  std::vector<float> piece(kPieceBlocks * type.block_values);
  for (size_t at = 0; at < tensor.bytes.size(); at += kPieceBlocks * type.block_bytes) {
    const auto blocks = tensor.bytes.subspan(
        at, std::min<size_t>(kPieceBlocks * type.block_bytes, tensor.bytes.size() - at));
    const size_t count = blocks.size() / type.block_bytes * type.block_values;
    kernels::DequantizeBlocks(type, blocks, std::span(piece).first(count));
    kernels::NarrowBf16(piece.data(), out, count);
    out += count;
  }
}

// Rows of heads back in Hugging Face's order: of a head's 2n rows, row 2j was j and row 2j + 1 was
// j + n.
void UndoInterleaving(std::span<const std::byte> from, size_t rows, size_t heads, std::byte* to) {
  const size_t row_bytes = from.size() / rows;
  const size_t per_head = rows / heads;
  const size_t half = per_head / 2;
  for (size_t row = 0; row < rows; ++row) {
    const size_t in_head = row % per_head;
    const size_t source = row - in_head + in_head % half * 2 + in_head / half;
    std::memcpy(to + row * row_bytes, from.data() + source * row_bytes, row_bytes);
  }
}

}  // namespace

std::optional<std::string> GgufWeights::NameInFile(std::string_view name) const {
  const size_t dot = name.rfind('.');
  if (dot == std::string_view::npos) return std::nullopt;
  std::string_view stem = name.substr(0, dot);
  const std::string_view suffix = name.substr(dot);
  if (suffix != ".weight" && suffix != ".bias") return std::nullopt;
  if (!Skip("model.layers.", &stem)) {
    const auto found = Translate(kModelNames, stem);
    if (!found) return std::nullopt;
    return fmt::format("{}{}", *found, suffix);
  }
  const size_t end = stem.find('.');
  if (end == std::string_view::npos) return std::nullopt;
  auto found = Translate(kLayerNames, stem.substr(end + 1));
  if (!found) {
    found = conventions_.sandwich_norms ? Translate(kFourNorms, stem.substr(end + 1))
                                        : Translate(kTwoNorms, stem.substr(end + 1));
  }
  if (!found) return std::nullopt;
  return fmt::format("blk.{}.{}{}", stem.substr(0, end), *found, suffix);
}

bool GgufWeights::Has(std::string_view name) const {
  const auto in_file = NameInFile(name);
  return in_file && file_.FindTensor(*in_file) != nullptr;
}

Result<Tensor> GgufWeights::Find(std::string_view name, std::span<const int64_t> shape) {
  const auto in_file = NameInFile(name);
  const GgufTensor* stored = in_file ? file_.FindTensor(*in_file) : nullptr;
  if (stored == nullptr) {
    return InvalidArgument(
        "{}: the file lacks tensor {} ({} in a Hugging Face checkpoint), "
        "expected of shape [{}]",
        file_.name(), in_file.value_or("of any name"), name, fmt::join(shape, ", "));
  }
  if (!std::equal(shape.begin(), shape.end(), stored->shape.begin(), stored->shape.end())) {
    return InvalidArgument(
        "{}: tensor {} ({}) has shape [{}], expected [{}] from the file's metadata; was the file "
        "changed after its conversion?",
        file_.name(), *in_file, name, fmt::join(stored->shape, ", "), fmt::join(shape, ", "));
  }
  if (const auto found = made_.find(*in_file); found != made_.end()) return found->second.tensor;
  Made made;
  KV_ASSIGN_OR_RETURN(made.tensor, Make(*in_file, *stored, &made.bytes));
  return made_.emplace(*in_file, std::move(made)).first->second.tensor;
}

void GgufWeights::Release(std::string_view name) {
  const auto in_file = NameInFile(name);
  const GgufTensor* stored = in_file ? file_.FindTensor(*in_file) : nullptr;
  if (stored == nullptr) return;
  made_.erase(*in_file);
  if (mapped_ != nullptr) mapped_->Release(stored->bytes);
}

Result<Tensor> GgufWeights::Make(const std::string& name, const GgufTensor& stored,
                                 std::unique_ptr<std::byte[]>* made) const {
  // operator new gives memory that is aligned for any number.
  const auto keep = [&](size_t bytes) {
    *made = std::make_unique_for_overwrite<std::byte[]>(bytes);
    return std::span(made->get(), bytes);
  };
  Tensor tensor;
  tensor.type = PlainType(*stored.type);
  tensor.shape = stored.shape;
  tensor.bytes = stored.bytes;
  const bool plain = tensor.type != DataType::kOther;
  if (!plain && stored.type->dequantize == nullptr) {
    return MakeStatus(StatusCode::kUnsupported,
                      "{}: tensor {} is of type {}, which is not read; read are F32, F16, BF16, "
                      "Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, Q4_K, Q5_K and Q6_K: take a file quantized to "
                      "one of them, e.g. Q4_K_M or Q8_0",
                      file_.name(), name, stored.type->name);
  }
  if (conventions_.norm_plus_one && name.ends_with("norm.weight")) {
    const std::vector<float> values = Values(stored);
    const std::span<std::byte> kept = keep(values.size() * sizeof(float));
    auto* out = reinterpret_cast<float*>(kept.data());
    std::transform(values.begin(), values.end(), out, [](float value) { return value - 1.0F; });
    tensor.type = DataType::kFp32;
    tensor.bytes = kept;
    return tensor;
  }
  const bool query = name.find(".attn_q.") != std::string::npos;
  const bool key = name.find(".attn_k.") != std::string::npos;
  const auto heads = static_cast<size_t>(query ? conventions_.interleaved_q_heads
                                         : key ? conventions_.interleaved_kv_heads
                                               : 0);
  const auto rows = static_cast<size_t>(stored.shape.front());
  if (heads != 0 && rows % (2 * heads) != 0) {
    return InvalidArgument("{}: tensor {} has {} rows, which are no {} heads of an even width",
                           file_.name(), name, rows, heads);
  }
  if (plain && heads == 0) return tensor;

  std::vector<uint16_t> in_file_order;  // of a quantized tensor whose rows must move
  if (!plain) {
    tensor.type = DataType::kBf16;
    const size_t count = ValueCount(stored);
    uint16_t* decoded = nullptr;
    if (heads == 0) {
      const std::span<std::byte> kept = keep(count * sizeof(uint16_t));
      decoded = reinterpret_cast<uint16_t*>(kept.data());
      tensor.bytes = kept;
    } else {
      in_file_order.resize(count);
      decoded = in_file_order.data();
      tensor.bytes = std::as_bytes(std::span(in_file_order));
    }
    DecodeToBf16(stored, decoded);
  }
  if (heads != 0) {
    const std::span<std::byte> kept = keep(tensor.bytes.size());
    UndoInterleaving(tensor.bytes, rows, heads, kept.data());
    tensor.bytes = kept;
  }
  return tensor;
}

}  // namespace kvant::node
