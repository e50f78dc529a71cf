// kvant-hit-ratio: prints the hit ratios of the shard's eviction policy, LRU, FIFO and Belady's
// optimum on a trace, over cache sizes.
#include <fmt/format.h>

#include <CLI/CLI.hpp>
#include <cstdint>
#include <cstdio>
#include <fstream>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "cache_service/hit_ratio.h"

namespace kvant {
namespace {

int Main(int argc, char** argv) {
  std::string trace_path;
  std::string json_path;
  std::vector<uint32_t> sizes = {1000, 2000, 5000, 10000, 20000, 50000, 100000};
  EvictionPolicy policy;
  CLI::App app{
      "kvant-hit-ratio: hit ratios of the shard's eviction policy, LRU, FIFO and Belady's optimum "
      "on a\n"
      "trace. A trace is JSON lines (gzipped or not) with a field hash_ids, one id a prefix block, "
      "as\n"
      "published with Mooncake (github.com/kvcache-ai/Mooncake, FAST25-release/traces)."};
  app.add_option("--trace", trace_path, "Trace file, .jsonl or .jsonl.gz")->required();
  app.add_option("--blocks", sizes, "Cache sizes in blocks")->delimiter(',');
  app.add_option("--json", json_path, "Write the table as JSON to this file");
  app.add_option("--probation-share", policy.probation_share, "Policy of kvantd to try")
      ->capture_default_str();
  app.add_option("--ghost-share", policy.ghost_share, "Policy of kvantd to try")
      ->capture_default_str();
  CLI11_PARSE(app, argc, argv);
  const Result<RequestTrace> trace = ReadTrace(trace_path);
  if (!trace.ok()) {
    fmt::print(stderr, "kvant-hit-ratio: {}\n", trace.status().message());
    return 2;
  }
  fmt::print("{} requests, {} blocks, {} distinct; blocks found in the longest stored prefix:\n\n",
             trace->requests.size(), trace->total_blocks, trace->distinct_blocks);
  fmt::print(
      "| blocks kept | kvantd | LRU | FIFO | Belady |\n| ---: | ---: | ---: | ---: | ---: |\n");
  sizes.push_back(trace->distinct_blocks);
  nlohmann::json rows = nlohmann::json::array();
  for (const uint32_t blocks : sizes) {
    if (blocks == 0) continue;
    const auto ratio = [&](uint64_t hits) {
      return static_cast<double>(hits) / static_cast<double>(trace->total_blocks);
    };
    const double ours = ratio(StoreHits(*trace, blocks, policy));
    const double lru = ratio(LruHits(*trace, blocks));
    const double fifo = ratio(FifoHits(*trace, blocks));
    const double optimum = ratio(OptimalHits(*trace, blocks));
    fmt::print("| {} | {:.4f} | {:.4f} | {:.4f} | {:.4f} |\n",
               blocks == trace->distinct_blocks ? fmt::format("all ({})", blocks)
                                                : fmt::format("{}", blocks),
               ours, lru, fifo, optimum);
    std::fflush(stdout);
    rows.push_back(
        {{"blocks", blocks}, {"kvantd", ours}, {"lru", lru}, {"fifo", fifo}, {"belady", optimum}});
  }
  if (json_path.empty()) return 0;
  std::ofstream json(json_path);
  json << rows.dump(2) << "\n";
  if (json.flush()) return 0;
  fmt::print(stderr, "kvant-hit-ratio: {} cannot be written\n", json_path);
  return 2;
}

}  // namespace
}  // namespace kvant

int main(int argc, char** argv) { return kvant::Main(argc, argv); }
