#include "cache_service/shard_host.h"

#include <algorithm>
#include <charconv>
#include <cstring>
#include <new>
#include <utility>

#include "base/random.h"

namespace kvant {

Result<uint64_t> ParseBytes(std::string_view text) {
  static constexpr std::pair<std::string_view, int> kUnits[] = {
      {"", 0}, {"B", 0}, {"KiB", 10}, {"MiB", 20}, {"GiB", 30}, {"TiB", 40}};
  uint64_t number = 0;
  const char* const text_end = text.data() + text.size();
  const auto [end, error] = std::from_chars(text.data(), text_end, number);
  const std::string_view unit(end, static_cast<size_t>(text_end - end));
  for (const auto& [name, shift] : kUnits) {
    if (error == std::errc() && unit == name && number <= (UINT64_MAX >> 1 >> shift)) {
      return number << shift;
    }
  }
  return InvalidArgument(
      "'{}' is not a size; expected a number and an optional unit of B, KiB, MiB, GiB or TiB, as "
      "in 512MiB",
      text);
}

Result<std::unique_ptr<ShardHost>> ShardHost::Create(Transport* transport,
                                                     const ShardHostOptions& options) {
  KV_ASSIGN_OR_RETURN(const StorePlan plan,
                      PlanStore(options.memory_bytes, options.expected_block_bytes));
  std::unique_ptr<ShardHost> host(new ShardHost);
  host->memory_.reset(new (std::nothrow) std::byte[plan.arena_bytes]);
  if (host->memory_ == nullptr) {
    return MakeStatus(StatusCode::kResourceExhausted,
                      "this machine does not give {} bytes; ask for less", plan.arena_bytes);
  }
  const std::span<std::byte> arena(host->memory_.get(), plan.arena_bytes);
  if (options.populate) std::memset(arena.data(), 0, arena.size());
  KV_ASSIGN_OR_RETURN(host->region_, transport->Register(arena));
  ShardServerOptions server;
  server.store.arena = arena;
  server.store.max_blocks = plan.max_blocks;
  server.store.max_pins = plan.max_pins;
  server.store.max_user_pinned_bytes =
      static_cast<uint64_t>(options.user_pin_share * static_cast<double>(plan.arena_bytes));
  server.store.hash_seed = SecureRandomUint64();
  server.limits.max_transfers_per_client =
      std::min(server.limits.max_transfers_per_client, transport->capabilities().max_outstanding);
  host->server_ = std::make_unique<ShardServer>(server);
  host->pump_ = std::make_unique<ServerPump>(transport, host->server_.get());
  return host;
}

}  // namespace kvant
