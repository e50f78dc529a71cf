// ServerStats as JSON.
#include <fmt/format.h>

#include <string_view>
#include <utility>

#include "cache_service/shard_server.h"

namespace kvant {

std::string ServerStats::ToJson() const {
  const std::pair<std::string_view, uint64_t> fields[] = {
      {"clients", clients},
      {"lookup_blocks", lookup_blocks},
      {"hits", hits},
      {"misses", misses},
      {"payload_bytes_served", payload_bytes_served},
      {"payload_bytes_stored", payload_bytes_stored},
      {"puts_sealed", puts_sealed},
      {"puts_refused", puts_refused},
      {"dedup_bytes", dedup_bytes},
      {"data_loss", data_loss},
      {"malformed_messages", malformed_messages},
      {"stale_epoch", stale_epoch},
      {"transfers_failed", transfers_failed},
      {"refused_busy", refused_busy},
      {"store_blocks", store.blocks},
      {"store_reservations", store.reservations},
      {"store_pins", store.pins},
      {"store_payload_bytes", store.payload_bytes},
      {"store_used_bytes", store.used_bytes},
      {"store_limit_bytes", store.limit_bytes},
      {"store_user_pinned_bytes", store.user_pinned_bytes},
      {"store_sealed", store.sealed},
      {"store_evicted", store.evicted},
      {"store_reaped", store.reaped},
      {"store_dropped_corrupt", store.dropped_corrupt},
      {"store_seal_refused", store.seal_refused},
  };
  std::string json = "{";
  for (const auto& [name, value] : fields) {
    json += fmt::format("{}\"{}\": {}", json.size() == 1 ? "" : ", ", name, value);
  }
  return json + "}";
}

}  // namespace kvant
