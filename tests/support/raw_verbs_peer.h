// A connector that speaks verbs by hand, to say and do what no honest one does.
#pragma once

#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "base/check.h"
#include "transport/tcp_socket.h"
#include "transport/verbs_greeting.h"
#include "transport/verbs_queue.h"

namespace kvant::support {

class RawVerbsPeer {
 public:
  using OnRecord =
      std::function<void(const verbs::RecordHeader& header, std::span<const std::byte> body)>;

  explicit RawVerbsPeer(const std::string& address)
      : device_(*verbs::Device::Open({})),
        memory_(kMemoryBytes),
        registered_(*device_->Register(memory_.data(), memory_.size(), IBV_ACCESS_LOCAL_WRITE)),
        queue_(*verbs::Queue::Make(device_.get(), nullptr)),
        greeter_(ConnectTo(address)) {}

  // Says what is next to say until the listener takes it for a peer. Non-blocking.
  void Greet() {
    if (!said_hello_) {
      said_hello_ = greeter_.Send(queue_->Introduce(verbs::GreetingType::kHello));
      return;
    }
    verbs::Greeting welcome;
    std::string text;
    if (greeted_ || greeter_.Receive(&welcome, &text) != verbs::Greeter::Received::kGreeting) {
      return;
    }
    KV_CHECK(queue_->Connect(welcome).ok());
    greeted_ = greeter_.Send({.type = verbs::GreetingType::kReady});
  }

  bool MayPut() const { return queue_->HasRoom(1) && queue_->HasCredit(); }
  void Put(verbs::RecordHeader header, std::span<const std::byte> body) {
    queue_->PutRecord(header, body);
    KV_CHECK(queue_->Flush().ok());
  }
  // What no window is asked about first.
  void Transfer(bool write, uint64_t address, uint32_t key, size_t bytes,
                std::optional<uint32_t> immediate = {}) {
    queue_->PutPiece({.write = write,
                      .local = std::span(memory_).first(bytes),
                      .local_key = registered_->lkey,
                      .remote_address = address,
                      .remote_key = key,
                      .immediate = immediate},
                     0);
    KV_CHECK(queue_->Flush().ok());
  }
  void Poll(const OnRecord& on_record) {
    for (verbs::Completion next; !broken_ && queue_->Next(&next);) {
      switch (next.kind) {
        case verbs::Completion::Kind::kRecord: {
          const auto header =
              verbs::DecodeRecordHeader(next.record.first<verbs::kRecordHeaderBytes>());
          KV_CHECK(header.has_value());
          queue_->AddCredits(header->credits);
          if (on_record) on_record(*header, next.record.subspan(verbs::kRecordHeaderBytes));
          break;
        }
        case verbs::Completion::Kind::kDone:
          transferred_ |= next.request.kind == verbs::Request::Kind::kPiece;
          break;
        case verbs::Completion::Kind::kBroken:
          broken_ = true;
          break;
        case verbs::Completion::Kind::kImmediate:
          break;
      }
    }
    queue_->Renew();
  }
  bool broken() const { return broken_; }
  bool transferred() const { return transferred_; }

 private:
  static constexpr size_t kMemoryBytes = 8192;

  static tcp::Socket ConnectTo(const std::string& address) {
    const tcp::HostPort at = *tcp::ParseAddress(address, "verbs");
    return *tcp::StartConnect(*tcp::Resolve(at.host), at.port);
  }

  std::unique_ptr<verbs::Device> device_;
  std::vector<std::byte> memory_;
  verbs::Owned<ibv_mr> registered_;
  std::unique_ptr<verbs::Queue> queue_;
  verbs::Greeter greeter_;
  bool said_hello_ = false;
  bool greeted_ = false;
  bool broken_ = false;
  bool transferred_ = false;
};

}  // namespace kvant::support
