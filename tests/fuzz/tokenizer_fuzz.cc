// Tokenizers and chat templates from files. The first byte says what the input is: '{' begins a
// tokenizer.json, S a SentencePiece model, T the tables of a GGUF file, C a chat template. What is
// accepted also encodes and decodes a text: of tokenizer.json and of a template what follows a zero
// byte, of the others a fixed one.
#include <bit>
#include <string>

#include "base/check.h"
#include "node/chat_template.h"
#include "node/tokenizer.h"
#include "tests/fuzz/text_seeds.h"

namespace kvant::fuzz {
namespace {

using node::Tokenizer;
using node::TokenizerTables;

// As a string with its length, and a number of 4 bytes, both as protobuf writes them.
std::string Field(char tag, std::string_view value) {
  return std::string(1, tag) + static_cast<char>(value.size()) + std::string(value);
}
std::string Word(char tag, uint32_t value) {
  std::string bytes(1, tag);
  for (int shift = 0; shift < 32; shift += 8) bytes += static_cast<char>((value >> shift) & 0xFF);
  return bytes;
}

// A SentencePiece model: 1 unigram, 2 BPE.
std::string Model(char model_type) {
  std::string model = "S";
  const auto piece = [&](std::string_view text, float score, char type) {
    model += Field(
        '\x0a', Field('\x0a', text) + Word('\x15', std::bit_cast<uint32_t>(score)) + '\x18' + type);
  };
  piece("<unk>", 0, 2);
  piece("<s>", 0, 3);
  piece("<x>", 0, 4);
  piece("<0x61>", 0, 6);
  piece("\xE2\x96\x81", -1, 1);
  piece("a", -2, 1);
  piece("b", -2, 1);
  piece("ab", -1.5F, 1);
  piece(
      "\xE2\x96\x81"
      "ab",
      -1.25F, 1);
  // A trie of one unit, and its results.
  const std::string rules = Word('\x12', 4) + std::string(4, '\0') + std::string(" \0", 2);
  model += Field('\x12', std::string("\x18") + model_type);
  model += Field('\x1a', Field('\x12', rules.substr(1)));
  return model;
}

Bytes Tables(char kind) {
  std::string input = std::string("T") + kind + '\0';
  for (const std::string_view token : {"<unk>", "<s>", "a", "b", "ab", "\xE2\x96\x81",
                                       "\xE2\x96\x81"
                                       "a",
                                       "<0x0A>", "  "}) {
    input += static_cast<char>(token.size());
    input += token;
    input += static_cast<char>(token.front() == '<' ? 3 : 1);
    input += static_cast<char>(input.size() % 7);
  }
  return ToBytes(input);
}

TokenizerTables ReadTables(FuzzInput input) {
  constexpr std::string_view kNames[] = {"", "llama-bpe", "deepseek-llm", "default", "gpt-4o"};
  TokenizerTables tables;
  const auto kind = input.Take<uint8_t>();
  tables.kind = (kind & 1) != 0 ? TokenizerTables::Kind::kSentencePiece
                                : TokenizerTables::Kind::kByteLevelBpe;
  tables.architecture = (kind & 2) != 0 ? "gemma" : "llama";
  tables.pre = kNames[input.Take<uint8_t>() % std::size(kNames)];
  while (!input.empty()) {
    const auto bytes = input.TakeBytes(input.Take<uint8_t>() % 32);
    tables.tokens.emplace_back(reinterpret_cast<const char*>(bytes.data()), bytes.size());
    tables.types.push_back(static_cast<TokenizerTables::TokenType>(input.Take<uint8_t>() % 7));
    tables.scores.push_back(static_cast<float>(input.Take<int8_t>()));
  }
  if ((kind & 4) != 0) {
    tables.merges.push_back("a b");
    tables.merges.push_back(tables.tokens.empty() ? "" : tables.tokens.back());
  }
  if ((kind & 8) == 0) tables.bos = 1;
  tables.unknown = kind >> 4;
  return tables;
}

void Use(const Result<std::unique_ptr<Tokenizer>>& tokenizer, std::string_view text) {
  if (!tokenizer.ok()) {
    KV_CHECK(!tokenizer.status().message().empty());
    return;
  }
  const auto ids = (*tokenizer)->Encode(text, true);
  if (!ids.ok()) return;
  for (const int32_t id : *ids) KV_CHECK(id >= 0 && id < (*tokenizer)->vocab_size());
  for (const bool skip_special : {false, true}) {
    const std::string whole = (*tokenizer)->Decode(*ids, skip_special);
    node::StreamDecoder stream(tokenizer->get(), skip_special);
    std::string pieces;
    for (const int32_t id : *ids) pieces += stream.Push(id);
    pieces += stream.Finish();
    KV_CHECK(pieces == whole);
  }
}

}  // namespace

std::vector<Bytes> SeedInputs() {
  using namespace std::string_view_literals;
  std::vector<Bytes> seeds = TextSeeds(
      {"{\"model\":{\"type\":\"BPE\",\"vocab\":{\"a\":0,\"b\":1,\"c\":2,\"ab\":3,\"abc\":4,"
       "\"\xC4\xA0\":5,\"\xC4\xA0"
       "a\":6},\"merges\":[\"a b\",\"ab c\",\"\xC4\xA0 a\"]},"
       "\"decoder\":{\"type\":\"ByteLevel\"},\"normalizer\":null,"
       "\"pre_tokenizer\":{\"type\":\"ByteLevel\",\"add_prefix_space\":false,\"use_regex\":true},"
       "\"post_processor\":null,"
       "\"added_tokens\":[{\"id\":7,\"content\":\"<s>\",\"special\":true,\"lstrip\":true,"
       "\"rstrip\":false,\"single_word\":true,\"normalized\":false}]}\0abc ab <s> a"sv,
       "{\"model\":{\"type\":\"BPE\",\"vocab\":{\"x\":0,\"y\":1,\"xy\":2},\"merges\":[[\"x\",\"y\"]"
       "]},\"normalizer\":{\"type\":\"NFC\"},"
       "\"decoder\":{\"type\":\"ByteLevel\"},\"pre_tokenizer\":{\"type\":\"Sequence\","
       "\"pretokenizers\":[{\"type\":\"Split\",\"pattern\":{\"Regex\":\"\\\\p{N}{1,3}| "
       "?\\\\p{L}+\"},"
       "\"behavior\":\"MergedWithNext\",\"invert\":false},{\"type\":\"Digits\","
       "\"individual_digits\":true},{\"type\":\"ByteLevel\",\"add_prefix_space\":false,"
       "\"use_regex\":false}]}}\0xy 12 e\xCC\x81"sv,
       "{\"model\":{\"type\":\"BPE\",\"byte_fallback\":true,\"fuse_unk\":true,\"unk_token\":\"u\","
       "\"vocab\":{\"u\":0,\"<0x61>\":1,\"\xE2\x96\x81\":2,\"b\":3,\"\xE2\x96\x81"
       "b\":4},\"merges\":[\"\xE2\x96\x81 b\"]},\"normalizer\":{\"type\":\"Sequence\","
       "\"normalizers\":[{\"type\":\"Prepend\",\"prepend\":\"\xE2\x96\x81\"},{\"type\":\"Replace\","
       "\"pattern\":{\"String\":\" \"},\"content\":\"\xE2\x96\x81\"},{\"type\":\"Lowercase\"},"
       "{\"type\":\"NFKC\"}]},\"decoder\":{\"type\":\"Sequence\",\"decoders\":[{\"type\":"
       "\"Replace\",\"pattern\":{\"String\":\"\xE2\x96\x81\"},\"content\":\" \"},{\"type\":"
       "\"ByteFallback\"},{\"type\":\"Fuse\"},{\"type\":\"Strip\",\"content\":\" \",\"start\":1,"
       "\"stop\":0}]},\"added_tokens\":[{\"id\":5,\"content\":\"T\",\"special\":false,\"rstrip\":"
       "true,\"normalized\":true}]}\0b aT Bc"sv,
       "{\"model\":{\"vocab\":{\"_\":0,\"a\":1},\"merges\":[]},\"pre_tokenizer\":{\"type\":"
       "\"Sequence\",\"pretokenizers\":[{\"type\":\"Metaspace\",\"replacement\":\"_\","
       "\"prepend_scheme\":\"first\",\"split\":true},{\"type\":\"Punctuation\",\"behavior\":"
       "\"Contiguous\"},{\"type\":\"Whitespace\"}]},\"decoder\":{\"type\":\"Metaspace\","
       "\"replacement\":\"_\",\"prepend_scheme\":\"first\"}}\0a,, a"sv,
       "C{%- for message in messages %}{{- '<|im_start|>' + message.role + '\\n' + message.content "
       "+ "
       "'<|im_end|>\\n' }}{% endfor %}{{ '<|im_start|>system\\nBe kind.<|im_end|>' }}\0hello"sv,
       "C{{ bos_token }}{{ '[INST] ' + message['content'] + '[/INST]' }}"
       "{{ message['content']|trim + eos_token }}loop.last and system_message is defined\0 x "sv});
  seeds.push_back(ToBytes(Model(1)));
  seeds.push_back(ToBytes(Model(2)));
  for (const char kind : {'\1', '\3', '\5', '\0'}) seeds.push_back(Tables(kind));
  return seeds;
}

}  // namespace kvant::fuzz

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  using namespace kvant::fuzz;
  const std::string_view text = AsTextView(data, size);
  const size_t zero = std::min(text.find('\0'), text.size());
  const std::string_view behind = zero < text.size() ? text.substr(zero + 1) : "a b";
  constexpr std::string_view kText = " ab  a<s>b<x>\n\xC2\xA0 ab\xF0\x9F\x98\x80";
  if (text.starts_with('S')) {
    Use(Tokenizer::ParseSentencePiece(text.substr(1), true, true, "fuzz"), kText);
  } else if (text.starts_with('T')) {
    Use(Tokenizer::FromTables(ReadTables(FuzzInput(data + 1, size - 1)), "fuzz"), kText);
  } else if (text.starts_with('C')) {
    const kvant::node::ChatMessage messages[] = {{"system", std::string(behind)},
                                                 {"user", std::string(behind)},
                                                 {"assistant", std::string(behind)},
                                                 {"user", "?"}};
    const kvant::node::ChatTemplate chat{std::string(text.substr(1, zero - 1)), "<s>", "</s>"};
    (void)ApplyChatTemplate(chat, messages, "today").ok();
    (void)ApplyChatTemplate(chat, std::span(messages).subspan(1), "today").ok();
  } else {
    Use(Tokenizer::Parse(text.substr(0, zero), "fuzz"), behind);
  }
  return 0;
}
