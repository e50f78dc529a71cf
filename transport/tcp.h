// The tcp backend: a handshake over ZeroMQ, then messages and bulk bytes over a plain socket of the
// same endpoint. docs/transport-guide.md gives both protocols byte for byte.
#pragma once

#include <chrono>
#include <cstdint>
#include <memory>

#include "transport/transport.h"

namespace kvant {

struct TcpOptions {
  uint16_t bulk_port = 0;  // of the listener; 0: any free one, announced to peers over ZeroMQ
  size_t max_message_bytes = size_t{1} << 20;
  size_t max_outstanding = 1024;  // transfers a peer may have in flight, each way
  size_t max_endpoints = 1024;    // further peers are refused
  // Peers that have not finished the handshake; the oldest gives way to a newcomer.
  size_t max_handshakes = 64;
  Duration handshake_timeout = std::chrono::seconds(5);
  // A peer whose host answers nothing for this long is taken for dead.
  Duration silence_timeout = std::chrono::seconds(10);
  // Wait looks for work this long before it sleeps.
  Duration poll_before_sleep = std::chrono::microseconds(50);
};

// What garbage and slow peers cost. All counts since construction.
struct TcpDefects {
  uint64_t bad_messages = 0;          // malformed, or from nobody we know; dropped
  uint64_t bad_bulk_connections = 0;  // no or wrong token, or too slow; closed
  uint64_t violations = 0;        // protocol violations of a connected peer; its endpoint closed
  uint64_t discarded_writes = 0;  // writes at windows not exposed to that peer; bytes discarded
  uint64_t discarded_bytes = 0;
  uint64_t refused_reads = 0;  // reads of windows not exposed to that peer; refused
};

// A Transport with what only tcp has. Single-owner, as every Transport; ZeroMQ runs one I/O thread
// of its own below it. Addresses are "tcp://HOST:PORT": HOST a name or an IPv4 address (a name is
// looked up in Listen and Connect, the only calls that may wait for a name server), PORT 0 in
// Listen for any. Listening on 0.0.0.0 announces the bulk port only; peers use the host they
// connected to.
class TcpTransport : public Transport {
 public:
  // The port of the bulk listener, 0 before Listen.
  virtual uint16_t bulk_port() const = 0;
  virtual TcpDefects defects() const = 0;
  // What Wait sleeps on: readable when there may be something to poll.
  virtual int descriptor() const = 0;
  // How much of that time Wait would sleep, unless the descriptor becomes readable; 0: there may be
  // something to poll now.
  virtual Duration MaySleep(Duration at_most) = 0;
};

Result<std::unique_ptr<TcpTransport>> MakeTcpTransport(const TcpOptions& options);

}  // namespace kvant
