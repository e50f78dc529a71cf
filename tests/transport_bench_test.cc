// The transport bench runs, and its rows hold together. Rates are judged by people, not here.
#include "transport/transport_bench.h"

#include <gtest/gtest.h>

namespace kvant {
namespace {

TEST(TransportBench, FillsEveryRow) {
  TransportBenchOptions options;
  options.time_per_row = std::chrono::milliseconds(40);
  const auto rows = RunTransportBench(options);
  ASSERT_TRUE(rows.ok()) << rows.status().ToString();
  EXPECT_EQ(rows->size(), 3U * 2 * 3 * 2) << "backends, ops, sizes, outstanding";
  for (const TransportBenchRow& row : *rows) {
    EXPECT_TRUE(row.op == "get" || row.op == "put");
    EXPECT_GT(row.gb_per_s, 0);
    EXPECT_GT(row.plain_gb_per_s, 0);
    EXPECT_GT(row.latency_us_p50, 0);
    EXPECT_GE(row.latency_us_p99, row.latency_us_p50);
    EXPECT_GT(row.plain_latency_us_p50, 0);
    EXPECT_GE(row.cpu_s_per_gib, 0);
    std::printf(
        "%-8s %s %8lu x%-2u p50 %8.1f p99 %8.1f us %6.2f GB/s %6.2f cpu s/GiB, plain %6.2f "
        "GB/s %8.1f us, %3.0f %%\n",
        row.backend.c_str(), row.op.c_str(), row.size_bytes, row.outstanding, row.latency_us_p50,
        row.latency_us_p99, row.gb_per_s, row.cpu_s_per_gib, row.plain_gb_per_s,
        row.plain_latency_us_p50, 100 * row.gb_per_s / row.plain_gb_per_s);
  }
}

TEST(TransportBench, SaysWhatItCannot) {
  TransportBenchOptions options;
  options.backends = {"pigeon"};
  EXPECT_EQ(RunTransportBench(options).status().code(), StatusCode::kInvalidArgument);
  options.backends = {"mpi"};
  EXPECT_EQ(RunTransportBench(options).status().code(), StatusCode::kUnsupported);
  options.backends.clear();
  options.sizes_bytes.clear();
  EXPECT_EQ(RunTransportBench(options).status().code(), StatusCode::kInvalidArgument);
}

}  // namespace
}  // namespace kvant
