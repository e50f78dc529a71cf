// A lossy stored form without a codec pack, and a node that has it.
#pragma once

#include <cstdint>
#include <filesystem>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "kernels/thread_pool.h"
#include "node/block_supply.h"
#include "node/decoder.h"
#include "node/local_cache.h"
#include "node/model.h"
#include "node/planner.h"
#include "node/stored_form.h"
#include "node/tier_link.h"
#include "tests/support/watched_shard.h"

namespace kvant::support {

// The bytes of the exact fp32 state, the highest in cut 0; global layers are the first group,
// sliding ones the second. Rows are masked with what only a reader who was told the right tokens,
// position and first group knows, and their lengths vary from block to block.
class PlanesForm final : public node::StoredForm {
 public:
  static constexpr int kCuts = 3;
  // Called before a group of a block is decoded, on the thread that does. An error is that of
  // decoding.
  using OnDecode = std::function<Status(const BlockKey& key, size_t group)>;

  explicit PlanesForm(const node::AttendedPayload& attended, OnDecode on_decode = {});
  void Encode(const node::BlockToStore& block, std::span<std::byte> payload,
              node::StoredBlock* out) const override;
  std::unique_ptr<node::StoredReader> MakeReader(const node::BlockToRead& block) const override;

 private:
  class Reader;
  static std::vector<std::vector<int>> GroupsOf(const node::AttendedPayload& attended);
  static Facts FactsOf(const node::AttendedPayload& attended);

  node::AttendedPayload attended_;
  std::vector<std::vector<int>> groups_;  // layers of the model
  OnDecode on_decode_;
};

// How a FormNode fetches.
struct FormNodeFetching {
  int threads = 3;  // that decode
  Duration timeout = std::chrono::seconds(5);
  PlanesForm::OnDecode on_decode{};
};

// What NodeRuntime is, around that form. Single-owner.
class FormNode {
 public:
  // shard: nullptr, or outlives it.
  FormNode(const std::filesystem::path& model, const std::string& codec, WatchedShard* shard,
           uint64_t local_cache_bytes, const node::PlannerOptions& planning = {},
           const FormNodeFetching& fetching = {});
  node::SupplyJobPtr Supply(node::Wire wire, size_t blocks = kWatchedBlocks);

  const node::Model& model() const { return *model_; }
  const node::BlockClass& block_class() const { return *block_class_; }
  node::LocalCache& cache() { return *cache_; }
  node::TierLink* tier() { return tier_.get(); }
  node::Planner& planner() { return *planner_; }
  node::BlockSupply& supply() { return *supply_; }

 private:
  std::unique_ptr<Transport> transport_;
  std::unique_ptr<kernels::ThreadPool> pool_;
  std::unique_ptr<node::Model> model_;
  std::unique_ptr<node::BlockClass> block_class_;
  std::unique_ptr<node::LocalCache> cache_;
  std::unique_ptr<node::Planner> planner_;
  std::unique_ptr<node::Decoder> decoder_;
  std::unique_ptr<node::TierLink> tier_;
  std::unique_ptr<node::BlockSupply> supply_;
};

}  // namespace kvant::support
