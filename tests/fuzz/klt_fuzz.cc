// klt blocks that nobody vouches for, at all their cuts; codec packs: what one that is loaded
// encodes is read; and exact extents.
#include <algorithm>
#include <cmath>
#include <memory>

#include "base/check.h"
#include "base/random.h"
#include "kernels/blas.h"
#include "kernels/float_formats.h"
#include "node/klt_exact.h"
#include "node/mapped_file.h"
#include "tests/fuzz/fuzz_input.h"
#include "tests/klt_golden.h"
#include "tests/support/random_klt_pack.h"

namespace kvant::fuzz {
namespace {

using namespace kvant::node;

// The first byte of an input: 0..2 a block of this model, 3 a pack of the first one, 4 an exact
// extent.
constexpr uint8_t kKinds = 5;
constexpr uint8_t kPackKind = 3;
constexpr uint8_t kExactKind = 4;

struct World {
  std::unique_ptr<Model> model;
  KltPack pack;
  support::KltBlock block;
  std::vector<std::unique_ptr<KltCoder>> coders;  // of each cut, and of those that refine
};

std::unique_ptr<World> MakeWorld(const char* name) {
  KV_CHECK(kernels::LoadBlas().ok());
  const support::TemporaryDirectory directory;
  KV_CHECK(support::WriteRandomModel(directory.path(), KltGoldenModel(name)).ok());
  Result<std::unique_ptr<Model>> model = Model::Load(directory.path());
  KV_CHECK(model.ok());
  auto world = std::make_unique<World>();
  world->model = *std::move(model);
  Random random(1);
  world->pack = support::RandomKltPack(*world->model, &random);
  world->block = support::RandomKltBlock(*world->model, 1, &random);
  for (size_t cut = 0; cut < world->pack.cuts().size(); ++cut)
    world->coders.push_back(
        std::make_unique<KltCoder>(world->model.get(), &world->pack, std::vector<size_t>{cut}));
  world->coders.push_back(
      std::make_unique<KltCoder>(world->model.get(), &world->pack, world->pack.refining));
  return world;
}

const World& WorldOf(size_t kind) {
  static const std::vector<std::unique_ptr<World>> worlds = [] {
    std::vector<std::unique_ptr<World>> all;
    for (const char* name : kKltGoldenModels) all.push_back(MakeWorld(name));
    return all;
  }();
  return *worlds[kind];
}

void ReadBlock(const World& world, FuzzInput* input) {
  const KltCoder& coder = *world.coders[input->Take<uint8_t>() % world.coders.size()];
  const int position = input->Take<uint8_t>() % 2 * kBlockTokens;
  std::vector<std::vector<Bytes>> extents(coder.groups());  // [group][cut]
  for (std::vector<Bytes>& of_group : extents) {
    for (size_t cut = 0; cut < coder.cuts(); ++cut) {
      const std::span<const std::byte> bytes = input->TakeBytes(input->Take<uint16_t>());
      of_group.emplace_back(bytes.begin(), bytes.end());
    }
  }
  KltReader reader(&coder, KltSide::OfTokens(&coder, world.block.tokens, nullptr), position);
  KltCoder::Rows rows;
  for (size_t group = 0; group < coder.groups(); ++group) {
    const std::vector<std::span<const std::byte>> all(extents[group].begin(), extents[group].end());
    // Fewer cuts of what is read are read, and a group may be read again.
    bool read = true;
    for (size_t cuts = 1; cuts <= all.size() && read; ++cuts) {
      const Status status = reader.Read(group, std::span(all).first(cuts), &rows);
      read = status.ok();
      KV_CHECK(read || status.code() == StatusCode::kDataLoss);
    }
    if (!read) return;
    for (const int layer : coder.transform().groups[group].layers) {
      const std::vector<float>& of_layer = rows[static_cast<size_t>(layer)];
      KV_CHECK(of_layer.size() == static_cast<size_t>(kBlockTokens * world.pack.width));
      KV_CHECK(
          std::all_of(of_layer.begin(), of_layer.end(), [](float x) { return std::isfinite(x); }));
    }
  }
}

void CodeWithPack(const World& world, std::span<const std::byte> file) {
  const Result<KltPack> pack = ParseKltPack(file, "fuzz", *world.model);
  if (!pack.ok()) {
    KV_CHECK(pack.status().code() == StatusCode::kInvalidArgument);
    return;
  }
  std::vector<std::vector<size_t>> chains = {{0}, {pack->cuts().size() - 1}};
  if (pack->refining.size() > 1) chains.push_back(pack->refining);
  for (const std::vector<size_t>& cuts : chains) {
    const KltCoder coder(world.model.get(), &*pack, cuts);
    KltCoder::Extents extents;
    coder.Encode(KltSide::OfTokens(&coder, world.block.tokens, nullptr), 0, world.block.rows,
                 &extents);
    KltCoder::Rows rows;
    KV_CHECK(ReadKlt(coder, world.block.tokens, 0, extents, cuts.size(), &rows).ok());
  }
}

// Segments as they were decoded, of all sizes, and what they should have been.
struct Exact {
  explicit Exact(uint8_t seed) {
    Random random(seed);
    for (const auto kind : {kernels::SegmentKind::kKey, kernels::SegmentKind::kValue}) {
      const kernels::SegmentShape shape = {64, 2, 4};
      std::vector<float>& of = decoded.emplace_back(64 * 2 * 4);
      std::vector<uint16_t>& x = raw.emplace_back();
      for (float& f : of) {
        f = static_cast<float>(std::ldexp(random.Normal(), static_cast<int>(random.Below(8))));
        x.push_back(kernels::ToBf16(f + static_cast<float>(random.Normal())));
      }
      segments.push_back({kind, shape, of.data()});
    }
  }
  Bytes Encoded() const {
    Bytes bytes;
    const std::vector<const uint16_t*> from = {raw[0].data(), raw[1].data()};
    coder().Encode(segments, from, &bytes);
    return bytes;
  }
  Status Read(std::span<const std::byte> extent) {
    const std::vector<uint16_t*> to = {raw[0].data(), raw[1].data()};
    return coder().Decode(extent, segments, to);
  }
  static const KltExact& coder() {
    static const KltExact coder;
    return coder;
  }

