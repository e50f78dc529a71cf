// Writes GGUF files as llama.cpp's converter does, and wrong ones.
#pragma once

#include <bit>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "node/gguf.h"

namespace kvant::support {

// Single-owner. Calls add to the file; Bytes() puts it together.
class GgufWriter {
 public:
  explicit GgufWriter(uint32_t version = 3) : version_(version) {}

  void Text(std::string_view key, std::string_view value) {
    Key(key, node::GgufKind::kString);
    PutText(&keys_, value);
  }
  void Integer(std::string_view key, uint32_t value) {
    Key(key, node::GgufKind::kUint32);
    Put(&keys_, value);
  }
  void Float(std::string_view key, float value) {
    Key(key, node::GgufKind::kFloat32);
    Put(&keys_, value);
  }
  void Boolean(std::string_view key, bool value) {
    Key(key, node::GgufKind::kBool);
    Put(&keys_, static_cast<uint8_t>(value));
  }
  void Texts(std::string_view key, std::span<const std::string> values) {
    ArrayKey(key, node::GgufKind::kString, values.size());
    for (const std::string& value : values) PutText(&keys_, value);
  }
  void Floats(std::string_view key, std::span<const float> values) {
    ArrayKey(key, node::GgufKind::kFloat32, values.size());
    for (const float value : values) Put(&keys_, value);
  }
  void Integers(std::string_view key, std::span<const int32_t> values) {
    ArrayKey(key, node::GgufKind::kInt32, values.size());
    for (const int32_t value : values) Put(&keys_, value);
  }
  // A value of any kind, its bytes as given.
  void Raw(std::string_view key, uint32_t kind, std::string_view bytes) {
    Key(key, static_cast<node::GgufKind>(kind));
    keys_ += bytes;
  }

  // shape: outermost first. The data goes behind that of the tensors before, at the next multiple
  // of 32.
  void Tensor(std::string_view name, std::span<const uint64_t> shape, uint32_t type,
              std::string_view data) {
    data_.resize((data_.size() + 31) / 32 * 32, '\0');
    TensorAt(name, shape, type, data_.size());
    data_ += data;
  }
  void TensorAt(std::string_view name, std::span<const uint64_t> shape, uint32_t type,
                uint64_t offset) {
    ++tensor_count_;
    PutText(&tensors_, name);
    Put(&tensors_, static_cast<uint32_t>(shape.size()));
    for (size_t i = shape.size(); i-- > 0;) Put(&tensors_, shape[i]);
    Put(&tensors_, type);
    Put(&tensors_, offset);
  }

  std::string File(size_t alignment = 32) const {
    std::string file = "GGUF";
    Put(&file, version_);
    Put(&file, tensor_count_);
    Put(&file, key_count_);
    file += keys_;
    file += tensors_;
    file.resize((file.size() + alignment - 1) / alignment * alignment, '\0');
    return file + data_;
  }
  // Where the data begins in File().
  size_t DataBegin() const { return File().size() - data_.size(); }

 private:
  template <typename T>
  static void Put(std::string* to, T value) {
    to->append(reinterpret_cast<const char*>(&value), sizeof(value));
  }
  static void PutText(std::string* to, std::string_view text) {
    Put(to, static_cast<uint64_t>(text.size()));
    *to += text;
  }
  void Key(std::string_view key, node::GgufKind kind) {
    ++key_count_;
    PutText(&keys_, key);
    Put(&keys_, static_cast<uint32_t>(kind));
  }
  void ArrayKey(std::string_view key, node::GgufKind element, size_t count) {
    Key(key, node::GgufKind::kArray);
    Put(&keys_, static_cast<uint32_t>(element));
    Put(&keys_, static_cast<uint64_t>(count));
  }

  uint32_t version_;
  uint64_t tensor_count_ = 0;
  uint64_t key_count_ = 0;
  std::string keys_;
  std::string tensors_;
  std::string data_;
};

// A whole model of one layer, two query heads and one key head of 8 channels: llama (`family`
// "llama"), or "qwen2", "qwen3", "gemma3". Its matrices are Q8_0, its norms F32.
inline GgufWriter SmallGgufModel(const std::string& family) {
  GgufWriter out;
  const auto integer = [&](std::string_view key, uint32_t value) {
    out.Integer(family + "." + std::string(key), value);
  };
  out.Text("general.architecture", family);
  integer("context_length", 64);
  integer("embedding_length", 32);
  integer("block_count", 1);
  integer("feed_forward_length", 32);
  integer("attention.head_count", 4);
  integer("attention.head_count_kv", 2);
  integer("attention.key_length", 8);
  out.Float(family + ".attention.layer_norm_rms_epsilon", 1e-5F);
  out.Float(family + ".rope.freq_base", 10000.0F);
  if (family == "gemma3") integer("attention.sliding_window", 16);
  const std::vector<std::string> tokens = {"<s>", "</s>", "a", "b", "ab"};
  const std::vector<std::string> merges = {"a b"};
  const std::vector<int32_t> types = {3, 3, 1, 1, 1};
  out.Text("tokenizer.ggml.model", "gpt2");
  out.Text("tokenizer.ggml.pre", "llama-bpe");
  out.Texts("tokenizer.ggml.tokens", tokens);
  out.Texts("tokenizer.ggml.merges", merges);
  out.Integers("tokenizer.ggml.token_type", types);
  out.Integer("tokenizer.ggml.bos_token_id", 0);
  out.Integer("tokenizer.ggml.eos_token_id", 1);
  out.Text("tokenizer.chat_template", "{{ messages }}");

  const auto matrix = [&](const std::string& name, uint64_t rows) {
    std::string data;
    for (uint64_t row = 0; row < rows; ++row) {
      data += std::string("\x00\x2C", 2);  // 1/16 in fp16
      for (uint64_t i = 0; i < 32; ++i) data += static_cast<char>(row * 7 + i * 3);
    }
    const uint64_t shape[] = {rows, 32};
    out.Tensor(name, shape, 8, data);
  };
  const auto vector = [&](const std::string& name, uint64_t size) {
    std::string data;
    for (uint64_t i = 0; i < size; ++i) {
      const float value = 1.0F + static_cast<float>(i) / 64.0F;
      data.append(reinterpret_cast<const char*>(&value), sizeof(value));
    }
    const uint64_t shape[] = {size};
    out.Tensor(name, shape, 0, data);
  };
  matrix("token_embd.weight", tokens.size());
  vector("output_norm.weight", 32);
  vector("blk.0.attn_norm.weight", 32);
  matrix("blk.0.attn_q.weight", 32);
  matrix("blk.0.attn_k.weight", 16);
  matrix("blk.0.attn_v.weight", 16);
  matrix("blk.0.attn_output.weight", 32);
  vector("blk.0.ffn_norm.weight", 32);
  matrix("blk.0.ffn_gate.weight", 32);
  matrix("blk.0.ffn_up.weight", 32);
  matrix("blk.0.ffn_down.weight", 32);
  if (family == "qwen2") {
    vector("blk.0.attn_q.bias", 32);
    vector("blk.0.attn_k.bias", 16);
    vector("blk.0.attn_v.bias", 16);
  }
  if (family == "qwen3" || family == "gemma3") {
    vector("blk.0.attn_q_norm.weight", 8);
    vector("blk.0.attn_k_norm.weight", 8);
  }
  if (family == "gemma3") {
    vector("blk.0.post_attention_norm.weight", 32);
    vector("blk.0.post_ffw_norm.weight", 32);
  }
  return out;
}

}  // namespace kvant::support
