// Reading checkpoints: what is well-formed is found, what is not ends in an error.
#include "node/safetensors.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cstring>
#include <fstream>
#include <numeric>

#include "base/bytes.h"
#include "base/random.h"
#include "node/json.h"
#include "tests/support/random_model.h"

namespace kvant::node {
namespace {

using testing::HasSubstr;

std::string File(std::string_view header, size_t data_bytes) {
  std::string file(8, '\0');
  StoreLittle(reinterpret_cast<std::byte*>(file.data()), static_cast<uint64_t>(header.size()));
  file += header;
  file.resize(file.size() + data_bytes, 'x');
  return file;
}

std::string ErrorOf(std::string_view header, size_t data_bytes) {
  const std::string file = File(header, data_bytes);
  const auto parsed = ParseSafetensors(AsBytes(file), "f");
  if (parsed.ok()) return "no error";
  EXPECT_EQ(parsed.status().code(), StatusCode::kInvalidArgument);
  return parsed.status().message();
}

TEST(ParseSafetensors, FindsTensors) {
  const std::string file = File(
      R"({"__metadata__":{"format":"pt"},"b":{"dtype":"BF16","shape":[2,3],"data_offsets":[4,16]},)"
      R"("a":{"dtype":"F32","shape":[],"data_offsets":[0,4]},)"
      R"("none":{"dtype":"I64","shape":[0,7],"data_offsets":[16,16]}})",
      16);
  const auto parsed = ParseSafetensors(AsBytes(file), "f");
  ASSERT_TRUE(parsed.ok()) << parsed.status().ToString();
  EXPECT_EQ(parsed->size(), 3U);
  const Tensor& b = parsed->at("b");
  EXPECT_EQ(b.type, DataType::kBf16);
  EXPECT_EQ(b.shape, (std::vector<int64_t>{2, 3}));
  EXPECT_EQ(b.bytes.size(), 12U);
  EXPECT_EQ(b.bytes.data(), AsBytes(file).data() + file.size() - 12);
  EXPECT_EQ(parsed->at("none").type, DataType::kOther);
}

TEST(ParseSafetensors, SaysWhatIsWrong) {
  EXPECT_THAT(ErrorOf("", 0), HasSubstr("malformed JSON"));
  EXPECT_THAT(ErrorOf("[]", 0), HasSubstr("must be an object"));
  EXPECT_THAT(ErrorOf(R"({"a":3})", 0), HasSubstr("tensor a"));
  EXPECT_THAT(ErrorOf(R"({"a":{"dtype":"F33","shape":[1],"data_offsets":[0,4]}})", 4),
              HasSubstr("dtype is unknown: F33"));
  EXPECT_THAT(ErrorOf(R"({"a":{"dtype":"F32","shape":[2],"data_offsets":[0,4]}})", 4),
              HasSubstr("needs 8 bytes, its data has 4"));
  EXPECT_THAT(ErrorOf(R"({"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}})", 3),
              HasSubstr("is the file complete?"));
  EXPECT_THAT(ErrorOf(R"({"a":{"dtype":"F32","shape":[1],"data_offsets":[4,0]}})", 4),
              HasSubstr("ends before it begins"));
  EXPECT_THAT(ErrorOf(R"({"a":{"dtype":"F32","shape":[-1],"data_offsets":[0,4]}})", 4),
              HasSubstr("dimension"));
  EXPECT_THAT(
      ErrorOf(R"({"a":{"dtype":"F32","shape":[4294967296,4294967296],"data_offsets":[0,0]}})", 0),
      HasSubstr("overflow"));
  EXPECT_THAT(
      ErrorOf(R"({"a":{"dtype":"U8","shape":[18446744073709551615],"data_offsets":[0,0]}})", 0),
      HasSubstr("too large"));
  EXPECT_THAT(ErrorOf(R"({"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},)"
                      R"("b":{"dtype":"F32","shape":[1],"data_offsets":[2,6]}})",
                      6),
              HasSubstr("overlap"));
  EXPECT_THAT(ErrorOf(R"({"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},)"
                      R"("b":{"dtype":"F32","shape":[1],"data_offsets":[6,10]}})",
                      10),
              HasSubstr("gap"));
  EXPECT_THAT(ErrorOf(R"({"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}})", 9),
              HasSubstr("cover 4 bytes"));
  EXPECT_THAT(ErrorOf(R"({"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},)"
                      R"("a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}})",
                      4),
              HasSubstr("stands twice"));
  EXPECT_THAT(ErrorOf(std::string(1 << 20, '['), 0), HasSubstr("nested deeper"));
  EXPECT_THAT(ErrorOf("{\"" + std::string(1 << 20, 'a'), 0), testing::SizeIs(testing::Lt(400)));
  const std::string huge = "\xff\xff\xff\xff\xff\xff\xff\xff{}";
  EXPECT_THAT(ParseSafetensors(AsBytes(huge), "f").status().message(), HasSubstr("header"));
  EXPECT_THAT(ParseSafetensors(AsBytes("{}"), "f").status().message(), HasSubstr("too few"));
}

