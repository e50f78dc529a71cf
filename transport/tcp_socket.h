// The few socket calls of the tcp backend, with errors that say what was being done.
#pragma once

#include <netinet/in.h>

#include <cstdint>
#include <string>
#include <string_view>
#include <utility>

#include "base/clock.h"
#include "base/status.h"

namespace kvant::tcp {

// Owns a file descriptor. Move-only value.
class Socket {
 public:
  Socket() = default;
  explicit Socket(int fd) : fd_(fd) {}
  Socket(Socket&& other) noexcept : fd_(std::exchange(other.fd_, -1)) {}
  Socket& operator=(Socket&& other) noexcept {
    std::swap(fd_, other.fd_);
    return *this;
  }
  ~Socket();
  int fd() const { return fd_; }
  explicit operator bool() const { return fd_ >= 0; }

 private:
  int fd_ = -1;
};

struct HostPort {
  std::string host;
  uint16_t port = 0;
};
// "SCHEME://HOST:PORT". kInvalidArgument says what is wrong with it.
Result<HostPort> ParseAddress(std::string_view address, std::string_view scheme = "tcp");
// Looks a name up; a dotted IPv4 address needs no name server. kUnavailable: no such host.
Result<in_addr> Resolve(const std::string& host);
std::string ToText(in_addr address);
// The peer's "SCHEME://A.B.C.D:PORT".
std::string PeerAddress(const Socket& socket, std::string_view scheme = "tcp");

// Non-blocking, close-on-exec. Listens; `port` 0 takes any free one.
Result<Socket> ListenOn(in_addr address, uint16_t port, int backlog);
Result<uint16_t> LocalPort(const Socket& socket);
// Starts a non-blocking connect.
Result<Socket> StartConnect(in_addr address, uint16_t port);
// After it became writable: whether the connect succeeded.
Status FinishConnect(const Socket& socket);
// Whether it became readable within this time.
bool SleepUntilReadable(const Socket& socket, Duration at_most);
// How the kernel is to find that a peer's host answers nothing for `silence_timeout`: of an idle
// connection by keep-alive, of one with unanswered bytes by TCP_USER_TIMEOUT. In whole seconds
// where TCP knows no less.
struct Probes {
  int idle_seconds;
  int interval_seconds;
  int count;
  int unanswered_milliseconds;
};
Probes ProbesFor(Duration silence_timeout);
// No delay for small frames, and the kernel reports a peer that is silent for this long.
void TuneForBulk(const Socket& socket, Duration silence_timeout);

}  // namespace kvant::tcp
