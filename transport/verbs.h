// The verbs backend: reliable connections over RDMA devices (InfiniBand, RoCE). Bytes move straight
// between the memories of two hosts, posted by whoever transfers. docs/transport-guide.md gives the
// handshake and the records.
#pragma once

#include <chrono>
#include <cstddef>
#include <memory>
#include <optional>
#include <string>

#include "transport/transport.h"

namespace kvant {

struct VerbsOptions {
  // As `ibv_devices` names it. Empty: what KVANT_RDMA_DEVICE says, else the first with a port that
  // is up.
  std::string device{};
  size_t max_message_bytes = size_t{1} << 20;
  size_t max_outstanding = 1024;  // transfers of ours that a peer may have in flight
  size_t max_endpoints = 1024;    // further peers are refused
  // A peer that connected and says nothing gives way after this long.
  Duration handshake_timeout = std::chrono::seconds(5);
  // A peer whose host answers nothing for this long is taken for dead.
  Duration silence_timeout = std::chrono::seconds(10);
  // A peer that does not let go of a revoked window within this time is cut off.
  Duration release_timeout = std::chrono::seconds(30);
  // Wait looks for work this long before it sleeps.
  Duration poll_before_sleep = std::chrono::microseconds(50);
};

// Nothing when there is a device that can be used, else one sentence that says why not.
std::optional<std::string> VerbsUnavailable(const VerbsOptions& options);

// Addresses are "verbs://HOST:PORT", with HOST and PORT as tcp has them: a plain socket there says
// who is who; it carries no data. What a peer may touch the device itself enforces: each window is
// a memory window of its own, bound to that peer's connection. kUnsupported: VerbsUnavailable says
// why. kResourceExhausted: the device or ulimit -l has no more to give.
Result<std::unique_ptr<Transport>> MakeVerbsTransport(const VerbsOptions& options);

}  // namespace kvant
