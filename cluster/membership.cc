#include "cluster/membership.h"

#include <charconv>
#include <optional>
#include <utility>

#include "base/check.h"
#include "transport/tcp_socket.h"

namespace kvant {
namespace {

constexpr std::array<std::string_view, kRoleCount> kRoleNames = {"cache", "prefill", "decode"};

std::vector<std::string_view> SplitAtCommas(std::string_view text) {
  std::vector<std::string_view> parts;
  while (true) {
    const size_t comma = text.find(',');
    parts.push_back(text.substr(0, comma));
    if (comma == std::string_view::npos) return parts;
    text.remove_prefix(comma + 1);
  }
}

std::optional<size_t> FindRole(std::string_view name) {
  for (size_t i = 0; i < kRoleCount; ++i) {
    if (kRoleNames[i] == name) return i;
  }
  return std::nullopt;
}

}  // namespace

Result<ShardMap> StaticShardMap(std::string_view comma_separated_addresses) {
  std::vector<Shard> shards;
  for (const std::string_view address : SplitAtCommas(comma_separated_addresses)) {
    if (address.empty()) {
      return InvalidArgument(
          "the list of shards '{}' has an empty entry; expected addresses like "
          "tcp://127.0.0.1:7070, separated by commas",
          comma_separated_addresses);
    }
    const bool verbs = address.starts_with("verbs://");
    if (address.find_first_of(" \t\n") != std::string_view::npos ||
        !tcp::ParseAddress(address, verbs ? "verbs" : "tcp").ok()) {
      return InvalidArgument(
          "'{}' is not a shard's address; expected something like tcp://127.0.0.1:7070 (one on "
          "this host is reached over shared memory by itself) or verbs://HOST:7070",
          address);
    }
    if (!shards.empty() && address[0] != shards[0].address[0]) {
      return InvalidArgument(
          "the list of shards '{}' mixes tcp:// and verbs://; a node has one transport to all",
          comma_separated_addresses);
    }
    shards.push_back({std::string(address)});
  }
  return ShardMap::Make(kStaticEpoch, std::move(shards));
}

std::string_view RoleName(Role role) { return kRoleNames[static_cast<size_t>(role)]; }

Result<RolePlan> RolePlan::Parse(std::string_view text, int ranks) {
  std::array<int, kRoleCount> counts{};
  std::array<bool, kRoleCount> named{};
  for (const std::string_view entry : SplitAtCommas(text)) {
    const size_t equals = entry.find('=');
    const std::optional<size_t> role = FindRole(entry.substr(0, equals));
    if (equals == std::string_view::npos || !role) {
      return InvalidArgument(
          "roles '{}': '{}' is not ROLE=COUNT with a role of cache, prefill, "
          "decode; example: cache=2,prefill=1,decode=1",
          text, entry);
    }
    const std::string_view number = entry.substr(equals + 1);
    int count = 0;
    const auto [end, error] = std::from_chars(number.data(), number.data() + number.size(), count);
    if (error != std::errc() || end != number.data() + number.size() || count < 0 ||
        count > static_cast<int>(kMaxShards)) {
      return InvalidArgument("roles '{}': '{}' is not a count between 0 and {}", text, number,
                             kMaxShards);
    }
    if (named[*role])
      return InvalidArgument("roles '{}': {} is named twice", text, kRoleNames[*role]);
    named[*role] = true;
    counts[*role] = count;
  }
  const RolePlan plan(counts);
  if (plan.count(Role::kDecode) == 0) {
    return InvalidArgument("roles '{}': at least one decode rank is needed", text);
  }
  if (plan.count(Role::kPrefill) > 0 && plan.count(Role::kCache) == 0) {
    return InvalidArgument(
        "roles '{}': what prefill ranks compute reaches the decode ranks through cache ranks; use "
        "cache=1 or more, or prefill=0",
        text);
  }
  if (plan.ranks() != ranks) {
    return InvalidArgument(
        "roles '{}' name {} ranks, but the job has {}: start it with mpirun -np "
        "{}, or change the counts",
        text, plan.ranks(), ranks, plan.ranks());
  }
  return plan;
}

Role RolePlan::RoleOf(int rank) const {
  KV_CHECK(rank >= 0 && rank < ranks());
  for (size_t i = 0; i < kRoleCount; ++i) {
    if (rank < counts_[i]) return static_cast<Role>(i);
    rank -= counts_[i];
  }
  return Role::kDecode;
}

std::vector<int> RolePlan::RanksOf(Role role) const {
  std::vector<int> result;
  for (int rank = 0; rank < ranks(); ++rank) {
    if (RoleOf(rank) == role) result.push_back(rank);
  }
  return result;
}

}  // namespace kvant
