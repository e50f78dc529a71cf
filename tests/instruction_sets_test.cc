// A model says the same to the bit whatever instructions the CPU has: a block that one machine
// computed is the block that any other would have. Each set in a process of its own, as KVANT_ISA
// is read once.
#include <gtest/gtest.h>

#include <cstdlib>
#include <fstream>
#include <iterator>
#include <string>
#include <utility>
#include <vector>

#include "tests/support/program.h"
#include "tests/support/random_model.h"

namespace kvant {
namespace {

using support::ProgramResult;
using support::RunProgram;

std::string Read(const std::filesystem::path& path) {
  std::ifstream file(path, std::ios::binary);
  return {std::istreambuf_iterator<char>(file), {}};
}

TEST(InstructionSets, LogitsAreTheSameToTheBit) {
  struct Case {
    const char* name;
    node::ModelConfig config;
    node::DataType type;
  };
  std::vector<Case> cases = {{"fp16 weights", support::TinyConfig(), node::DataType::kFp16},
                             {"sliding", support::TinySlidingConfig(), node::DataType::kBf16},
                             {"latent", support::TinyLatentConfig(), node::DataType::kBf16}};
  // Wide enough for whole registers and for more inputs than a tile goes through at once.
  Case& wide = cases.emplace_back("wide", support::TinyConfig(), node::DataType::kBf16);
  wide.config.hidden = 192;
  wide.config.intermediate = 600;
  wide.config.head_dim = 64;
  std::string tokens = "7";
  for (int i = 1; i < 230; ++i) tokens += "," + std::to_string(i * i % 251);

  const support::TemporaryDirectory directory;
  const auto out = directory.path() / "logits.npy";
  for (const Case& of : cases) {
    const auto model = directory.path() / of.name;
    support::RandomModelOptions options;
    options.config = of.config;
    options.type = of.type;
    ASSERT_TRUE(support::WriteRandomModel(model, options).ok());
    constexpr std::pair<const char*, const char*> kForms[] = {{"raw", "exact"},
                                                              {"tile8", "exact"},
                                                              {"tile4", "exact"},
                                                              {"raw", "int8"},
                                                              {"tile8", "bf16"}};
    for (const auto& [codec, weights] : kForms) {
      std::string expected;
      for (const char* isa : {"scalar", "avx2", "avx512"}) {
        ASSERT_EQ(setenv("KVANT_ISA", isa, 1), 0);
        const ProgramResult result = RunProgram(
            {KVANT_PATH, "logits", "--model", model, "--tokens", tokens, "--codec", codec,
             "--weights", weights, "--out", out, "--threads", isa[0] == 's' ? "1" : "2"});
        unsetenv("KVANT_ISA");
        if (result.errors.find("CPU lacks") != std::string::npos) continue;
        ASSERT_EQ(result.exit, 0) << result.errors;
        const std::string logits = Read(out);
        if (expected.empty()) expected = logits;
        EXPECT_TRUE(logits == expected)
            << of.name << ", " << codec << ", weights " << weights << ": " << isa;
      }
    }
  }
}

}  // namespace
}  // namespace kvant
