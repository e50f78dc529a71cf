#include "transport/tcp_endpoint.h"

#include <sys/epoll.h>
#include <sys/socket.h>

#include <algorithm>
#include <cerrno>
#include <cstring>

#include "base/bytes.h"

namespace kvant::tcp {
namespace {

// Messages of one peer in one turn, so that a flood of one starves no other.
constexpr int kMessagesATurn = 256;
constexpr size_t kMaxFarewells = 64;

}  // namespace

TcpShared::TcpShared(const TcpOptions& given)
    : options(given), windows(std::make_shared<WindowTable>(std::nullopt)) {}

void TcpShared::Watch(int fd, Source source, uint64_t id, bool edge) const {
  const uint32_t wanted = EPOLLIN | (edge ? EPOLLOUT | EPOLLRDHUP | EPOLLET : 0U);
  watcher.Watch(fd, id << 8 | static_cast<uint64_t>(source), wanted);
}

void TcpShared::Activate(TcpEndpoint* endpoint) {
  if (endpoint->active || endpoint->closed()) return;
  endpoint->active = true;
  active.push_back(endpoint->id());
}

TcpEndpoint::TcpEndpoint(TcpShared* shared, EndpointId id, std::string peer, in_addr host,
                         ZmqSocket dealer, ZmqMonitor monitor, TimePoint deadline)
    : shared_(shared),
      id_(id),
      peer_(std::move(peer)),
      host_(host),
      dealer_(std::move(dealer)),
      monitor_(std::move(monitor)),
      deadline_(deadline) {
  shared_->Watch(dealer_.fd(), Source::kDealer, id_, false);
  shared_->Watch(monitor_.fd(), Source::kMonitor, id_, false);
  shared_->SetTimer(id_);
  monitor_hot_ = true;
  const auto hello = EncodeHello();
  SendControl(ControlType::kHello, std::span(hello).subspan(1));
}

TcpEndpoint::TcpEndpoint(TcpShared* shared, EndpointId id, std::string identity, Socket bulk,
                         const LinkCounters& so_far)
    : shared_(shared),
      id_(id),
      peer_(PeerAddress(bulk)),
      identity_(std::move(identity)),
      state_(State::kOpen),
      dealer_hot_(false),
      counters_(so_far) {
  OpenStream(std::move(bulk));
}

void TcpEndpoint::OpenStream(Socket bulk) {
  TuneForBulk(bulk, shared_->options.silence_timeout);
  stream_ = std::make_unique<BulkStream>(
      std::move(bulk), BulkContext{.endpoint = id_,
                                   .windows = shared_->windows.get(),
                                   .counters = &counters_,
                                   .defects = &shared_->defects,
                                   .events = &shared_->events,
                                   .max_outstanding = shared_->options.max_outstanding,
                                   .max_message_bytes = shared_->options.max_message_bytes});
  state_ = State::kOpen;
  shared_->events.push_back({.kind = Event::Kind::kConnected, .endpoint = id_});
  shared_->Activate(this);
}

ZmqSent TcpEndpoint::SendControl(ControlType type, std::span<const std::byte> rest) {
  const ZmqSocket& socket = identity_.empty() ? dealer_ : shared_->router;
  const ZmqSent sent = socket.Send(identity_, static_cast<uint8_t>(type), rest);
  if (sent == ZmqSent::kSent) counters_.control_bytes_sent += rest.size() + 1;
  // Sending may have taken note of arrivals that the descriptor then no longer signals.
  if (identity_.empty()) {
    dealer_hot_ = true;
    shared_->Activate(this);
  } else {
    shared_->router_hot = true;
  }
  return sent;
}

Status TcpEndpoint::Send(std::span<const std::byte> message) {
  if (message.size() > shared_->options.max_message_bytes) {
    return InvalidArgument("sending {} bytes to {}: at most {} fit a message", message.size(),
                           peer_, shared_->options.max_message_bytes);
  }
  if (state_ != State::kOpen) {
    return Unavailable("sending to {}: the endpoint is {}", peer_,
                       Connecting() ? "not connected yet; wait for kConnected" : "closed");
  }
  // The first goes at once, those behind it together: with the next Submit, or in the next Poll.
  if (!stream_->SendMessage(message, !sent_since_poll_)) {
    return MakeStatus(StatusCode::kResourceExhausted,
                      "sending to {}: its queue is full; poll, then try again", peer_);
  }
  sent_since_poll_ = true;
  ++counters_.messages_sent;
  if (stream_->wants_turn()) shared_->Activate(this);
  return OkStatus();
}

size_t TcpEndpoint::Submit(std::span<const Transfer> transfers) {
  if (state_ != State::kOpen) return 0;
  const size_t accepted = stream_->Submit(transfers);
  if (stream_->wants_turn()) shared_->Activate(this);
  return accepted;
}

void TcpEndpoint::Close() {
  if (state_ == State::kClosing || state_ == State::kClosed) return;
  if (state_ != State::kOpen) {
    Finish(OkStatus(), StatusCode::kCancelled);
    return;
  }
  // Without room for the goodbye, the peer learns it from the bulk socket.
  SendControl(ControlType::kGoodbye, {});
  stream_->SayGoodbye();
  state_ = State::kClosing;
  deadline_ = SteadyClock().Now() + kGoodbyeTimeout;
  shared_->SetTimer(id_);
  shared_->Activate(this);
}

void TcpEndpoint::OnControl(std::span<const std::byte> message) {
  if (state_ == State::kClosed || state_ == State::kClosing) return;
  counters_.control_bytes_received += message.size();
  if (message.empty()) {
    ++shared_->defects.violations;
    Broken(InvalidArgument("{} sent an empty control message", peer_));
    return;
  }
  const auto type = static_cast<ControlType>(message[0]);
  const bool connected = state_ == State::kOpen || state_ == State::kPeerClosing;
  if (type == ControlType::kGoodbye && message.size() == 1 && connected) {
    control_goodbye_ = true;
    OnPeerGoodbye();
  } else if (type == ControlType::kWelcome && state_ == State::kHello) {
    OnWelcome(message);
  } else if (type == ControlType::kReady && message.size() == 1 && state_ == State::kReady) {
    OpenStream(std::move(connecting_bulk_));
  } else if (type == ControlType::kRefused && Connecting() && identity_.empty()) {
    Finish(Unavailable("connecting to {}: refused: {}", peer_, AsText(message.subspan(1))),
           StatusCode::kUnavailable);
  } else {
    ++shared_->defects.violations;
    Broken(InvalidArgument("{} sent a control message of type {} out of turn", peer_,
                           static_cast<int>(message[0])));
  }
}

void TcpEndpoint::OnWelcome(std::span<const std::byte> message) {
  const auto welcome = DecodeWelcome(message);
  if (!welcome || welcome->version != kVersion) {
    Finish(Unavailable("connecting to {}: it speaks another protocol version than ours ({})", peer_,
                       kVersion),
           StatusCode::kUnavailable);
    return;
  }
  auto started = StartConnect(host_, welcome->bulk_port);
  if (!started.ok()) {
    Finish(started.status(), StatusCode::kUnavailable);
    return;
  }
  connecting_bulk_ = *std::move(started);
  token_ = welcome->token;
  state_ = State::kBulk;
  shared_->Watch(connecting_bulk_.fd(), Source::kBulk, id_, true);
}

void TcpEndpoint::OnBulkConnected() {
  Status status = FinishConnect(connecting_bulk_);
  if (status.ok()) {
    std::array<std::byte, kBulkHeaderBytes> hello;
    Encode({.op = BulkOp::kHello, .tag = kVersion, .window = token_.low, .key = token_.high},
           hello);
    // A fresh socket takes 48 bytes at once.
    if (send(connecting_bulk_.fd(), hello.data(), hello.size(), MSG_NOSIGNAL) ==
        static_cast<ssize_t>(hello.size())) {
      counters_.control_bytes_sent += hello.size();
      state_ = State::kReady;
      return;
    }
    status = Unavailable("showing the token on the bulk socket: {}", std::strerror(errno));
  }
  Finish(Unavailable("connecting to {}: {}", peer_, status.message()), StatusCode::kUnavailable);
}

void TcpEndpoint::OnReady(Source source, uint32_t epoll_events) {
  if (source == Source::kDealer) dealer_hot_ = true;
  if (source == Source::kMonitor) monitor_hot_ = true;
  if (source == Source::kBulk) {
    const bool hung_up = (epoll_events & (EPOLLRDHUP | EPOLLHUP | EPOLLERR)) != 0;
    if (stream_ != nullptr) {
      stream_->OnReady((epoll_events & EPOLLIN) != 0, (epoll_events & EPOLLOUT) != 0, hung_up);
    } else if (state_ == State::kBulk && (epoll_events & (EPOLLOUT | EPOLLERR)) != 0) {
      OnBulkConnected();
    } else if (state_ == State::kReady && hung_up) {
      Finish(Unavailable("connecting to {}: it closed the bulk connection", peer_),
             StatusCode::kUnavailable);
    }
  }
  shared_->Activate(this);
}

void TcpEndpoint::DrainDealer() {
  ZmqPart body;
  for (int i = 0; i < kMessagesATurn && state_ != State::kClosed; ++i) {
    switch (dealer_.Receive(nullptr, &body)) {
      case ZmqReceived::kNothing:
        dealer_hot_ = false;
        return;
      case ZmqReceived::kMessage:
        OnControl(body.bytes());
        break;
      case ZmqReceived::kMalformed:
        ++shared_->defects.violations;
        Broken(InvalidArgument("{} sent a control message of several parts", peer_));
        return;
    }
  }
}

void TcpEndpoint::Progress() {
  sent_since_poll_ = false;
  if (state_ != State::kClosed && dealer_hot_) DrainDealer();
  if (state_ != State::kClosed && monitor_hot_) {
    monitor_hot_ = false;
    if (monitor_.SawDisconnect()) {
      // What arrived before the end counts.
      DrainDealer();
      if (stream_ != nullptr && state_ != State::kClosed) {
        stream_->OnReady(true, false, false);
        ProgressBulk();
      }
      if (state_ == State::kPeerClosing) {
        control_goodbye_ = true;
        OnPeerGoodbye();
      } else if (state_ != State::kClosed && state_ != State::kClosing) {
        Broken(Unavailable("{} {}: is it running, and is the address right?",
                           Connecting() ? "connecting to" : "the message connection is gone to",
                           peer_));
      }
    }
  }
  if (state_ != State::kClosed && stream_ != nullptr) ProgressBulk();
  if (ReadyNow()) shared_->Activate(this);
}

void TcpEndpoint::ProgressBulk() {
  Status status = stream_->Receive();
  if (status.ok()) {
    status = stream_->Send();
    // The peer's last words may still be there to read.
    if (!status.ok() && state_ != State::kClosing) {
      stream_->OnReady(true, false, true);
      const Status last = stream_->Receive();
      if (last.ok() && stream_->peer_said_goodbye()) status = OkStatus();
    }
  }
  if (state_ == State::kClosing) {
    if (!status.ok()) {
      Finish(OkStatus(), StatusCode::kCancelled);
    } else if (stream_->said_goodbye()) {
      Socket& socket = stream_->socket();
      shutdown(socket.fd(), SHUT_WR);
      shared_->watcher.Unwatch(socket.fd());
      if (shared_->farewells.size() < kMaxFarewells) {
        shared_->farewells.push_back({std::move(socket), SteadyClock().Now() + kGoodbyeTimeout});
      }
      Finish(OkStatus(), StatusCode::kCancelled);
    }
    return;
  }
  if (!status.ok()) {
    if (status.code() == StatusCode::kInvalidArgument) ++shared_->defects.violations;
    if (control_goodbye_) {
      Finish(OkStatus(), StatusCode::kUnavailable);
    } else {
      Broken(MakeStatus(status.code(), "the bulk connection to {}: {}", peer_, status.message()));
    }
    return;
  }
  if (stream_->peer_said_goodbye()) OnPeerGoodbye();
}

void TcpEndpoint::OnPeerGoodbye() {
  if (control_goodbye_ && stream_->peer_said_goodbye()) {
    Finish(OkStatus(), StatusCode::kUnavailable);
  } else if (state_ == State::kOpen) {
    state_ = State::kPeerClosing;
    deadline_ = SteadyClock().Now() + kGoodbyeTimeout;
    shared_->SetTimer(id_);
  }
}

void TcpEndpoint::OnTimer(TimePoint now) {
  if (!HasTimer() || now < deadline_) return;
  if (Connecting()) {
    Finish(MakeStatus(StatusCode::kDeadlineExceeded,
                      "connecting to {}: no answer in time; is it a kvant listener?", peer_),
           StatusCode::kDeadlineExceeded);
  } else {
    Finish(OkStatus(),
           state_ == State::kClosing ? StatusCode::kCancelled : StatusCode::kUnavailable);
  }
}

bool TcpEndpoint::ReadyNow() const {
  if (state_ == State::kClosed) return false;
  if (stream_ != nullptr && (stream_->wants_turn() || stream_->said_goodbye())) return true;
  return monitor_hot_ || (dealer_hot_ && dealer_.Readable());
}

void TcpEndpoint::Broken(const Status& why) { Finish(why, StatusCode::kUnavailable); }

void TcpEndpoint::Finish(const Status& why, StatusCode transfers_end_with) {
  if (state_ == State::kClosed) return;
  state_ = State::kClosed;
  if (stream_ != nullptr) stream_->Abort(transfers_end_with, peer_);
  if (!identity_.empty()) shared_->peers.erase(identity_);
  // Closed sockets of ZeroMQ linger, and would go on signalling.
  if (dealer_.get() != nullptr) {
    shared_->watcher.Unwatch(dealer_.fd());
    if (!why.ok()) dealer_.Abandon();
  }
  if (monitor_) shared_->watcher.Unwatch(monitor_.fd());
  shared_->events.push_back({.kind = Event::Kind::kClosed, .endpoint = id_, .status = why});
}

void TcpEndpoint::Leave() {
  if (dealer_.get() != nullptr && (Connecting() || monitor_.SawDisconnect())) dealer_.Abandon();
  if (state_ == State::kOpen) {
    SendControl(ControlType::kGoodbye, {});
    stream_->SayGoodbye();
    static_cast<void>(stream_->Send());
  }
}

}  // namespace kvant::tcp
