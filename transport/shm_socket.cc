#include "transport/shm_socket.h"

#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

#include <cerrno>
#include <cstddef>
#include <cstring>
#include <initializer_list>

namespace kvant::shm {
namespace {

constexpr std::string_view kScheme = "shm:";
constexpr size_t kMaxName = 80;
constexpr size_t kMaxText = 256;
constexpr size_t kMaxFiles = 2;

struct Address {
  sockaddr_un name = {};
  socklen_t bytes = 0;
};
// In the abstract namespace, which leaves no file behind and belongs to a network namespace.
Address AddressOf(std::string_view name) {
  Address address;
  address.name.sun_family = AF_UNIX;
  const std::string path = "kvant-shm-" + std::string(name);
  std::memcpy(address.name.sun_path + 1, path.data(), path.size());
  address.bytes = static_cast<socklen_t>(offsetof(sockaddr_un, sun_path) + 1 + path.size());
  return address;
}

Result<tcp::Socket> NewSocket() {
  tcp::Socket made(socket(AF_UNIX, SOCK_SEQPACKET | SOCK_NONBLOCK | SOCK_CLOEXEC, 0));
  if (!made) {
    return MakeStatus(StatusCode::kResourceExhausted, "making a socket: {}; raise ulimit -n",
                      std::strerror(errno));
  }
  return made;
}

}  // namespace

Result<std::string_view> ParseName(std::string_view address) {
  if (!address.starts_with(kScheme) || address.size() == kScheme.size() ||
      address.size() > kScheme.size() + kMaxName) {
    return InvalidArgument("reading the address '{}': give shm:NAME, with 1 to {} characters",
                           address, kMaxName);
  }
  return address.substr(kScheme.size());
}

Result<tcp::Socket> Listen(std::string_view name, int backlog) {
  KV_ASSIGN_OR_RETURN(tcp::Socket made, NewSocket());
  const Address address = AddressOf(name);
  if (bind(made.fd(), reinterpret_cast<const sockaddr*>(&address.name), address.bytes) != 0 ||
      listen(made.fd(), backlog) != 0) {
    return Unavailable("listening on shm:{}: {}; choose another name, or stop who has it", name,
                       std::strerror(errno));
  }
  return made;
}

Result<tcp::Socket> Connect(std::string_view name) {
  KV_ASSIGN_OR_RETURN(tcp::Socket made, NewSocket());
  const Address address = AddressOf(name);
  if (connect(made.fd(), reinterpret_cast<const sockaddr*>(&address.name), address.bytes) != 0) {
    return Unavailable("connecting to shm:{}: {}", name,
                       errno == ECONNREFUSED ? "nobody listens there" : std::strerror(errno));
  }
  return made;
}

bool Trusted(const tcp::Socket& socket) {
  ucred peer = {};
  socklen_t bytes = sizeof(peer);
  if (getsockopt(socket.fd(), SOL_SOCKET, SO_PEERCRED, &peer, &bytes) != 0) return false;
  return peer.uid == geteuid() || peer.uid == 0 || geteuid() == 0;
}

bool SendPacket(const tcp::Socket& socket, const PacketHeader& header, std::string_view text,
                std::initializer_list<int> files) {
  iovec parts[2] = {{const_cast<PacketHeader*>(&header), sizeof(header)},
                    {const_cast<char*>(text.data()), text.size()}};
  msghdr message = {};
  message.msg_iov = parts;
  message.msg_iovlen = text.empty() ? 1 : 2;
  alignas(cmsghdr) char control[CMSG_SPACE(kMaxFiles * sizeof(int))] = {};
  if (files.size() > 0) {
    message.msg_control = control;
    message.msg_controllen = CMSG_SPACE(files.size() * sizeof(int));
    cmsghdr* rights = CMSG_FIRSTHDR(&message);
    rights->cmsg_level = SOL_SOCKET;
    rights->cmsg_type = SCM_RIGHTS;
    rights->cmsg_len = CMSG_LEN(files.size() * sizeof(int));
    std::memcpy(CMSG_DATA(rights), files.begin(), files.size() * sizeof(int));
  }
  return sendmsg(socket.fd(), &message, MSG_NOSIGNAL | MSG_DONTWAIT) >= 0;
}

Received ReceivePacket(const tcp::Socket& socket, Packet* packet) {
  *packet = {};
  char text[kMaxText];
  iovec parts[2] = {{&packet->header, sizeof(packet->header)}, {text, sizeof(text)}};
  alignas(cmsghdr) char control[CMSG_SPACE(kMaxFiles * sizeof(int))] = {};
  msghdr message = {};
  message.msg_iov = parts;
  message.msg_iovlen = 2;
  message.msg_control = control;
  message.msg_controllen = sizeof(control);
  const ssize_t got = recvmsg(socket.fd(), &message, MSG_DONTWAIT | MSG_CMSG_CLOEXEC);
  if (got < 0) {
    return errno == EAGAIN || errno == EINTR ? Received::kNothing : Received::kEnd;
  }
  for (cmsghdr* part = CMSG_FIRSTHDR(&message); part != nullptr;
       part = CMSG_NXTHDR(&message, part)) {
    if (part->cmsg_level != SOL_SOCKET || part->cmsg_type != SCM_RIGHTS) continue;
    const size_t count = (part->cmsg_len - CMSG_LEN(0)) / sizeof(int);
    for (size_t i = 0; i < count; ++i) {
      int fd = -1;
      std::memcpy(&fd, CMSG_DATA(part) + i * sizeof(int), sizeof(int));
      packet->files.emplace_back(fd);
    }
  }
  if (got == 0) return Received::kEnd;
  if (static_cast<size_t>(got) < sizeof(PacketHeader) || packet->header.magic != kMagic ||
      (message.msg_flags & (MSG_TRUNC | MSG_CTRUNC)) != 0) {
    return Received::kMalformed;
  }
  packet->text.assign(text, static_cast<size_t>(got) - sizeof(PacketHeader));
  return Received::kPacket;
}

}  // namespace kvant::shm
