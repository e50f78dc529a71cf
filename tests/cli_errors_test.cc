// What kvant says when it is used wrongly: every message names the culprit, and the exit status is
// 2 for a wrong command, 1 for a request that failed.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <filesystem>
#include <memory>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "node/requests.h"
#include "tests/support/node_world.h"
#include "tests/support/program.h"
#include "tests/support/random_model.h"

namespace kvant {
namespace {

namespace fs = std::filesystem;
using support::ProgramResult;
using support::RunProgram;
using testing::HasSubstr;

class CliErrors : public testing::Test {
 protected:
  fs::path Path(const std::string& name) const { return directory_.path() / name; }
  std::string Write(const std::string& name, const std::string& text) const {
    EXPECT_TRUE(node::WriteFile(Path(name), text).ok());
    return Path(name);
  }
  // A copy of the tiny model to be spoilt.
  fs::path Copy(const std::string& name) const {
    fs::copy(support::TinyModel(), Path(name), fs::copy_options::recursive);
    return Path(name);
  }
  static void Expect(std::vector<std::string> flags, int exit,
                     const std::vector<std::string>& said) {
    flags.insert(flags.begin(), KVANT_PATH);
    const ProgramResult result = RunProgram(flags);
    EXPECT_EQ(result.exit, exit) << testing::PrintToString(flags) << "\n" << result.errors;
    for (const std::string& part : said) EXPECT_THAT(result.errors + result.out, HasSubstr(part));
  }
  static void ExpectGenerate(std::vector<std::string> more, int exit,
                             const std::vector<std::string>& said) {
    std::vector<std::string> flags = {"generate", "--prompt", "abc", "--max-tokens", "2"};
    if (std::find(more.begin(), more.end(), "--model") == more.end()) {
      flags.insert(flags.end(), {"--model", support::TinyModel()});
    }
    flags.insert(flags.end(), more.begin(), more.end());
    Expect(flags, exit, said);
  }

