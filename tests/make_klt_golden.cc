// Writes the golden files of klt blocks, their codec packs and exact extents from fixed seeds:
//   make_klt_golden tests/golden/klt
// Run it only when the format changes on purpose; the difference belongs into the same commit as
// the change of docs/klt.md.
#include <cmath>
#include <cstdio>
#include <fstream>

#include "kernels/blas.h"
#include "kernels/float_formats.h"
#include "tests/klt_exact_golden.h"
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
  coder.Encode(KltSide::OfTokens(&coder, block.tokens, nullptr), position, block.rows,
               &file.extents);
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

// Numbers of all sizes, their errors from none to larger than they are.
ExactGolden MakeExact(kernels::SegmentKind values, bool by_channel, Random* random) {
  ExactGolden file;
  file.Add(kernels::SegmentKind::kKey, {64, 2, 8});
  file.Add(values, {64, values == kernels::SegmentKind::kLatent ? 1 : 2, 8});
  for (size_t s = 0; s < file.segments.size(); ++s) {
    const size_t channels = file.decoded[s].size() / 64;
    for (size_t i = 0; i < file.decoded[s].size(); ++i) {
      const int octave = by_channel ? -static_cast<int>(i % channels) : 0;
      const double size = std::ldexp(random->Normal(), octave + static_cast<int>(i % 5));
      const double error = std::ldexp(random->Normal(), octave - 4 * static_cast<int>(s));
      file.decoded[s][i] = static_cast<float>(size);
      uint16_t x = kernels::ToBf16(static_cast<float>(size + error));
      // Of one channel nothing is missing, and some numbers are nowhere near.
      if (by_channel && i % channels == 3) x = kernels::ToBf16(file.decoded[s][i]);
      if (i % 97 == 0) x = static_cast<uint16_t>(random->Below(65536));
      file.raw[s][file.At(s, i / channels, i % channels)] = x;
    }
  }
  KltExact().Encode(file.Segments(), file.Raw(), &file.extent);
  return file;
}

void WriteBadExact(const std::string& prefix, const ExactGolden& good) {
  const auto write = [&](const char* what, auto change) {
    ExactGolden bad = good;
    bad.good = false;
    change(&bad.extent);
    Write(prefix + "-bad-" + what + ".exact", Serialize(bad));
  };
  using Extent = std::vector<std::byte>;
  write("short", [](Extent* extent) { extent->pop_back(); });
  write("long", [](Extent* extent) { extent->push_back({}); });
  write("none", [](Extent* extent) { extent->resize(9); });
  write("scale", [](Extent* extent) { (*extent)[9] |= std::byte{2}; });
}

void WriteBlocks(const std::string& directory, const std::string& name, Random* random) {
  const support::TemporaryDirectory of_model;
  KV_CHECK(support::WriteRandomModel(of_model.path(), KltGoldenModel(name)).ok());
  const auto model = Model::Load(of_model.path());
  KV_CHECK(model.ok());
  support::RandomKltPackOptions options;
  options.weighted = false;
  if (name == "narrow") options.group_width = StateWidth((*model)->config());
  KltPack pack = support::RandomKltPack(**model, random, options);
  pack.calibrated_on = "nothing: a pack of random numbers for tests";
  const std::string prefix = directory + "/" + name;
  KV_CHECK(SaveKltPack(prefix + ".pack", **model, &pack).ok());
  const KltGolden first = Make(**model, pack, pack.refining, 0, random);
  Write(prefix + "-first.klt", Serialize(first));
  Write(prefix + "-later.klt", Serialize(Make(**model, pack, {2}, kBlockTokens, random)));
  if (name == "heads") WriteBad(prefix, first);
}

void WriteAll(const std::string& directory) {
  Random random(20250301);
  for (const std::string name : {"heads", "sliding", "latent"})
    WriteBlocks(directory, name, &random);
  using kernels::SegmentKind;
  const ExactGolden values = MakeExact(SegmentKind::kValue, false, &random);
  Write(directory + "/values.exact", Serialize(values));
  WriteBadExact(directory + "/values", values);
  Write(directory + "/latents.exact", Serialize(MakeExact(SegmentKind::kLatent, false, &random)));
  Write(directory + "/channels.exact", Serialize(MakeExact(SegmentKind::kValue, true, &random)));
  WriteBlocks(directory, "narrow", &random);
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
