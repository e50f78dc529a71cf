// What a run moved, found, computed and answered: gathered from every rank, as JSON and as a page
// that a person reads.
#pragma once

#include <map>
#include <nlohmann/json_fwd.hpp>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "cache_service/shard_server.h"
#include "cluster/membership.h"
#include "node/requests.h"
#include "node/runtime.h"
#include "node/scheduler.h"
#include "transport/transport.h"

namespace kvant::node {

// What one rank contributes, as a JSON object (the keys are in docs/operations.md).
// tier: bytes between nodes and shards; nodes: bytes between nodes.
nlohmann::json NodeRankReport(int rank, Role role, const std::string& host, NodeRuntime& node,
                              const SchedulerStats& scheduler, const LinkCounters& tier,
                              const LinkCounters& nodes);
nlohmann::json CacheRankReport(int rank, const std::string& host, const ServerStats& stats,
                               const LinkCounters& tier, const LinkCounters& nodes);

// What does not depend on the rank.
struct RunSetup {
  std::string model;              // name shown
  std::string weights = "exact";  // WeightFormName
  std::string codec;
  std::string store;  // StoredForm::name
  std::string cuts;   // that its blocks hold (CutsOf); empty where it has none
  std::string wire;
  std::optional<double> max_kl;
  std::string transport;
  std::string roles;
  uint64_t bf16_bytes_per_token = 0;
  double wall_s = 0;
};

// Answers of the run and, where given, those they are compared with (matched by custom_id).
struct Comparison {
  std::span<const Answer> answers;
  std::optional<std::vector<Answer>> reference;      // same codec, one process, no cache
  std::optional<std::vector<Answer>> raw_reference;  // the same with raw KV
};

// The whole report. ranks: what NodeRankReport and CacheRankReport gave.
nlohmann::json MergeReport(const RunSetup& setup, std::span<const nlohmann::json> ranks,
                           const Comparison& comparison);

// The page. without_cache: the report of the same requests computed without cache, or nullptr.
// kInvalidArgument: not a report written by kvant (names the field).
Result<std::string> FormatReport(const nlohmann::json& report, const nlohmann::json* without_cache);

// "1.5 MiB"
std::string FormatBytes(double bytes);

}  // namespace kvant::node
