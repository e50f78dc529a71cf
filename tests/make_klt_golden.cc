// Writes the golden files of klt blocks and their codec packs from fixed seeds:
//   make_klt_golden tests/golden/klt
// Run it only when the format changes on purpose; the difference belongs into the same commit as
// the change of docs/klt.md.
#include <cstdio>
#include <fstream>

#include "kernels/linear.h"
#include "tests/klt_golden.h"
#include "tests/support/random_klt_pack.h"

namespace kvant::node {
namespace {

void Write(const std::string& file, const std::string& content) {
  std::ofstream out(file, std::ios::binary);
  out << content;
  out.close();
  if (!out) {
    std::fprintf(stderr, "writing %s failed: does the directory exist?\n", file.c_str());
    std::exit(1);
  }
}

KltGolden Make(const Model& model, const KltPack& pack, const std::vector<size_t>& cuts,
               int position, Random* random) {
  support::KltBlock block = support::RandomKltBlock(model, 3, random);
  // Levels that no symbol has.
  block.rows[0][300] = 1e4F;
  block.rows[0].back() = -3e6F;
  const KltCoder coder(&model, &pack, cuts);
  KltGolden file;
  file.layers = pack.layers;
  file.width = pack.width;
  file.hidden = pack.hidden;
  file.position = position;
  for (int layer = 0; layer < pack.layers; ++layer)
    file.slides.push_back(model.config().Window(layer) != 0 ? 1 : 0);
  for (const size_t cut : cuts) file.cuts.push_back(static_cast<uint8_t>(cut));
  file.tokens = block.tokens;
  file.embedding = coder.Embeddings(block.tokens);
  coder.Encode(file.embedding, position, block.rows, &file.extents);
  file.x = block.rows;
  file.levels = KltLevelDigests(coder, block.tokens, position, block.rows);
  for (size_t count = 1; count <= cuts.size(); ++count) {
    KV_CHECK(
        ReadKlt(coder, block.tokens, position, file.extents, count, &file.decoded.emplace_back())
            .ok());
  }
  return file;
}

void WriteBad(const std::string& prefix, const KltGolden& good) {
  const auto write = [&](const char* what, size_t cut, auto change) {
    KltGolden bad = good;
    bad.good = false;
    change(&bad.extents[cut].back());
    Write(prefix + "-bad-" + what + ".klt", Serialize(bad));
  };
  using Extent = std::vector<std::byte>;
  write("short", 0, [](Extent* extent) { extent->pop_back(); });
  write("long", 1, [](Extent* extent) { extent->push_back({}); });
  write("none", 1, [](Extent* extent) { extent->resize(3); });
  // Where a first cut's symbols begin: behind a byte for each token.
  constexpr size_t kSymbols = kBlockTokens;
  write("sink", 0, [](Extent* extent) { (*extent)[kKltSinks - 1] ^= std::byte{1}; });
  write("tokens", 0, [](Extent* extent) { extent->resize(kBlockTokens - 1); });
  write("symbols", 0, [](Extent* extent) {
    StoreLittle(extent->data() + kSymbols,
                static_cast<uint32_t>(extent->size() - kSymbols - sizeof(uint32_t) + 1));
  });
  write("state", 1, [](Extent* extent) { (*extent)[sizeof(uint32_t)] ^= std::byte{1}; });
  // What escaped reads as a level beyond the largest.
  write("level", 0, [](Extent* extent) {
    const size_t low =
        kSymbols + sizeof(uint32_t) + LoadLittle<uint32_t>(extent->data() + kSymbols);
    std::fill(extent->begin() + static_cast<ptrdiff_t>(low), extent->end(), std::byte{0xFF});
  });
}

void WriteAll(const std::string& directory) {
  Random random(20250301);
  for (const std::string name : kKltGoldenModels) {
    const support::TemporaryDirectory of_model;
    KV_CHECK(support::WriteRandomModel(of_model.path(), KltGoldenModel(name)).ok());
    const auto model = Model::Load(of_model.path());
    KV_CHECK(model.ok());
    KltPack pack = support::RandomKltPack(**model, &random, {.weighted = false});
    pack.calibrated_on = "nothing: a pack of random numbers for tests";
    const std::string prefix = directory + "/" + name;
    KV_CHECK(SaveKltPack(prefix + ".pack", **model, &pack).ok());
    const KltGolden first = Make(**model, pack, pack.refining, 0, &random);
    Write(prefix + "-first.klt", Serialize(first));
    Write(prefix + "-later.klt", Serialize(Make(**model, pack, {2}, kBlockTokens, &random)));
    if (name == "heads") WriteBad(prefix, first);
  }
}

}  // namespace
}  // namespace kvant::node

int main(int argc, char** argv) {
  if (argc != 2) {
    std::fprintf(stderr, "usage: make_klt_golden DIRECTORY (tests/golden/klt)\n");
    return 2;
  }
  if (!kvant::kernels::LoadBlas().ok()) {
    std::fprintf(stderr, "make_klt_golden needs OpenBLAS: run scripts/setup\n");
    return 1;
  }
  kvant::node::WriteAll(argv[1]);
  return 0;
}
