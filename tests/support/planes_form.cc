#include "tests/support/planes_form.h"

#include <bit>
#include <utility>

#include "kernels/implementation.h"

namespace kvant::support {
namespace {

using node::AttendedPayload;
using node::BlockToRead;
using node::BlockToStore;
using node::Scope;

size_t Elements(const kernels::SegmentShape& shape) {
  return static_cast<size_t>(shape.tokens) * static_cast<size_t>(shape.kv_heads) *
         static_cast<size_t>(shape.head_dim);
}

size_t Width(const AttendedPayload& attended) {
  const kernels::LayerShape& shape = attended.layout(Scope::kAll).shape();
  return Elements(shape.keys) + Elements(shape.values);
}

// Bytes in front of a row that mean nothing.
size_t Lead(std::span<const int32_t> tokens, int position) {
  return 1 + static_cast<size_t>(tokens.front() % 3 + position / node::kBlockTokens);
}

std::byte Mask(std::span<const int32_t> tokens, int position, size_t i, std::byte first_group) {
  const auto token = static_cast<size_t>(tokens[i % tokens.size()]);
  return static_cast<std::byte>(token * 7 + static_cast<size_t>(position) + i) ^ first_group;
}

}  // namespace

std::vector<std::vector<int>> PlanesForm::GroupsOf(const AttendedPayload& attended) {
  std::vector<std::vector<int>> groups;
  for (const bool global : {true, false}) {
    std::vector<int> group;
    for (int layer = 0; layer < attended.layout(Scope::kAll).layers(); ++layer) {
      if (attended.global_layers()[static_cast<size_t>(layer)] == global) group.push_back(layer);
    }
    if (!group.empty()) groups.push_back(std::move(group));
  }
  return groups;
}

node::StoredForm::Facts PlanesForm::FactsOf(const AttendedPayload& attended) {
  Facts facts;
  facts.name = "planes";
  facts.tag = 1000;
  facts.basis = Digest{std::byte{42}};
  facts.whole_at_any_cut = true;
  facts.lossy = true;
  facts.numerics = "/planes";
  node::StoredWay& way = facts.ways.emplace_back();
  way.cut_names = {"one", "two", "three"};
  way.cut_errors = {0.1F, 0.01F, 0.001F};
  const std::vector<std::vector<int>> groups = GroupsOf(attended);
  way.layer_end = static_cast<uint16_t>(groups.size());
  for (uint8_t cut = 0; cut < kCuts; ++cut) {
    for (uint16_t group = 0; group < groups.size(); ++group) {
      const uint64_t bytes = groups[group].size() * Width(attended);
      facts.rows.push_back({static_cast<uint8_t>(Part::kState), cut, group, 0, bytes, bytes + 100});
    }
  }
  for (const std::vector<int>& group : groups) {
    facts.global_layers.push_back(attended.global_layers()[static_cast<size_t>(group.front())]);
  }
  return facts;
}

PlanesForm::PlanesForm(const AttendedPayload& attended, OnDecode on_decode)
    : StoredForm(FactsOf(attended)),
      attended_(attended),
      groups_(GroupsOf(attended)),
      on_decode_(std::move(on_decode)) {}

void PlanesForm::Encode(const BlockToStore& block, std::span<std::byte> payload,
                        node::StoredBlock* out) const {
  out->manifest = {};
  out->manifest.key = block.key;
  out->manifest.codec = tag();
  out->manifest.basis = basis();
  out->manifest.token_count = node::kBlockTokens;
  out->bytes.clear();
  std::byte first_group{0};
  for (int cut = 0; cut < kCuts; ++cut) {
    for (size_t group = 0; group < groups_.size(); ++group) {
      std::vector<std::byte> row(Lead(block.tokens, block.position));
      for (const int layer : groups_[group]) {
        for (const auto* state :
             {&block.keys[static_cast<size_t>(layer)], &block.values[static_cast<size_t>(layer)]}) {
          for (const float x : *state) {
            const auto byte = static_cast<std::byte>(std::bit_cast<uint32_t>(x) >> (24 - 8 * cut));
            row.push_back(byte ^ Mask(block.tokens, block.position, row.size(),
                                      group == 0 ? std::byte{0} : first_group));
          }
        }
      }
      if (cut == 0 && group == 0) first_group = row.back();
      out->manifest.Append(static_cast<uint8_t>(Part::kState), static_cast<uint8_t>(cut),
                           static_cast<uint16_t>(group), 0, row, 0);
      out->bytes.insert(out->bytes.end(), row.begin(), row.end());
    }
  }
  for (size_t layer = 0; layer < block.keys.size(); ++layer) {
    const auto decoded = [](std::vector<float> state) {
      for (float& x : state) x = std::bit_cast<float>(std::bit_cast<uint32_t>(x) & ~0xffU);
      return state;
    };
    attended_.EncodeLayer(static_cast<int>(layer), Scope::kAll, decoded(block.keys[layer]).data(),
                          decoded(block.values[layer]).data(), payload.data(), nullptr);
  }
}

class PlanesForm::Reader final : public node::StoredReader {
 public:
  Reader(const PlanesForm& form, const BlockToRead& block)
      : form_(form), block_(block), arrived_(form.groups_.size(), false) {}

