// A GGUF file: metadata, tensors, and the model made of them.
#include "base/check.h"
#include "node/gguf_model.h"
#include "tests/fuzz/text_seeds.h"
#include "tests/support/gguf_writer.h"

namespace kvant::fuzz {

std::vector<Bytes> SeedInputs() {
  std::vector<Bytes> seeds;
  for (const char* family : {"llama", "qwen2", "qwen3", "gemma3"}) {
    seeds.push_back(ToBytes(support::SmallGgufModel(family).File()));
  }
  support::GgufWriter scaled = support::SmallGgufModel("llama");
  const uint64_t shape[] = {4};
  scaled.Tensor("rope_freqs.weight", shape, kernels::kGgmlF32,
                {"\0\0\x80\x3F\0\0\x80\x3F\0\0\x80\x3F\0\0\0\x41", 16});
  seeds.push_back(ToBytes(scaled.File()));
  seeds.push_back(ToBytes(support::GgufWriter(2).File()));
  return seeds;
}

}  // namespace kvant::fuzz

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  using kvant::node::GgufFile;
  const std::span bytes(reinterpret_cast<const std::byte*>(data), size);
  const auto file = GgufFile::Parse(bytes, "fuzz");
  if (!file.ok()) return 0;
  for (const auto& [key, value] : file->values()) {
    const auto texts = value.Texts();
    const auto integers = value.Integers();
    const auto floats = value.Floats();
    KV_CHECK(!texts || texts->size() == value.count);
    KV_CHECK(!integers || integers->size() == value.count);
    KV_CHECK(!floats || floats->size() == value.count);
  }
  for (const auto& [name, tensor] : file->tensors()) {
    KV_CHECK(tensor.bytes.data() >= bytes.data());
    KV_CHECK(tensor.bytes.data() + tensor.bytes.size() <= bytes.data() + bytes.size());
  }
  const auto model = kvant::node::ParseGgufModel(bytes, "fuzz");
  if (!model.ok()) return 0;
  const auto& config = model->config;
  const std::string layer = "model.layers.0.";
  const std::pair<std::string, std::vector<int64_t>> wanted[] = {
      {"model.embed_tokens.weight", {config.vocab, config.hidden}},
      {layer + "input_layernorm.weight", {config.hidden}},
      {layer + "self_attn.q_proj.weight", {config.q_width(), config.hidden}},
      {layer + "self_attn.k_proj.weight", {config.kv_width(), config.hidden}},
      {layer + "self_attn.q_proj.bias", {config.q_width()}},
      {layer + "mlp.down_proj.weight", {config.hidden, config.intermediate}}};
  for (const auto& [name, shape] : wanted) {
    const auto tensor = model->weights->Find(name, shape);
    if (!tensor.ok()) continue;
    KV_CHECK(model->weights->Has(name));
    uint64_t values = 1;
    for (const int64_t length : shape) values *= static_cast<uint64_t>(length);
    const bool wide = tensor->type == kvant::node::DataType::kFp32;
    KV_CHECK(tensor->bytes.size() == values * (wide ? 4 : 2));
  }
  return 0;
}
