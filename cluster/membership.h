// Static membership: who takes part, from flags or from MPI ranks. It never changes while the
// program runs, so its epoch is kStaticEpoch.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "base/status.h"
#include "cluster/shard_map.h"

namespace kvant {

// "tcp://127.0.0.1:7070,tcp://127.0.0.1:7071" to a map of shards of equal weight, epoch
// kStaticEpoch. kInvalidArgument names the entry that is wrong.
Result<ShardMap> StaticShardMap(std::string_view comma_separated_addresses);

enum class Role : uint8_t { kCache = 0, kPrefill = 1, kDecode = 2 };
inline constexpr size_t kRoleCount = 3;
std::string_view RoleName(Role role);

// Which rank does what: cache ranks first, then prefill, then decode. Immutable value.
class RolePlan {
 public:
  // Reads "cache=2,prefill=1,decode=1" for a job of `ranks` processes. Without prefill ranks the
  // decode ranks compute prompts themselves. kInvalidArgument: an unknown role, one named twice, a
  // count that is not a number, a sum that is not `ranks`, no decode rank, or prefill without
  // cache.
  static Result<RolePlan> Parse(std::string_view text, int ranks);

  int ranks() const { return counts_[0] + counts_[1] + counts_[2]; }
  int count(Role role) const { return counts_[static_cast<size_t>(role)]; }
  // REQUIRES: 0 <= rank < ranks().
  Role RoleOf(int rank) const;
  // Ranks of this role in increasing order.
  std::vector<int> RanksOf(Role role) const;

 private:
  explicit RolePlan(std::array<int, kRoleCount> counts) : counts_(counts) {}
  std::array<int, kRoleCount> counts_;
};

}  // namespace kvant
