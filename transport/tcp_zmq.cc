#include "transport/tcp_zmq.h"

#include <cerrno>
#include <cstring>

#include "base/bytes.h"
#include "transport/tcp_socket.h"

namespace kvant::tcp {
namespace {

// Messages that wait on one side of one connection.
constexpr int kSendQueue = 1024;
// The receiver's queue bounds what a peer can make us hold: this many messages of the largest size.
constexpr int kReceiveQueue = 128;
constexpr int kLingerMilliseconds = 500;
constexpr int kMaxSockets = 16384;
constexpr int kWatchedEvents =
    ZMQ_EVENT_CLOSED | ZMQ_EVENT_DISCONNECTED | ZMQ_EVENT_HANDSHAKE_FAILED_NO_DETAIL |
    ZMQ_EVENT_HANDSHAKE_FAILED_PROTOCOL | ZMQ_EVENT_HANDSHAKE_FAILED_AUTH;

Status Failed(std::string_view what) {
  return MakeStatus(StatusCode::kResourceExhausted,
                    "{}: {}; raise the limit of open files (ulimit -n)", what, zmq_strerror(errno));
}

int Milliseconds(Duration duration) {
  return static_cast<int>(std::chrono::duration_cast<std::chrono::milliseconds>(duration).count());
}

}  // namespace

ZmqContext::ZmqContext() : context_(zmq_ctx_new()) {
  KV_CHECK(context_ != nullptr);
  zmq_ctx_set(context_, ZMQ_MAX_SOCKETS, kMaxSockets);
}
ZmqContext::~ZmqContext() {
  while (zmq_ctx_term(context_) != 0 && errno == EINTR) {
  }
}

ZmqSocket::~ZmqSocket() {
  if (socket_ != nullptr) zmq_close(socket_);
}

Result<ZmqSocket> ZmqSocket::Make(const ZmqContext& context, int type, const TcpOptions& options) {
  ZmqSocket made;
  made.socket_ = zmq_socket(context.get(), type);
  if (made.socket_ == nullptr) return Failed("opening a ZeroMQ socket");
  const auto set = [&made](int option, int value) {
    KV_CHECK(zmq_setsockopt(made.socket_, option, &value, sizeof(value)) == 0);
  };
  set(ZMQ_LINGER, kLingerMilliseconds);
  set(ZMQ_SNDHWM, kSendQueue);
  set(ZMQ_RCVHWM, kReceiveQueue);
  set(ZMQ_HANDSHAKE_IVL, Milliseconds(options.handshake_timeout));
  // The kernel's probes, not ZMTP's: libzmq 4.3 sends a ping through an engine it has marked broken
  // and aborts the process (its issue 4841), which a peer that floods us and hangs up brings about.
  const Probes probes = ProbesFor(options.silence_timeout);
  set(ZMQ_TCP_KEEPALIVE, 1);
  set(ZMQ_TCP_KEEPALIVE_IDLE, probes.idle_seconds);
  set(ZMQ_TCP_KEEPALIVE_INTVL, probes.interval_seconds);
  set(ZMQ_TCP_KEEPALIVE_CNT, probes.count);
  set(ZMQ_TCP_MAXRT, probes.unanswered_milliseconds);
  const auto max_bytes = static_cast<int64_t>(options.max_message_bytes + 1);  // and its type
  KV_CHECK(zmq_setsockopt(made.socket_, ZMQ_MAXMSGSIZE, &max_bytes, sizeof(max_bytes)) == 0);
  return made;
}

Result<ZmqSocket> ZmqSocket::MakeRouter(const ZmqContext& context, const TcpOptions& options) {
  KV_ASSIGN_OR_RETURN(ZmqSocket made, Make(context, ZMQ_ROUTER, options));
  // Sends to a peer that is gone, or whose queue is full, say so.
  const int mandatory = 1;
  KV_CHECK(zmq_setsockopt(made.get(), ZMQ_ROUTER_MANDATORY, &mandatory, sizeof(mandatory)) == 0);
  return made;
}

Result<ZmqSocket> ZmqSocket::MakeDealer(const ZmqContext& context, const TcpOptions& options) {
  KV_ASSIGN_OR_RETURN(ZmqSocket made, Make(context, ZMQ_DEALER, options));
  // An endpoint is one connection: when it breaks, the endpoint closes.
  const int never = -1;
  KV_CHECK(zmq_setsockopt(made.get(), ZMQ_RECONNECT_IVL, &never, sizeof(never)) == 0);
  return made;
}

Result<ZmqMonitor> ZmqMonitor::Make(const ZmqContext& context, const ZmqSocket& watched,
                                    uint64_t number) {
  const std::string address = fmt::format("inproc://kvant-monitor-{}", number);
  if (zmq_socket_monitor(watched.get(), address.c_str(), kWatchedEvents) != 0) {
    return Failed("watching a ZeroMQ socket");
  }
  ZmqMonitor made;
  made.watched_ = watched.get();
  made.reports_.socket_ = zmq_socket(context.get(), ZMQ_PAIR);
  if (made.reports_.socket_ == nullptr ||
      zmq_connect(made.reports_.socket_, address.c_str()) != 0) {
    return Failed("watching a ZeroMQ socket");
  }
  return made;
}

ZmqMonitor::~ZmqMonitor() {
  // A report to a pair whose other end is gone blocks the thread of the whole context for ever, so
  // reporting ends first.
  if (watched_ != nullptr) zmq_socket_monitor(watched_, nullptr, 0);
}

bool ZmqMonitor::SawDisconnect() const {
  ZmqPart event;
  // Whatever the monitor reports is an end: only ends are asked for.
  return zmq_msg_recv(event.get(), reports_.get(), ZMQ_DONTWAIT) >= 0;
}

void ZmqSocket::Abandon() const {
  const int nothing = 0;
  KV_CHECK(zmq_setsockopt(socket_, ZMQ_LINGER, &nothing, sizeof(nothing)) == 0);
}

int ZmqSocket::fd() const {
  int fd = -1;
  size_t size = sizeof(fd);
  KV_CHECK(zmq_getsockopt(socket_, ZMQ_FD, &fd, &size) == 0);
  return fd;
}

bool ZmqSocket::Readable() const {
  int events = 0;
  size_t size = sizeof(events);
  if (zmq_getsockopt(socket_, ZMQ_EVENTS, &events, &size) != 0) return true;
  return (events & ZMQ_POLLIN) != 0;
}

ZmqReceived ZmqSocket::Receive(ZmqPart* sender, ZmqPart* body) const {
  if (sender != nullptr) {
    if (zmq_msg_recv(sender->get(), socket_, ZMQ_DONTWAIT) < 0) return ZmqReceived::kNothing;
    if (!sender->more()) return ZmqReceived::kMalformed;
  }
  if (zmq_msg_recv(body->get(), socket_, ZMQ_DONTWAIT) < 0) return ZmqReceived::kNothing;
  if (!body->more()) return ZmqReceived::kMessage;
  // The parts of a message arrive together, so this ends.
  ZmqPart excess;
  while (zmq_msg_recv(excess.get(), socket_, ZMQ_DONTWAIT) >= 0 && excess.more()) {
  }
  return ZmqReceived::kMalformed;
}

ZmqSent ZmqSocket::Send(std::string_view to, uint8_t type, std::span<const std::byte> rest) const {
  // The body is made first: once the address part is sent, the body must follow.
  zmq_msg_t body;
  if (zmq_msg_init_size(&body, rest.size() + 1) != 0) return ZmqSent::kFull;
  auto* bytes = static_cast<std::byte*>(zmq_msg_data(&body));
  bytes[0] = static_cast<std::byte>(type);
  if (!rest.empty()) std::memcpy(bytes + 1, rest.data(), rest.size());
  int rc = 0;
  if (!to.empty()) rc = zmq_send(socket_, to.data(), to.size(), ZMQ_DONTWAIT | ZMQ_SNDMORE);
  if (rc >= 0) rc = zmq_msg_send(&body, socket_, ZMQ_DONTWAIT);
  if (rc >= 0) return ZmqSent::kSent;
  const bool full = errno == EAGAIN || errno == EINTR;
  zmq_msg_close(&body);
  return full ? ZmqSent::kFull : ZmqSent::kNoPeer;
}

}  // namespace kvant::tcp
