#include "transport/tcp_socket.h"

#include <arpa/inet.h>
#include <netdb.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <sys/socket.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <charconv>
#include <chrono>
#include <cstring>
#include <ctime>
#include <memory>

namespace kvant::tcp {
namespace {

sockaddr_in MakeAddress(in_addr address, uint16_t port) {
  sockaddr_in full{};
  full.sin_family = AF_INET;
  full.sin_addr = address;
  full.sin_port = htons(port);
  return full;
}

Result<Socket> MakeStreamSocket() {
  Socket made(socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0));
  if (!made) {
    return MakeStatus(StatusCode::kResourceExhausted,
                      "opening a socket: {}; raise the limit of open files (ulimit -n)",
                      std::strerror(errno));
  }
  return made;
}

void SetOption(const Socket& socket, int level, int name, int value) {
  // These tune; a kernel that refuses one still moves the bytes.
  static_cast<void>(setsockopt(socket.fd(), level, name, &value, sizeof(value)));
}

}  // namespace

Socket::~Socket() {
  if (fd_ >= 0) close(fd_);
}

Result<HostPort> ParseAddress(std::string_view address, std::string_view scheme) {
  const size_t host = scheme.size() + 3;
  const size_t colon = address.rfind(':');
  HostPort parsed;
  if (address.starts_with(scheme) && address.substr(scheme.size()).starts_with("://") &&
      colon != std::string_view::npos && colon > host) {
    const std::string_view port = address.substr(colon + 1);
    const auto [end, error] = std::from_chars(port.begin(), port.end(), parsed.port);
    parsed.host = address.substr(host, colon - host);
    if (error == std::errc() && end == port.end() && parsed.host.find('/') == std::string::npos) {
      return parsed;
    }
  }
  return InvalidArgument("reading the address '{}': give {}://HOST:PORT, e.g. {}://127.0.0.1:7070",
                         address, scheme, scheme);
}

Result<in_addr> Resolve(const std::string& host) {
  in_addr address{};
  if (inet_pton(AF_INET, host.c_str(), &address) == 1) return address;
  addrinfo hints{};
  hints.ai_family = AF_INET;
  hints.ai_socktype = SOCK_STREAM;
  addrinfo* found = nullptr;
  const int error = getaddrinfo(host.c_str(), nullptr, &hints, &found);
  const std::unique_ptr<addrinfo, decltype(&freeaddrinfo)> guard(found, &freeaddrinfo);
  if (error != 0 || found == nullptr) {
    return Unavailable("looking up host '{}': {}; check the name", host, gai_strerror(error));
  }
  sockaddr_in full{};
  std::memcpy(&full, found->ai_addr, sizeof(full));
  return full.sin_addr;
}

std::string ToText(in_addr address) {
  std::array<char, INET_ADDRSTRLEN> text{};
  inet_ntop(AF_INET, &address, text.data(), text.size());
  return text.data();
}

std::string PeerAddress(const Socket& socket, std::string_view scheme) {
  sockaddr_in full{};
  socklen_t length = sizeof(full);
  if (getpeername(socket.fd(), reinterpret_cast<sockaddr*>(&full), &length) != 0) {
    return fmt::format("{}://unknown", scheme);
  }
  return fmt::format("{}://{}:{}", scheme, ToText(full.sin_addr), ntohs(full.sin_port));
}

Result<Socket> ListenOn(in_addr address, uint16_t port, int backlog) {
  KV_ASSIGN_OR_RETURN(Socket made, MakeStreamSocket());
  SetOption(made, SOL_SOCKET, SO_REUSEADDR, 1);
  const sockaddr_in full = MakeAddress(address, port);
  if (bind(made.fd(), reinterpret_cast<const sockaddr*>(&full), sizeof(full)) != 0 ||
      listen(made.fd(), backlog) != 0) {
    return Unavailable("listening for bulk connections on {}:{}: {}; choose another port",
                       ToText(address), port, std::strerror(errno));
  }
  return made;
}