  Status Arrived(uint16_t layer, std::vector<int>* ready) override {
    KV_CHECK(!arrived_[layer]);
    arrived_[layer] = true;
    // The second group is read with the first, where there are two.
    if (layer == 1 && !arrived_[0]) return OkStatus();
    KV_RETURN_IF_ERROR(Decode(layer, ready));
    const bool second_waits = layer == 0 && arrived_.size() > 1 && arrived_[1];
    return second_waits ? Decode(1, ready) : OkStatus();
  }

 private:
  Status Decode(size_t group, std::vector<int>* ready) {
    if (form_.on_decode_) {
      KV_RETURN_IF_ERROR(form_.on_decode_(block_.manifest->key, group));
    }
    const size_t lead = Lead(block_.tokens, block_.position);
    const kernels::LayerShape& shape = form_.attended_.layout(Scope::kAll).shape();
    const size_t width = Width(form_.attended_);
    std::vector<uint32_t> state(form_.groups_[group].size() * width);
    const std::byte first_group =
        group == 0 ? std::byte{0} : std::as_const(*block_.stored).Row(0).back();
    for (int cut = 0; cut < block_.portion.cuts.values; ++cut) {
      const size_t index = static_cast<size_t>(cut) * form_.groups_.size() + group;
      const std::span<const std::byte> row = block_.stored->Row(index);
      if (row.size() != lead + state.size()) return DataLoss("a plane of {} bytes", row.size());
      for (size_t i = 0; i < state.size(); ++i) {
        const std::byte byte =
            row[lead + i] ^ Mask(block_.tokens, block_.position, lead + i, first_group);
        state[i] |= std::to_integer<uint32_t>(byte) << (24 - 8 * cut);
      }
    }
    std::vector<float> floats;
    for (const uint32_t bits : state) floats.push_back(std::bit_cast<float>(bits));
    for (size_t i = 0; i < form_.groups_[group].size(); ++i) {
      const float* keys = floats.data() + i * width;
      form_.attended_.EncodeLayer(form_.groups_[group][i], block_.portion.scope, keys,
                                  keys + Elements(shape.keys), block_.payload.data(), nullptr);
      ready->push_back(form_.groups_[group][i]);
    }
    return OkStatus();
  }

  const PlanesForm& form_;
  BlockToRead block_;
  std::vector<bool> arrived_;  // [groups]
};

std::unique_ptr<node::StoredReader> PlanesForm::MakeReader(const BlockToRead& block) const {
  return std::make_unique<Reader>(*this, block);
}

FormNode::FormNode(const std::filesystem::path& model, const std::string& codec,
                   WatchedShard* shard, uint64_t local_cache_bytes,
                   const node::PlannerOptions& planning, const FormNodeFetching& fetching)
    : pool_(std::make_unique<kernels::ThreadPool>(fetching.threads)) {
  KV_CHECK(kernels::ChooseImplementation().ok());
  model_ = *node::Model::Load(model);
  const kernels::Codec* found = *kernels::FindCodec(codec);
  block_class_ = std::make_unique<node::BlockClass>(
      model_.get(), found, std::span<const std::byte>(),
      std::make_shared<PlanesForm>(AttendedPayload(*found, model_->config()), fetching.on_decode));
  cache_ = std::make_unique<node::LocalCache>(block_class_.get(), local_cache_bytes);
  planner_ = std::make_unique<node::Planner>(planning);
  // Else a tiny model is computed too fast for anything to be fetched.
  for (int i = 0; i < 100; ++i) planner_->SawPrefill(1, std::chrono::hours(1));
  decoder_ = std::make_unique<node::Decoder>(model_.get(), pool_.get());
  if (shard != nullptr) {
    transport_ = shard->MakeTransport();
    node::TierLinkOptions link;
    link.timeout = fetching.timeout;
    link.pool = pool_.get();
    tier_ = *node::TierLink::Create(transport_.get(), shard->map(), block_class_.get(),
                                    &SteadyClock(), planner_.get(), link);
    tier_->SetBeside([shard] { shard->Turn(); });
    const TimePoint deadline = SteadyClock().Now() + std::chrono::seconds(2);
    while (!tier_->Reachable(0) && SteadyClock().Now() < deadline) tier_->Poll();
  }
  supply_ =
      std::make_unique<node::BlockSupply>(block_class_.get(), cache_.get(), tier_.get(), nullptr,
                                          planner_.get(), decoder_.get(), &SteadyClock());
}

node::SupplyJobPtr FormNode::Supply(node::Wire wire, size_t blocks) {
  const node::SupplyJobPtr job = supply_->Start(WatchedNeed(wire, blocks));
  Complete(supply_.get(), tier_.get(), job);
  const TimePoint deadline = SteadyClock().Now() + std::chrono::seconds(5);
  while (tier_ != nullptr && !tier_->idle() && SteadyClock().Now() < deadline) tier_->Poll();
  return job;
}

}  // namespace kvant::support
