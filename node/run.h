// `kvant run`: a file of requests answered by one process, or by the ranks of an MPI job that share
// one cache.
#pragma once

#include <cstdint>
#include <string>

#include "base/status.h"
#include "node/runtime.h"

namespace kvant::node {

struct RunOptions {
  NodeOptions node;
  std::string requests;
  std::string answers;  // file; empty: not written
  std::string report;   // file; empty: not written
  std::string cache;    // addresses of kvantd, comma separated; empty: ranks, or this process
  std::string roles;    // "cache=2,prefill=1,decode=1"; empty: chosen by the number of ranks
  std::string transport = "auto";                     // between ranks: mpi, tcp, shm, verbs, auto
  uint64_t cache_memory_bytes = uint64_t{512} << 20;  // of each shard that this run hosts
  bool no_cache = false;                              // compute every prompt whole
  std::string reference;                              // answers to compare with, files; empty: none
  std::string raw_reference;
  std::string teacher;  // answers whose tokens are fed instead of the own ones
};

// Answers the file. Returns the exit status: 0, or 1 if requests failed. Errors: as every part
// says; under MPI the first rank has printed them, and their exit status is returned.
// argc, argv: for MPI.
Result<int> RunRequests(const RunOptions& options, int* argc, char*** argv);

}  // namespace kvant::node