  support::TemporaryDirectory directory_;
};

TEST_F(CliErrors, OfTheModel) {
  ExpectGenerate({"--model", "/nowhere/model"}, 2, {"/nowhere/model"});

  const fs::path missing = Copy("missing");
  fs::remove(missing / "model.safetensors");
  ExpectGenerate({"--model", missing}, 2, {missing});

  // The config asks for a third layer, which the file lacks, or for other widths.
  const auto change = [](const fs::path& model, const char* field, int value) {
    const Result<std::string> text = node::ReadFile(model / "config.json");
    ASSERT_TRUE(text.ok());
    nlohmann::json config = nlohmann::json::parse(*text);
    config[field] = value;
    ASSERT_TRUE(node::WriteFile(model / "config.json", config.dump()).ok());
  };
  const fs::path layers = Copy("layers");
  change(layers, "num_hidden_layers", 3);
  ExpectGenerate({"--model", layers}, 2, {"model.layers.2."});
  const fs::path wide = Copy("wide");
  change(wide, "intermediate_size", 128);
  ExpectGenerate({"--model", wide}, 2, {"mlp.gate_proj.weight", "128", "96"});
  const fs::path broken = Copy("broken");
  ASSERT_TRUE(node::WriteFile(broken / "config.json", "{").ok());
  ExpectGenerate({"--model", broken}, 2, {"config.json"});
}

TEST_F(CliErrors, OfFlags) {
  ExpectGenerate({"--codec", "zip"}, 2, {"zip", "tile8"});
  ExpectGenerate({"--weights", "q4_0"}, 2, {"q4_0", "exact, bf16, int8"});
  ExpectGenerate({"--store", "zip"}, 2, {"zip", "plain", "lossless"});
  ExpectGenerate({"--codec", "tile8", "--store", "lossless"}, 2,
                 {"lossless", "tile8", "--codec raw"});
  ExpectGenerate({"--wire", "thin"}, 2, {"thin", "k8v4"});
  ExpectGenerate({"--local-cache", "lots"}, 2, {"lots", "512MiB"});
  ExpectGenerate({"--cache-memory", "12QiB"}, 2, {"12QiB", "512MiB"});
  ExpectGenerate({"--cache-memory", "1KiB"}, 2, {"at least"});
  ExpectGenerate({"--domain", "acme"}, 2, {"acme", "DOMAIN=tenant"});
  ExpectGenerate({"--domain", "a=x", "--domain", "b=x"}, 2, {"x", "two domains"});
  ExpectGenerate({"--secret-file", "/nowhere/secret"}, 2, {"/nowhere/secret"});
  ExpectGenerate({"--secret-file", Write("short", "abc")}, 2, {"16"});
  ExpectGenerate({"--cache", "127.0.0.1:7070"}, 2, {"127.0.0.1:7070"});
  ExpectGenerate({"--cache", "tcp://127.0.0.1:99999"}, 2, {"tcp://127.0.0.1:99999"});
  ExpectGenerate({"--cache", ""}, 2, {"--cache", "leave the option out"});
  ExpectGenerate({"--cache", "tcp://127.0.0.1:1", "--no-cache"}, 2, {"--no-cache"});
  ExpectGenerate({"--temperature", "9"}, 2, {"--temperature"});
  ExpectGenerate({"--top-p", "0"}, 2, {"top_p"});
  ExpectGenerate({"--max-batch", "0"}, 2, {"--max-batch"});
  ExpectGenerate({"--max-tokens", "0"}, 2, {"--max-tokens"});
  ExpectGenerate({"--no-such-flag"}, 2, {"--no-such-flag"});
  Expect({"generate", "--model", support::TinyModel()}, 2, {"--prompt"});
  Expect({"generate", "--prompt", "x"}, 2, {"--model"});
  Expect({"generate", "--model", support::TinyModel(), "--prompt-file", "/nowhere/text"}, 2,
         {"/nowhere/text"});
  Expect({}, 2, {"subcommand"});
  Expect({"dance"}, 2, {"no command 'dance'", "generate"});
  Expect({"bench", "dance"}, 2, {"no command 'dance'", "service"});
  for (const char* seconds : {"nan", "0", "-1", "soon"})
    Expect({"bench", "service", "--seconds", seconds}, 2, {"--seconds", "above 0", seconds});
  Expect({}, 2, {"subcommand"});
}

TEST_F(CliErrors, OfPromptsAndRequests) {
  const std::string model = support::TinyModel();
  const std::string prompt = Write("long", std::string(2 * support::kTinyContext, 'q'));
  Expect({"generate", "--model", model, "--prompt-file", prompt}, 2, {"context of 512", "shorten"});

  const std::string bad =
      Write("bad.jsonl",
            "{\"custom_id\": \"a\", \"method\": \"POST\", \"url\": \"/v1/completions\", \"body\": "
            "{\"prompt\": \"x\", \"max_tokens\": 1}}\n"
            "{\"custom_id\": \"b\", \"method\": \"POST\", \"url\": \"/v1/completions\", \"body\": "
            "{\"prompt\": \"x\", \"temperature\": \"hot\"}}\n");
  Expect({"run", "--model", model, "--requests", bad}, 2,
         {"bad.jsonl, line 2", "body.temperature"});
  Expect({"run", "--model", model, "--requests", "/nowhere/requests"}, 2, {"/nowhere/requests"});

  const std::string good =
      Write("good.jsonl",
            "{\"custom_id\": \"a\", \"method\": \"POST\", \"url\": \"/v1/completions\", \"body\": "
            "{\"prompt\": \"x\", \"max_tokens\": 1}}\n");
  Expect({"run", "--model", model, "--requests", good, "--roles", "cache=1,decode=1"}, 2,
         {"mpirun"});
  // Before anything is computed.
  const ProgramResult early = RunProgram({KVANT_PATH, "run", "--model", model, "--requests", good,
                                          "--reference", "/nowhere/reference"});
  EXPECT_EQ(early.exit, 2);
  EXPECT_THAT(early.errors,
              testing::AllOf(HasSubstr("/nowhere/reference"), testing::Not(HasSubstr("answered"))));
  Expect({"run", "--model", model, "--requests", good, "--answers", "/nowhere/answers"}, 2,
         {"/nowhere/answers"});
  const std::string chat =
      Write("chat.jsonl",
            "{\"custom_id\": \"talk\", \"method\": \"POST\", \"url\": \"/v1/chat/completions\", "
            "\"body\": {\"messages\": [{\"role\": \"user\", \"content\": \"x\"}]}}\n");
  Expect({"run", "--model", model, "--requests", chat}, 1, {"'talk'", "/v1/completions"});
}

TEST_F(CliErrors, OfReports) {
  Expect({"report", "--json-in", "/nowhere/report"}, 2, {"/nowhere/report"});
  Expect({"report", "--json-in", Write("text", "hello")}, 2, {"not JSON"});
  Expect({"report", "--json-in", Write("other", "{}")}, 2, {"not a report"});
}

TEST_F(CliErrors, HelpTeaches) {
  Expect({"--help"}, 0, {"generate", "run", "report", "bench", "mpirun -np 4"});
  Expect({"run", "--help"}, 0, {"--roles", "--codec", "--wire", "--reference"});
  Expect({"generate", "--help"}, 0, {"--cache", "--prompt-file", "--tier-timeout"});
}

}  // namespace
}  // namespace kvant
