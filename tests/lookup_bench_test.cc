// The lookup bench runs, and its rows hold together. Rates are judged by people, not here.
#include "cache_service/lookup_bench.h"

#include <gtest/gtest.h>

namespace kvant {
namespace {

TEST(LookupBench, FillsEveryRow) {
  LookupBenchOptions options;
  options.stored = {300, 3000};
  options.time_per_row = std::chrono::milliseconds(50);
  const auto rows = RunLookupBench(options);
  ASSERT_TRUE(rows.ok()) << rows.status().ToString();
  ASSERT_EQ(rows->size(), 4U) << "transports, stored";
  for (const LookupBenchRow& row : *rows) {
    EXPECT_GT(row.keys_per_s, 1e4);
    EXPECT_GT(row.lookup_us_p50, 0);
    std::printf("%-8s %6zu stored: %6.2f million keys/s, p50 %6.1f us\n",
                std::string(row.transport).c_str(), row.stored, row.keys_per_s / 1e6,
                row.lookup_us_p50);
  }
}

TEST(LookupBench, SaysWhatItCannot) {
  for (const std::vector<size_t>& stored :
       {std::vector<size_t>{}, std::vector<size_t>{100}, std::vector<size_t>{3000, 300}}) {
    EXPECT_EQ(RunLookupBench({.stored = stored}).status().code(), StatusCode::kInvalidArgument);
  }
}

}  // namespace
}  // namespace kvant
