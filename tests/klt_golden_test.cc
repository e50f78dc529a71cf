// Readers of klt blocks give, and writers write, exactly what tests/golden/klt holds.
#include "tests/klt_golden.h"

#include <gtest/gtest.h>

#include <filesystem>
#include <fstream>
#include <iterator>

#include "kernels/blas.h"

namespace kvant::node {
namespace {

const std::filesystem::path kDirectory =
    std::filesystem::path(KVANT_SOURCE_DIR) / "tests" / "golden" / "klt";

std::string ReadFile(const std::filesystem::path& path) {
  std::ifstream in(path, std::ios::binary);
  return {std::istreambuf_iterator<char>(in), {}};
}

bool SameBits(const KltCoder::Rows& a, const KltCoder::Rows& b) {
  if (a.size() != b.size()) return false;
  for (size_t layer = 0; layer < a.size(); ++layer) {
    if (a[layer].size() != b[layer].size() ||
        std::memcmp(a[layer].data(), b[layer].data(), a[layer].size() * sizeof(float)) != 0) {
      return false;
    }
  }
  return true;
}

TEST(KltGoldenTest, EveryFileReadsAndWritesToTheBit) {
  ASSERT_TRUE(kernels::LoadBlas().ok());
  int good = 0;
  int bad = 0;
  for (const std::string name : kKltGoldenModels) {
    const support::TemporaryDirectory directory;
    ASSERT_TRUE(support::WriteRandomModel(directory.path(), KltGoldenModel(name)).ok());
    const auto model = Model::Load(directory.path());
    ASSERT_TRUE(model.ok()) << model.status().ToString();
    Result<KltPack> pack = LoadKltPack(kDirectory / (name + ".pack"), **model);
    ASSERT_TRUE(pack.ok()) << pack.status().ToString();
    const std::filesystem::path saved = directory.path() / "saved";
    ASSERT_TRUE(SaveKltPack(saved, **model, &*pack).ok());
    EXPECT_EQ(ReadFile(saved), ReadFile(kDirectory / (name + ".pack")));
    for (const auto& entry : std::filesystem::directory_iterator(kDirectory)) {
      const std::string file_name = entry.path().filename().string();
      if (entry.path().extension() != ".klt" || !file_name.starts_with(name + "-")) continue;
      SCOPED_TRACE(file_name);
      const std::string content = ReadFile(entry.path());
      const KltGolden file = ParseKltGolden(content, pack->transforms[0].groups.size());
      EXPECT_EQ(Serialize(file), content);
      const KltCoder coder(model->get(), &*pack, {file.cuts.begin(), file.cuts.end()});
      EXPECT_EQ(coder.Embeddings(file.tokens), file.embedding);
      KltCoder::Rows rows;
      if (!file.good) {
        ++bad;
        EXPECT_EQ(
            ReadKlt(coder, file.tokens, file.position, file.extents, coder.cuts(), &rows).code(),
            StatusCode::kDataLoss);
        continue;
      }
      ++good;
      for (size_t cuts = 1; cuts <= coder.cuts(); ++cuts) {
        const Status status = ReadKlt(coder, file.tokens, file.position, file.extents, cuts, &rows);
        ASSERT_TRUE(status.ok()) << status.ToString();
        EXPECT_TRUE(SameBits(rows, file.decoded[cuts - 1])) << cuts << " cuts";
      }
      // The packs' weights are 1: no sum's order shows in what an encoder makes of a block.
      KltCoder::Extents extents;
      coder.Encode(KltSide::OfTokens(&coder, file.tokens, nullptr), file.position, file.x,
                   &extents);
      EXPECT_EQ(extents, file.extents);
      EXPECT_EQ(KltLevelDigests(coder, file.tokens, file.position, file.x), file.levels);
    }
  }
  EXPECT_GE(good, 6);
  EXPECT_GE(bad, 6);
}

}  // namespace
}  // namespace kvant::node
