// `kvant generate`: one prompt, answered with the help of a cache.
#pragma once

#include <cstdint>
#include <string>

#include "base/status.h"
#include "node/requests.h"
#include "node/runtime.h"

namespace kvant::node {

struct GenerateOptions {
  NodeOptions node;
  Request request;
  std::string cache;  // addresses of kvantd, comma separated; empty: this process
  uint64_t cache_memory_bytes = uint64_t{512} << 20;  // of the shard in this process
  bool no_cache = false;
  bool json = false;  // print one JSON object instead of the text
};

// Returns the exit status. Errors: as every part says.
Result<int> Generate(const GenerateOptions& options);

}  // namespace kvant::node