Result<uint16_t> LocalPort(const Socket& socket) {
  sockaddr_in full{};
  socklen_t length = sizeof(full);
  if (getsockname(socket.fd(), reinterpret_cast<sockaddr*>(&full), &length) != 0) {
    return Unavailable("asking for the port of a socket: {}", std::strerror(errno));
  }
  return ntohs(full.sin_port);
}

Result<Socket> StartConnect(in_addr address, uint16_t port) {
  KV_ASSIGN_OR_RETURN(Socket made, MakeStreamSocket());
  const sockaddr_in full = MakeAddress(address, port);
  const int rc = connect(made.fd(), reinterpret_cast<const sockaddr*>(&full), sizeof(full));
  if (rc != 0 && errno != EINPROGRESS) {
    return Unavailable("connecting the bulk socket to {}:{}: {}", ToText(address), port,
                       std::strerror(errno));
  }
  return made;
}

Status FinishConnect(const Socket& socket) {
  int error = 0;
  socklen_t length = sizeof(error);
  if (getsockopt(socket.fd(), SOL_SOCKET, SO_ERROR, &error, &length) != 0) error = errno;
  if (error == 0) return OkStatus();
  return Unavailable("connecting the bulk socket: {}", std::strerror(error));
}

bool SleepUntilReadable(const Socket& socket, Duration at_most) {
  const auto seconds = std::chrono::duration_cast<std::chrono::seconds>(at_most);
  const timespec timeout{.tv_sec = seconds.count(), .tv_nsec = (at_most - seconds).count()};
  pollfd ready{.fd = socket.fd(), .events = POLLIN, .revents = 0};
  return ppoll(&ready, 1, &timeout, nullptr) > 0;
}

// Whether both ends of a connection are on this host.
bool StaysHere(const Socket& socket) {
  sockaddr_in here{};
  sockaddr_in there{};
  socklen_t here_bytes = sizeof(here);
  socklen_t there_bytes = sizeof(there);
  return getsockname(socket.fd(), reinterpret_cast<sockaddr*>(&here), &here_bytes) == 0 &&
         getpeername(socket.fd(), reinterpret_cast<sockaddr*>(&there), &there_bytes) == 0 &&
         here.sin_family == AF_INET && here.sin_addr.s_addr == there.sin_addr.s_addr;
}

Probes ProbesFor(Duration silence_timeout) {
  const auto milliseconds = static_cast<int>(
      std::chrono::duration_cast<std::chrono::milliseconds>(silence_timeout).count());
  const int seconds = milliseconds / 1000;
  return {.idle_seconds = std::max(1, seconds / 2),
          .interval_seconds = std::max(1, seconds / 6),
          .count = 3,
          .unanswered_milliseconds = milliseconds};
}

void TuneForBulk(const Socket& socket, Duration silence_timeout) {
  const Probes probes = ProbesFor(silence_timeout);
  SetOption(socket, IPPROTO_TCP, TCP_NODELAY, 1);
  SetOption(socket, SOL_SOCKET, SO_KEEPALIVE, 1);
  SetOption(socket, IPPROTO_TCP, TCP_KEEPIDLE, probes.idle_seconds);
  SetOption(socket, IPPROTO_TCP, TCP_KEEPINTVL, probes.interval_seconds);
  SetOption(socket, IPPROTO_TCP, TCP_KEEPCNT, probes.count);
  SetOption(socket, IPPROTO_TCP, TCP_USER_TIMEOUT, probes.unanswered_milliseconds);
  // Within a host there is no congestion to look for, and where the system's choice is BBR a flow
  // would be paced by timers, to less than half the rate. Reno is open to everybody.
  constexpr std::string_view kUnpaced = "reno";
  if (StaysHere(socket))
    setsockopt(socket.fd(), IPPROTO_TCP, TCP_CONGESTION, kUnpaced.data(), kUnpaced.size());
  // Buffer sizes stay with the kernel: setting them switches its tuning off and, without privilege,
  // caps them below what it would give.
}

}  // namespace kvant::tcp
