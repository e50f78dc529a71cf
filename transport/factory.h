// Transports by name: a constant list of the backends that exist, and whether each can be used
// here.
#pragma once

#include <memory>
#include <optional>
#include <span>
#include <string>
#include <string_view>

#include "transport/host_transport.h"
#include "transport/loopback.h"
#include "transport/mpi.h"
#include "transport/tcp.h"
#include "transport/transport.h"
#include "transport/verbs.h"

namespace kvant {

// What the backends need. Borrowed for the call, but for the session, which outlives the transport.
struct TransportOptions {
  TcpOptions tcp{};
  ShmOptions shm{};
  VerbsOptions verbs{};
  bool tcp_alone = false;           // peers of this host over tcp as well
  LoopbackHub* loopback = nullptr;  // nullptr: loopback cannot be used
  MpiSession* mpi = nullptr;        // nullptr: mpi cannot be used
};

struct TransportBackend {
  std::string_view name;
  // Nothing when it can be used, else one sentence that says why not.
  std::optional<std::string> (*unavailable)(const TransportOptions& options);
  Result<std::unique_ptr<Transport>> (*make)(const TransportOptions& options);
};

// All backends of this build. Immutable.
std::span<const TransportBackend> TransportBackends();

// kInvalidArgument: no such backend (the message lists those that exist). kUnsupported: it cannot
// be used here, and why.
Result<std::unique_ptr<Transport>> MakeTransport(std::string_view name,
                                                 const TransportOptions& options);

// Who serves such an address of a shard: "verbs" of "verbs://...", else "tcp".
std::string_view TransportNameOf(std::string_view address);

}  // namespace kvant
