// `kvant bench` and `kvant report`: what this machine and a model reach, as ratios of one run.
#pragma once

#include <cstdint>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "base/status.h"

namespace kvant::node {

struct BenchOptions {
  int threads = 0;  // 0: one a core
  double seconds_per_row = 0.8;
  std::string json;  // file; empty: only the table

  // Of bench transport.
  std::vector<std::string> backends;  // empty: all that can be used
  std::vector<uint64_t> sizes_bytes = {4096, 65536, 1048576};
  double poll_us = 200;  // before our sides sleep

  // Of bench node. Contexts are cut to whole blocks, and to the longest that the model has.
  std::string model;
  std::string weights = "exact";  // WeightFormName
  std::vector<std::string> codecs = {"raw", "tile8", "tile4"};
  std::vector<int> contexts = {512, 1024, 4096};
  std::vector<int> sequences = {1};  // that decode at once
  std::vector<int> prompts;          // tokens of prompts that are computed whole
};

// Writes an array of rows, each of which gets what every row says: CPU, compiler, OpenBLAS's core
// type. path: empty: nowhere.
Status WriteBenchRows(const std::string& path, nlohmann::json rows);

// Every backend beside a plain loop of its medium. argc, argv: for MPI, when started by mpirun.
Result<int> BenchTransport(const BenchOptions& options, int* argc, char*** argv);
// Lookups, gets and puts at one shard, in this process, over shared memory and tcp.
Result<int> BenchService(const BenchOptions& options);
// The kernels by themselves, on one thread and on all: decode attention, dense layers and tiles of
// many shapes beside streaming reads and copies of as many bytes.
Result<int> BenchKernels(const BenchOptions& options);
// Prefill beside sgemm of the same shapes, decode beside streaming reads of as many bytes.
// kInvalidArgument: no such codec, or a prompt that the model is too short for.
Result<int> BenchNode(const BenchOptions& options);

// Prints the page of a report file; baseline_file: the same requests without cache, may be empty.
Result<int> ShowReport(const std::string& file, const std::string& baseline_file);

}  // namespace kvant::node
