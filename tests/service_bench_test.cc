// The service bench runs, and its rows hold together. Rates are judged by people, not here.
#include "cache_service/service_bench.h"

#include <gtest/gtest.h>

namespace kvant {
namespace {

TEST(ServiceBench, FillsEveryRow) {
  ServiceBenchOptions options;
  options.stored = {300, 3000};
  options.time_per_row = std::chrono::milliseconds(30);
  const auto rows = RunServiceBench(options);
  ASSERT_TRUE(rows.ok()) << rows.status().ToString();
  ASSERT_EQ(rows->size(), 3U * (2 + 2 * 2 * 2)) << "transports, lookups, ops, sizes, outstanding";
  for (const ServiceBenchRow& row : *rows) {
    EXPECT_TRUE(row.op == "lookup" || row.op == "get" || row.op == "put");
    EXPECT_EQ(row.op == "lookup", row.stored > 0);
    EXPECT_EQ(row.op == "lookup", row.size_bytes == 0);
    EXPECT_GT(row.per_s, 10);
    EXPECT_GT(row.us_p50, 0);
    EXPECT_GE(row.us_p99, row.us_p50);
    std::printf("%-8s %-6s %6zu stored %8lu bytes x%-2zu: %8.0f /s, p50 %8.1f us\n",
                std::string(row.transport).c_str(), std::string(row.op).c_str(), row.stored,
                row.size_bytes, row.outstanding, row.per_s, row.us_p50);
  }
}

TEST(ServiceBench, SaysWhatItCannot) {
  for (const std::vector<size_t>& stored :
       {std::vector<size_t>{}, std::vector<size_t>{100}, std::vector<size_t>{3000, 300}}) {
    ServiceBenchOptions options;
    options.stored = stored;
    EXPECT_EQ(RunServiceBench(options).status().code(), StatusCode::kInvalidArgument);
  }
  ServiceBenchOptions options;
  options.sizes_bytes = {0};
  EXPECT_EQ(RunServiceBench(options).status().code(), StatusCode::kInvalidArgument);
}

}  // namespace
}  // namespace kvant
