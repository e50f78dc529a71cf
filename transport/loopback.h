// The loopback backend: transports of one process that meet in a hub. No threads, no clock, no
// secrets from the operating system: the same calls give the same events, so the simulator runs on
// it.
#pragma once

#include <memory>

#include "transport/transport.h"

namespace kvant {

class LoopbackHubState;

// Where loopback transports find each other by name. A shared handle; all transports of one hub
// belong to one thread. Addresses are "loopback:NAME".
class LoopbackHub {
 public:
  LoopbackHub();

  // A transport on this hub; keeps the hub alive. A write or read is one memcpy in the Poll of the
  // side that submitted it.
  std::unique_ptr<Transport> MakeTransport();

 private:
  std::shared_ptr<LoopbackHubState> state_;
};

}  // namespace kvant