// Mutated files never lead outside their bytes (run under the asan preset), and what is accepted
// keeps the promises of Tensor.
TEST(ParseSafetensors, SurvivesMutations) {
  const std::string good = File(R"({"a":{"dtype":"F32","shape":[2,3],"data_offsets":[0,24]},)"
                                R"("b":{"dtype":"BF16","shape":[5],"data_offsets":[24,34]}})",
                                34);
  Random random(2024);
  const std::string_view tokens[] = {"0",  "9",      "18446744073709551615",
                                     "-1", "1e9",    "\"",
                                     "[",  "]",      "{",
                                     "}",  ",",      "null",
                                     "24", "[[[[[[", "\xff"};
  int accepted = 0;
  for (int round = 0; round < 100000; ++round) {
    std::string file = good;
    const int edits = 1 + static_cast<int>(random.Below(3));
    for (int edit = 0; edit < edits && !file.empty(); ++edit) {
      const size_t at = random.Below(file.size());
      switch (random.Below(4)) {
        case 0:
          file[at] = static_cast<char>(random.Next());
          break;
        case 1:
          file.erase(at, 1 + random.Below(8));
          break;
        case 2:
          file.resize(at);
          break;
        default:
          file.insert(at, tokens[random.Below(std::size(tokens))]);
      }
    }
    const auto parsed = ParseSafetensors(AsBytes(file), "f");
    if (!parsed.ok()) continue;
    ++accepted;
    for (const auto& [name, tensor] : *parsed) {
      const auto bytes = AsBytes(file);
      ASSERT_GE(tensor.bytes.data(), bytes.data());
      ASSERT_LE(tensor.bytes.data() + tensor.bytes.size(), bytes.data() + bytes.size());
      if (tensor.type == DataType::kOther) continue;
      const int64_t elements = std::accumulate(tensor.shape.begin(), tensor.shape.end(), int64_t{1},
                                               std::multiplies<>());
      ASSERT_EQ(tensor.bytes.size(),
                static_cast<size_t>(elements) * (tensor.type == DataType::kFp32 ? 4 : 2));
    }
  }
  EXPECT_GT(accepted, 100) << "the mutations should leave some files well-formed";
}

class CheckpointTest : public testing::Test {
 protected:
  void Write(int shards) {
    support::RandomModelOptions options;
    options.config = support::TinyConfig();
    options.shards = shards;
    ASSERT_TRUE(support::WriteRandomModel(directory_.path(), options).ok());
  }
  support::TemporaryDirectory directory_;
};

TEST_F(CheckpointTest, ShardsHoldTheSameTensors) {
  Write(1);
  const auto whole = Checkpoint::Open(directory_.path());
  ASSERT_TRUE(whole.ok()) << whole.status().ToString();
  support::TemporaryDirectory other;
  support::RandomModelOptions options;
  options.config = support::TinyConfig();
  options.shards = 3;
  ASSERT_TRUE(support::WriteRandomModel(other.path(), options).ok());
  const auto cut = Checkpoint::Open(other.path());
  ASSERT_TRUE(cut.ok()) << cut.status().ToString();
  ASSERT_EQ((*whole)->tensors().size(), (*cut)->tensors().size());
  for (const auto& [name, tensor] : (*whole)->tensors()) {
    ASSERT_TRUE((*cut)->Has(name)) << name;
    EXPECT_EQ(AsText(tensor.bytes), AsText((*cut)->tensors().at(name).bytes)) << name;
  }
}

TEST_F(CheckpointTest, FindNamesWhatIsMissingOrOfAnotherShape) {
  Write(1);
  const auto checkpoint = Checkpoint::Open(directory_.path());
  ASSERT_TRUE(checkpoint.ok());
  const int64_t shape[] = {300, 64};
  EXPECT_TRUE((*checkpoint)->Find("model.embed_tokens.weight", shape).ok());
  EXPECT_THAT((*checkpoint)->Find("model.nothing.weight", shape).status().message(),
              HasSubstr("lacks tensor model.nothing.weight"));
  const int64_t wrong[] = {301, 64};
  EXPECT_THAT((*checkpoint)->Find("model.embed_tokens.weight", wrong).status().message(),
              testing::AllOf(HasSubstr("[300, 64]"), HasSubstr("expected [301, 64]")));
}

TEST_F(CheckpointTest, IndexMustNotLeadOutOfTheDirectory) {
  Write(2);
  const auto index = directory_.path() / "model.safetensors.index.json";
  std::ofstream(index) << R"({"weight_map":{"a":"../model.safetensors"}})";
  EXPECT_THAT(Checkpoint::Open(directory_.path()).status().message(),
              HasSubstr("file name without directory"));
  std::ofstream(index) << R"({"weight_map":{"a":"model-00001-of-00002.safetensors"}})";
  EXPECT_THAT(Checkpoint::Open(directory_.path()).status().message(),
              HasSubstr("tensor a is not in model-00001-of-00002.safetensors"));
  std::ofstream(index) << R"({"weight_map":{"a":"gone.safetensors"}})";
  EXPECT_THAT(Checkpoint::Open(directory_.path()).status().message(), HasSubstr("gone"));
}

TEST_F(CheckpointTest, SaysWhatADirectoryWithoutWeightsLacks) {
  EXPECT_THAT(Checkpoint::Open(directory_.path()).status().message(),
              HasSubstr("neither model.safetensors nor model.safetensors.index.json"));
}

}  // namespace
}  // namespace kvant::node
