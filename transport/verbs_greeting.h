// The plain socket over which the two ends of a verbs connection learn of each other, and later
// that the other's process is gone.
#pragma once

#include <array>
#include <string>
#include <string_view>

#include "transport/tcp_socket.h"
#include "transport/verbs_wire.h"

namespace kvant::verbs {

// Owns the socket. Single-owner, non-blocking.
class Greeter {
 public:
  explicit Greeter(tcp::Socket socket) : socket_(std::move(socket)) {}
  const tcp::Socket& socket() const { return socket_; }
  tcp::Socket TakeSocket() { return std::move(socket_); }

  // False: the socket is full, or broken. text: of a refusal.
  bool Send(Greeting greeting, std::string_view text = {}) const;
  enum class Received : uint8_t { kGreeting, kNothing, kEnd, kMalformed };
  // text: of a refusal.
  Received Receive(Greeting* greeting, std::string* text);

 private:
  // Whether that many bytes of the frame are there; else what came instead.
  bool Fill(size_t bytes, Received* instead);

  tcp::Socket socket_;
  std::array<std::byte, kGreetingBytes + kMaxTextBytes> frame_{};
  size_t got_ = 0;
};

}  // namespace kvant::verbs
