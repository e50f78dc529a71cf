// A whole node in one thread, with the cache that a test gives it: none, or a shard over loopback,
// whose wires may be made to fail.
#pragma once

#include <chrono>
#include <cstdint>
#include <filesystem>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "cache_service/shard_host.h"
#include "node/requests.h"
#include "node/runtime.h"
#include "node/scheduler.h"
#include "transport/faulty.h"
#include "transport/loopback.h"

namespace kvant::support {

// A model of random weights with a context of kTinyContext tokens, written once a process.
inline constexpr int kTinyContext = 512;
const std::filesystem::path& TinyModel();
// A Gemma-like one of four layers, of which all but the third attend kTinyWindow tokens.
inline constexpr int kTinyWindow = 100;
const std::filesystem::path& SlidingModel();
// A Mistral-like one, whose layers all do.
const std::filesystem::path& AllSlidingModel();

// A codec pack of random numbers for one of them (RandomKltPack), written once a process.
const std::filesystem::path& KltPackOf(const std::filesystem::path& model);

struct NodeWorldOptions {
  node::NodeOptions node;              // without a model: TinyModel()
  uint64_t shard_bytes = 0;            // 0: no cache at all, in the node neither
  std::optional<FaultOptions> faults;  // of both ends
  bool store_all_answers = false;
  // The planner believes that computing takes for ever; else a tiny model is computed too fast for
  // anything to be fetched.
  bool always_fetch = false;
  NodeWorldOptions() {
    node.threads = 1;
    node.tier_arena_bytes = uint64_t{8} << 20;
  }
};

// Single-owner.
class NodeWorld {
 public:
  explicit NodeWorld(const NodeWorldOptions& options);

  // Answers everything, in the order of the requests. A scheduler of its own each time; blocks
  // stay.
  std::vector<node::Answer> Answer(const std::vector<node::Request>& requests);

  node::NodeRuntime& node() { return *node_; }
  ShardHost& shard() { return *shard_; }
  const node::SchedulerStats& stats() const { return stats_; }  // of the last Answer
  // Of both ends together.
  FaultCounts fault_counts() const;

 private:
  NodeWorldOptions options_;
  LoopbackHub hub_;
  std::unique_ptr<Transport> shard_side_;
  std::unique_ptr<Transport> node_side_;
  std::vector<const FaultyTransport*> faulty_;
  std::unique_ptr<ShardHost> shard_;
  std::unique_ptr<node::NodeRuntime> node_;
  node::SchedulerStats stats_;
};

// What an answer says, without the times and hits that may differ.
struct AnswerText {
  std::string custom_id;
  std::string text;
  std::vector<int32_t> tokens;
  node::FinishReason finish;
  std::string error;
  friend bool operator==(const AnswerText&, const AnswerText&) = default;
};
void PrintTo(const AnswerText& answer, std::ostream* out);
std::vector<AnswerText> TextsOf(const std::vector<node::Answer>& answers);

}  // namespace kvant::support
