// kvant-random-model: writes a small model directory of random weights, for scripts that have no
// trained model at hand.
#include <CLI/CLI.hpp>
#include <cstdio>

#include "tests/support/random_model.h"

int main(int argc, char** argv) {
  kvant::support::RandomModelOptions options;
  options.config = kvant::support::TinyConfig();
  kvant::node::ModelConfig& config = options.config;
  std::string out;
  std::string type = "bf16";
  CLI::App app("Writes a model directory of random weights.", "kvant-random-model");
  app.add_option("--out", out, "Directory to write; created if it is missing")->required();
  app.add_option("--layers", config.layers)->check(CLI::Range(1, 64))->capture_default_str();
  app.add_option("--hidden", config.hidden)->check(CLI::Range(8, 8192))->capture_default_str();
  app.add_option("--intermediate", config.intermediate)
      ->check(CLI::Range(8, 32768))
      ->capture_default_str();
  app.add_option("--q-heads", config.q_heads)->check(CLI::Range(1, 128))->capture_default_str();
  app.add_option("--kv-heads", config.kv_heads)->check(CLI::Range(1, 128))->capture_default_str();
  app.add_option("--head-dim", config.head_dim, "Multiple of 8")
      ->check(CLI::Range(8, 1024))
      ->capture_default_str();
  app.add_option("--vocab", config.vocab)->check(CLI::Range(258, 200000))->capture_default_str();
  app.add_option("--max-positions", config.max_positions)
      ->check(CLI::Range(2, 1 << 20))
      ->capture_default_str();
  app.add_flag("--tied", config.tied_output, "The output layer is the embedding table");
  app.add_option("--type", type)->check(CLI::IsMember({"bf16", "fp16", "fp32"}));
  app.add_option("--shards", options.shards)->check(CLI::Range(1, 16))->capture_default_str();
  app.add_option("--seed", options.seed)->capture_default_str();
  CLI11_PARSE(app, argc, argv);

  options.type = type == "bf16"   ? kvant::node::DataType::kBf16
                 : type == "fp16" ? kvant::node::DataType::kFp16
                                  : kvant::node::DataType::kFp32;
  if (config.q_heads % config.kv_heads != 0 || config.head_dim % 8 != 0) {
    std::fprintf(stderr,
                 "kvant-random-model: --q-heads must be a multiple of --kv-heads, and --head-dim "
                 "of 8\n");
    return 2;
  }
  const kvant::Status status = kvant::support::WriteRandomModel(out, options);
  if (!status.ok()) {
    std::fprintf(stderr, "kvant-random-model: %s\n", status.message().c_str());
    return 1;
  }
  return 0;
}
