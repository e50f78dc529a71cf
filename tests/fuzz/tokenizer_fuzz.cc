// tokenizer.json; what is accepted also encodes and decodes a text, given after a zero byte.
#include "base/check.h"
#include "node/tokenizer.h"
#include "tests/fuzz/text_seeds.h"

namespace kvant::fuzz {

std::vector<Bytes> SeedInputs() {
  using namespace std::string_view_literals;
  return TextSeeds(
      {"{\"model\":{\"type\":\"BPE\",\"vocab\":{\"a\":0,\"b\":1,\"c\":2,\"ab\":3,\"abc\":4,"
       "\"\xC4\xA0\":5,\"\xC4\xA0"
       "a\":6},\"merges\":[\"a b\",\"ab c\",\"\xC4\xA0 a\"]},"
       "\"decoder\":{\"type\":\"ByteLevel\"},\"normalizer\":null,"
       "\"pre_tokenizer\":{\"type\":\"ByteLevel\",\"add_prefix_space\":false,\"use_regex\":true},"
       "\"post_processor\":null,"
       "\"added_tokens\":[{\"id\":7,\"content\":\"<s>\",\"special\":true,\"lstrip\":false,"
       "\"rstrip\":false,\"single_word\":false,\"normalized\":false}]}\0abc ab<s> a"sv,
       "{\"model\":{\"type\":\"BPE\",\"vocab\":{\"x\":0,\"y\":1},\"merges\":[[\"x\",\"y\"]]},"
       "\"decoder\":{\"type\":\"ByteLevel\"},\"pre_tokenizer\":{\"type\":\"Sequence\","
       "\"pretokenizers\":[{\"type\":\"Split\",\"pattern\":{\"Regex\":\"\\\\p{N}{1,3}| "
       "?\\\\p{L}+\"},"
       "\"behavior\":\"Isolated\",\"invert\":false},{\"type\":\"Digits\","
       "\"individual_digits\":true},{\"type\":\"ByteLevel\",\"add_prefix_space\":false,"
       "\"use_regex\":false}]}}\0xy 12"sv});
}

}  // namespace kvant::fuzz

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  const std::string_view text = kvant::fuzz::AsTextView(data, size);
  const size_t zero = std::min(text.find('\0'), text.size());
  const auto tokenizer = kvant::node::Tokenizer::Parse(text.substr(0, zero), "fuzz");
  if (!tokenizer.ok()) return 0;
  const auto ids = (*tokenizer)->Encode(zero < text.size() ? text.substr(zero + 1) : "a b", true);
  if (!ids.ok()) return 0;
  const std::string whole = (*tokenizer)->Decode(*ids, false);
  kvant::node::StreamDecoder stream(tokenizer->get(), false);
  std::string pieces;
  for (const int32_t id : *ids) pieces += stream.Push(id);
  pieces += stream.Finish();
  KV_CHECK(pieces == whole);
  return 0;
}
