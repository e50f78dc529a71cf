// Both ends of disaggregated prefill: a decode node that asks for blocks, and the prefill node that
// computes them and puts them into the tier.
#pragma once

#include <cstdint>
#include <deque>
#include <map>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "base/clock.h"
#include "node/block_supply.h"
#include "node/node_link.h"

namespace kvant::node {

// The asking end: sends each job to one of the prefill ranks. Jobs that begin alike go to the same
// rank, which then has their beginning in memory, unless it is much busier than the idlest.
// Single-owner; borrows link and clock.
class PrefillRouter final : public PrefillPeer {
 public:
  // patience: how long a job may stand still before its blocks are given up.
  PrefillRouter(NodeLink* link, const Clock* clock, std::vector<int> ranks, Duration patience);
  ~PrefillRouter() override;

  void Ask(std::span<const int32_t> tokens, std::span<const BlockKey> keys,
           const std::string& tenant, std::span<const size_t> missing, BlockDone done) override;

  // A reply, or nullptr when `rank` is gone.
  void OnMessage(int rank, const wire::Message* message);
  // Gives up jobs that stood still for too long.
  void Tick();

 private:
  struct Job;
  int ChooseRank(const BlockKey& first) const;
  void FailJob(uint64_t id, const Status& status);

  NodeLink* link_;
  const Clock* clock_;
  std::vector<int> ranks_;
  Duration patience_;
  uint64_t next_job_ = 1;
  std::map<uint64_t, std::unique_ptr<Job>> jobs_;
};

// The computing end. Jobs are served in the order they came, those that somebody waits for first.
// Single-owner; borrows all.
class PrefillServer {
 public:
  PrefillServer(NodeLink* link, BlockSupply* supply, const Domains* domains,
                const ModelConfig* config);

  // kInvalidArgument: tokens or blocks that cannot be; the sender is told.
  void OnMessage(int rank, const wire::Message& message);
  // Computes at most one block. True if anything was done.
  bool Step();
  bool idle() const { return jobs_.empty(); }

 private:
  struct Job {
    SupplyJobPtr supply;
    bool awaited = false;
  };
  void Reply(int rank, uint64_t job, size_t block, const Status& status);

  NodeLink* link_;
  BlockSupply* supply_;
  const Domains* domains_;
  const ModelConfig* config_;
  std::deque<Job> jobs_;
};

}  // namespace kvant::node
