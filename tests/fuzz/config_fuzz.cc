// config.json and generation_config.json, apart by a zero byte.
#include "base/check.h"
#include "node/config.h"
#include "tests/fuzz/text_seeds.h"

namespace kvant::fuzz {

std::vector<Bytes> SeedInputs() {
  using namespace std::string_view_literals;
  return TextSeeds(
      {R"({"architectures":["LlamaForCausalLM"],"model_type":"llama","hidden_size":64,)"
       R"("intermediate_size":128,"num_hidden_layers":2,"num_attention_heads":4,)"
       R"("num_key_value_heads":2,"head_dim":16,"vocab_size":300,"max_position_embeddings":512,)"
       R"("rms_norm_eps":1e-5,"rope_theta":500000.0,"tie_word_embeddings":true,)"
       R"("hidden_act":"silu","bos_token_id":256,"eos_token_id":[257,258],)"
       R"("rope_scaling":{"rope_type":"llama3","factor":8.0,"low_freq_factor":1.0,)"
       "\"high_freq_factor\":4.0,\"original_max_position_embeddings\":8192}}\0{\"eos_token_id\":257}"sv,
       R"({"architectures":["LlamaForCausalLM"],"hidden_size":32,"intermediate_size":64,)"
       R"("num_hidden_layers":1,"num_attention_heads":4,"vocab_size":258,)"
       R"("max_position_embeddings":64,"rms_norm_eps":1e-6})"sv});
}

}  // namespace kvant::fuzz

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  const std::string_view text = kvant::fuzz::AsTextView(data, size);
  const size_t zero = std::min(text.find('\0'), text.size());
  const std::string_view second = zero < text.size() ? text.substr(zero + 1) : std::string_view();
  const auto config = kvant::node::ParseConfig(text.substr(0, zero), second, "fuzz");
  if (!config.ok()) return 0;
  KV_CHECK(config->layers > 0 && config->hidden > 0 && config->vocab > 0);
  KV_CHECK(config->kv_heads > 0 && config->q_heads % config->kv_heads == 0);
  KV_CHECK(config->head_dim > 0 && config->head_dim % 8 == 0);
  return 0;
}