  std::vector<std::vector<float>> decoded;
  std::vector<std::vector<uint16_t>> raw;
  std::vector<ExactSegment> segments;
};

void ReadExact(FuzzInput* input) {
  Exact exact(input->Take<uint8_t>());
  const std::span<const std::byte> rest = input->Rest();
  const Bytes own(rest.begin(), rest.end());
  const Status status = exact.Read(own);
  if (!status.ok()) {
    KV_CHECK(status.code() == StatusCode::kDataLoss);
    return;
  }
  // Whatever it says can be said again.
  const std::vector<std::vector<uint16_t>> read = exact.raw;
  KV_CHECK(exact.Read(exact.Encoded()).ok() && exact.raw == read);
}

}  // namespace

std::vector<Bytes> SeedInputs() {
  std::vector<Bytes> seeds;
  for (uint8_t kind = 0; kind < kPackKind; ++kind) {
    const World& world = WorldOf(kind);
    for (const size_t choice : {size_t{2}, world.coders.size() - 1}) {
      const KltCoder& coder = *world.coders[choice];
      KltCoder::Extents extents;
      coder.Encode(KltSide::OfTokens(&coder, world.block.tokens, nullptr), 0, world.block.rows,
                   &extents);
      Bytes seed = {std::byte{kind}, static_cast<std::byte>(choice), std::byte{0}};
      for (size_t group = 0; group < coder.groups(); ++group) {
        for (const auto& of_cut : extents) {
          std::byte length[2];
          StoreLittle(length, static_cast<uint16_t>(of_cut[group].size()));
          seed.insert(seed.end(), std::begin(length), std::end(length));
          seed.insert(seed.end(), of_cut[group].begin(), of_cut[group].end());
        }
      }
      seeds.push_back(std::move(seed));
    }
  }
  const support::TemporaryDirectory directory;
  const std::filesystem::path file = directory.path() / "pack";
  KltPack pack = WorldOf(0).pack;
  KV_CHECK(SaveKltPack(file, *WorldOf(0).model, &pack).ok());
  const auto mapped = MappedFile::Open(file);
  KV_CHECK(mapped.ok());
  Bytes& seed = seeds.emplace_back(1, std::byte{kPackKind});
  seed.insert(seed.end(), (*mapped)->bytes().begin(), (*mapped)->bytes().end());
  for (const uint8_t number : {uint8_t{1}, uint8_t{2}}) {
    Bytes extent = {std::byte{kExactKind}, std::byte{number}};
    const Bytes encoded = Exact(number).Encoded();
    extent.insert(extent.end(), encoded.begin(), encoded.end());
    seeds.push_back(std::move(extent));
  }
  return seeds;
}

}  // namespace kvant::fuzz

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  using namespace kvant::fuzz;
  FuzzInput input(data, size);
  const uint8_t kind = input.Take<uint8_t>() % kKinds;
  if (kind == kPackKind) {
    CodeWithPack(WorldOf(0), input.Rest());
  } else if (kind == kExactKind) {
    ReadExact(&input);
  } else {
    ReadBlock(WorldOf(kind), &input);
  }
  return 0;
}
