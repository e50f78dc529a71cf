// Tokenizers from a GGUF file's tables and from SentencePiece models: the same ids and texts as
// Python's, from tests/golden/tokenizer (scripts/golden/tokenizer.py), and malformed ones.
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <unistd.h>

#include <filesystem>
#include <fstream>
#include <nlohmann/json.hpp>
#include <sstream>

#include "base/random.h"
#include "node/tokenizer.h"

namespace kvant::node {
namespace {

using nlohmann::json;
using testing::HasSubstr;
using Ids = std::vector<int32_t>;
using TokenType = TokenizerTables::TokenType;

std::string ReadText(const std::filesystem::path& path) {
  std::ifstream file(path, std::ios::binary);
  std::stringstream text;
  text << file.rdbuf();
  return text.str();
}

std::filesystem::path Golden(const std::string& file) {
  return std::filesystem::path(KVANT_SOURCE_DIR) / "tests/golden/tokenizer" / file;
}

TokenizerTables ReadTables(const std::string& name) {
  const json file = json::parse(ReadText(Golden(name + ".tables.json")));
  TokenizerTables tables;
  tables.kind = file["kind"] == "llama" ? TokenizerTables::Kind::kSentencePiece
                                        : TokenizerTables::Kind::kByteLevelBpe;
  tables.architecture = file["architecture"];
  tables.pre = file.value("pre", "");
  tables.tokens = file["tokens"].get<std::vector<std::string>>();
  for (const json& type : file["types"]) {
    tables.types.push_back(static_cast<TokenType>(type.get<int>()));
  }
  tables.scores = file.value("scores", std::vector<float>());
  tables.merges = file.value("merges", std::vector<std::string>());
  tables.bos = file["bos"].get<int32_t>();
  if (file.contains("eos")) tables.eos = file["eos"].get<int32_t>();
  if (file.contains("unknown")) tables.unknown = file["unknown"].get<int32_t>();
  if (file.contains("add_bos")) tables.add_bos = file["add_bos"].get<bool>();
  if (file.contains("add_space_prefix")) tables.add_space_prefix = false;
  return tables;
}

Result<std::unique_ptr<Tokenizer>> Make(const std::string& name) {
  if (std::filesystem::exists(Golden(name + ".model"))) {
    return Tokenizer::ParseSentencePiece(ReadText(Golden(name + ".model")), true, false, name);
  }
  return Tokenizer::FromTables(ReadTables(name), name);
}

class KindsTest : public testing::TestWithParam<std::string> {};

TEST_P(KindsTest, DoesAsPython) {
  const auto made = Make(GetParam());
  ASSERT_TRUE(made.ok()) << made.status().ToString();
  const Tokenizer& tokenizer = **made;
  const json cases = json::parse(ReadText(Golden(GetParam() + ".cases.json")));
  ASSERT_GT(cases.size(), 40U);
  for (const json& golden : cases) {
    const auto text = golden["text"].get<std::string>();
    Ids ids;
    if (golden.contains("ids")) {
      ids = golden["ids"].get<Ids>();
      EXPECT_EQ(*tokenizer.Encode(text, false), ids) << text;
      EXPECT_EQ(*tokenizer.Encode(text, true), golden["special"].get<Ids>()) << text;
    } else {
      ids = golden["decode"].get<Ids>();
      EXPECT_EQ(tokenizer.Decode(ids), text) << golden.dump();
      if (golden.contains("all")) {
        EXPECT_EQ(tokenizer.Decode(ids, false), golden["all"].get<std::string>()) << golden.dump();
      }
    }
    for (const bool skip_special : {true, false}) {
      StreamDecoder stream(&tokenizer, skip_special);
      std::string streamed;
      for (const int32_t id : ids) streamed += stream.Push(id);
      streamed += stream.Finish();
      EXPECT_EQ(streamed, tokenizer.Decode(ids, skip_special));
    }
  }
}

INSTANTIATE_TEST_SUITE_P(All, KindsTest,
                         testing::Values("spm", "spm_gemma", "bpe_llama3", "bpe_qwen2",
                                         "bpe_deepseek3", "sp_bpe", "sp_bpe_unknown", "sp_unigram",
                                         "sp_unigram_bytes"));

TEST(SentencePieceTest, WrittenControlTokensAreIds) {
  const auto tokenizer = *Make("sp_bpe");
  const int32_t begin = *tokenizer->FindToken("[INST]");
  const auto ids = *tokenizer->Encode("[INST]x<s>", false);
  EXPECT_EQ(ids.front(), begin);
  EXPECT_EQ(ids.back(), *tokenizer->FindToken("<s>"));
  EXPECT_TRUE(tokenizer->IsSpecial(begin));
  EXPECT_EQ(tokenizer->TokenText(begin), "[INST]");
}

TEST(SentencePieceTest, BytesComeWithTheirCharacter) {
  const auto tokenizer = *Make("sp_bpe");
  const auto ids = *tokenizer->Encode("\xF0\x9F\xA6\x80", false);
  StreamDecoder stream(tokenizer.get());
  std::vector<std::string> pieces;
  for (const int32_t id : ids) pieces.push_back(stream.Push(id));
  EXPECT_EQ(pieces.back(), "\xF0\x9F\xA6\x80");
  EXPECT_EQ(stream.Finish(), "");
}

// A model directory with nothing but a SentencePiece model.
TEST(SentencePieceTest, LoadsFromADirectory) {
  const auto directory = std::filesystem::temp_directory_path() /
                         ("kvant_sentencepiece_" + std::to_string(::getpid()));
  std::filesystem::create_directories(directory);
  EXPECT_THAT(Tokenizer::LoadFrom(directory).status().message(), HasSubstr("tokenizer.json"));
  std::filesystem::copy_file(Golden("sp_unigram.model"), directory / "tokenizer.model");
  std::ofstream(directory / "tokenizer_config.json") << R"({"add_eos_token":true})";
  const auto tokenizer = Tokenizer::LoadFrom(directory);
  ASSERT_TRUE(tokenizer.ok()) << tokenizer.status().ToString();
  const auto ids = *(*tokenizer)->Encode("fox", true);
  EXPECT_EQ(ids.front(), *(*tokenizer)->FindToken("<s>"));
  EXPECT_EQ(ids.back(), *(*tokenizer)->FindToken("</s>"));
  std::filesystem::remove_all(directory);
}

TEST(SentencePieceTest, SaysWhatIsMalformed) {
  const auto error = [](std::string_view proto) {
    const auto parsed = Tokenizer::ParseSentencePiece(proto, true, false, "t");
    EXPECT_FALSE(parsed.ok());
    return parsed.status().message();
  };
  EXPECT_THAT(error("IQ== 0\nIg== 1\n"), HasSubstr("not a SentencePiece model"));
  EXPECT_THAT(error(""), HasSubstr("not a SentencePiece model"));
  EXPECT_THAT(error(std::string_view("\x0a\x05\x0a\x03\xff\x61\x62", 7)), HasSubstr("UTF-8"));
  EXPECT_THAT(error(std::string_view("\x0a\x03\x0a\x01\x61", 5)), HasSubstr("unknown one"));
}

// Any change of a few bytes ends in a tokenizer or in an error (run under the asan preset).
TEST(SentencePieceTest, SurvivesMutations) {
  Random random(31);
  for (const char* name : {"sp_bpe", "sp_unigram"}) {
    const std::string good = ReadText(Golden(std::string(name) + ".model"));
    for (int round = 0; round < 150; ++round) {
      std::string proto = good;
      for (uint64_t edits = 1 + random.Below(4); edits > 0; --edits) {
        proto[random.Below(proto.size())] = static_cast<char>(random.Below(256));
      }
      const auto parsed = Tokenizer::ParseSentencePiece(proto, true, false, "t");
      if (!parsed.ok()) continue;
      const auto ids = (*parsed)->Encode("The \xC2\xA0quick caf\xC3\xA9 x<s>\xEF\xBC\x81", true);
      if (ids.ok()) (*parsed)->Decode(*ids);
    }
  }
}

TEST(TablesTest, SaysWhatContradicts) {
  const auto error = [](std::string_view name, auto change) {
    TokenizerTables tables = ReadTables(std::string(name));
    change(&tables);
    const auto made = Tokenizer::FromTables(std::move(tables), "t");
    EXPECT_FALSE(made.ok());
    return made.status().message();
  };
  using Tables = TokenizerTables;
  EXPECT_THAT(error("spm", [](Tables* t) { t->tokens.clear(); }), HasSubstr("0 tokens"));
  EXPECT_THAT(error("spm", [](Tables* t) { t->scores.pop_back(); }), HasSubstr("scores"));
  EXPECT_THAT(error("spm", [](Tables* t) { t->scores.clear(); }), HasSubstr("neither scores"));
  EXPECT_THAT(error("spm", [](Tables* t) { t->types.pop_back(); }), HasSubstr("token types"));
  EXPECT_THAT(error("spm", [](Tables* t) { t->scores[5] = std::stof("nan"); }),
              HasSubstr("not a number"));
  EXPECT_THAT(error("spm", [](Tables* t) { t->bos = 1 << 20; }), HasSubstr("outside"));
  EXPECT_THAT(error("spm", [](Tables* t) { t->unknown = 1 << 20; }), HasSubstr("outside"));
  EXPECT_THAT(error("spm", [](Tables* t) { t->tokens[300] = "\xff"; }), HasSubstr("UTF-8"));
  EXPECT_THAT(error("bpe_qwen2", [](Tables* t) { t->merges[7] = "x y z"; }),
              HasSubstr("merge number 8"));
  EXPECT_THAT(error("bpe_qwen2", [](Tables* t) { t->pre = "nobody"; }),
              testing::AllOf(HasSubstr("nobody"), HasSubstr("llama-bpe")));
}

TEST(TablesTest, KnowsPreTokenizers) {
  for (const char* pre : {"", "default", "llama-bpe", "dbrx", "qwen2", "gpt-2", "smollm", "tekken",
                          "gpt-4o", "deepseek-llm", "deepseek-coder", "deepseek-v3", "falcon"}) {
    TokenizerTables tables = ReadTables("bpe_qwen2");
    tables.pre = pre;
    const auto tokenizer = Tokenizer::FromTables(std::move(tables), "t");
    ASSERT_TRUE(tokenizer.ok()) << tokenizer.status().ToString();
    const std::string text = "Wo 12\r\n  sind\u2126 \u4e2d\uff01\u212a x's, \u1f7d\U0001F600 ";
    EXPECT_EQ((*tokenizer)->Decode(*(*tokenizer)->Encode(text, false)), text) << pre;
  }
}

TEST(TablesTest, KnowsItsTokens) {
  const auto tokenizer = *Make("spm_gemma");
  EXPECT_EQ(tokenizer->TokenBytes(3 + 10), "\n");  // <0x0A>
  EXPECT_EQ(tokenizer->TokenText(3 + 10), "<0x0A>");
  EXPECT_TRUE(tokenizer->IsSpecial(1));
  EXPECT_EQ(tokenizer->FindToken("<b>"), tokenizer->vocab_size() - 1);
  EXPECT_EQ(tokenizer->Encode("a<b>", false)->back(), tokenizer->vocab_size() - 1);
}

}  // namespace
}  // namespace kvant::node
