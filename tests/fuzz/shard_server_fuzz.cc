// Any sequence of messages and transport events into a shard: it stays within its memory, answers
// in well-formed messages, and holds nothing when everybody has left.
#include <map>

#include "base/bytes.h"
#include "base/check.h"
#include "cache_service/shard_server.h"
#include "tests/fuzz/service_session.h"

namespace kvant::fuzz {
namespace {

constexpr size_t kEndpoints = 3;
constexpr size_t kMostCommands = 400;

enum Command : uint8_t {
  kConnect,
  kRawMessage,
  kMessage,
  kTransferOk,
  kTransferFailed,
  kClose,
  kAdvance,
  kTransfersOk,
  kCommands,
};

// Single-owner.
class Session {
 public:
  Session() : arena_(256 << 10) {
    ShardServerOptions options;
    options.store.arena = arena_;
    options.store.max_blocks = 64;
    options.store.max_pins = 64;
    options.store.max_user_pinned_bytes = 64 << 10;
    options.limits.max_clients = 2;
    options.limits.max_requests_per_client = 8;
    options.limits.max_puts_per_client = 8;
    options.limits.max_transfers_per_client = 4;
    options.limits.max_leases_per_client = 32;
    options.limits.max_queued_ranges = 256;
    server_ = std::make_unique<ShardServer>(options);
  }

  void Do(Command command, FuzzInput* input) {
    switch (command) {
      case kConnect:
        endpoint_ = 1 + input->Take<uint8_t>() % kEndpoints;
        Give({.kind = Event::Kind::kConnected, .endpoint = endpoint_});
        break;
      case kRawMessage: {
        const auto bytes = input->TakeBytes(input->Take<uint16_t>());
        Message({bytes.begin(), bytes.end()});
        break;
      }
      case kMessage: {
        const auto body = input->TakeBytes(input->Take<uint16_t>());
        wire::Envelope envelope;
        Message(Repaired(body, &envelope));
        break;
      }
      case kTransferOk:
      case kTransferFailed:
        if (!transfers_.empty()) Complete(transfers_.begin(), command == kTransferOk);
        break;
      case kClose:
        Close(1 + input->Take<uint8_t>() % kEndpoints);
        break;
      case kAdvance:
        now_ += std::chrono::milliseconds(10) * input->Take<uint8_t>();
        server_->Tick(now_);
        break;
      default:
        for (int i = 0; i < 64 && !transfers_.empty(); ++i) Complete(transfers_.begin(), true);
    }
    Act();
    const StoreStats stats = server_->store().stats();
    KV_CHECK(stats.used_bytes <= stats.limit_bytes);
  }

  void End() {
    for (EndpointId endpoint = 1; endpoint <= kEndpoints; ++endpoint) Close(endpoint);
    Act();
    KV_CHECK(transfers_.empty());
    for (int i = 0; i < 3; ++i) {
      now_ += kMaxDeadline;
      server_->Tick(now_);
    }
    const StoreStats stats = server_->store().stats();
    KV_CHECK(stats.reservations == 0 && stats.pins == 0);
    KV_CHECK(server_->store().CheckInvariants().empty());
    server_->store().ForEach([](const BlockView& view) {
      const auto manifest = ParseManifest(view.manifest);
      KV_CHECK(manifest.ok() && manifest->key == view.key);
      KV_CHECK(VerifyPayload(*manifest, view.payload).ok());
    });
  }

 private:
  struct UnderWay {
    EndpointId endpoint = 0;
    Transfer transfer;
  };
  using Place = std::map<uint64_t, UnderWay>::iterator;

  void Give(Event event) { server_->OnEvent(event, now_); }
  void Message(Bytes bytes) {
    Give({.kind = Event::Kind::kMessage, .endpoint = endpoint_, .message = std::move(bytes)});
  }
  void Complete(Place place, bool ok) {
    const UnderWay done = place->second;
    transfers_.erase(place);
    Event event{.kind = Event::Kind::kTransferDone, .endpoint = done.endpoint};
    event.cookie = done.transfer.cookie;
    if (!ok) event.status = Unavailable("the fuzzer failed it");
    if (ok && done.transfer.op == Transfer::Op::kRead) {
      std::fill(done.transfer.local.begin(), done.transfer.local.end(), std::byte{});
    }
    Give(std::move(event));
    Act();
  }
  void Close(EndpointId endpoint) {
    while (true) {
      const auto of_it =
          std::find_if(transfers_.begin(), transfers_.end(),
                       [endpoint](const auto& entry) { return entry.second.endpoint == endpoint; });
      if (of_it == transfers_.end()) break;
      Complete(of_it, false);
    }
    Give({.kind = Event::Kind::kClosed, .endpoint = endpoint});
    Act();
    // What was asked for meanwhile finds the endpoint gone, as the pump would say.
    for (auto it = transfers_.begin(); it != transfers_.end();) {
      const auto here = it++;
      if (here->second.endpoint == endpoint) Complete(here, false);
    }
  }
  void Act() {
    std::vector<Action> actions;
    server_->TakeActions(&actions);
    for (Action& action : actions) {
      if (action.kind == Action::Kind::kSend) {
        wire::Envelope envelope;
        KV_CHECK(DecodeMessage(action.message, &envelope).ok());
      } else if (action.kind == Action::Kind::kTransfer) {
        const auto local = action.transfer.local;
        KV_CHECK(local.data() >= arena_.data() &&
                 RangeFits(static_cast<uint64_t>(local.data() - arena_.data()), local.size(),
                           arena_.size()));
        KV_CHECK(
            RangeFits(action.transfer.remote_offset, local.size(), action.transfer.remote.length));
        transfers_[++next_] = {action.endpoint, action.transfer};
      }
    }
  }

  Bytes arena_;
  std::unique_ptr<ShardServer> server_;
  TimePoint now_{std::chrono::seconds(1)};
  EndpointId endpoint_ = 1;
  std::map<uint64_t, UnderWay> transfers_;
  uint64_t next_ = 0;
};

wire::Envelope Request(uint64_t id) {
  wire::Envelope envelope;
  envelope.set_version(kProtocolVersion);
  envelope.set_epoch(kStaticEpoch);
  envelope.set_request_id(id);
  envelope.set_deadline_ms(1000);
  return envelope;
}

void AppendPut(uint8_t number, uint64_t id, Bytes* out) {
  const BlockManifest manifest = ZeroManifest(number);
  const Bytes encoded = EncodeManifest(manifest);
  wire::Envelope reserve = Request(id);
  reserve.mutable_reserve()->set_key(ToWire(manifest.key));
  if (number > 1) reserve.mutable_reserve()->set_parent(ToWire(SmallKey(number - 1)));
  reserve.mutable_reserve()->set_payload_bytes(manifest.payload_bytes());
  reserve.mutable_reserve()->set_manifest_bytes(encoded.size());
  ToWire(RemoteWindow{3, 4, manifest.payload_bytes()}, reserve.mutable_reserve()->mutable_window());
  AppendMessage(kMessage, reserve, out);
  wire::Envelope ranges = Request(id);
  for (const uint64_t value : {0, 64, 64, 64}) ranges.mutable_put_ranges()->add_ranges(value);
  AppendMessage(kMessage, ranges, out);
  out->push_back(std::byte{kTransfersOk});
  wire::Envelope seal = Request(id);
  seal.mutable_seal()->set_manifest(ToWire(encoded));
  AppendMessage(kMessage, seal, out);
}

}  // namespace

std::vector<Bytes> SeedInputs() {
  Bytes start = {std::byte{kConnect}, std::byte{0}};
  wire::Envelope hello = Request(1);
  hello.mutable_hello()->set_name("fuzz");
  AppendMessage(kMessage, hello, &start);
  Bytes puts = start;
  AppendPut(1, 2, &puts);
  AppendPut(2, 3, &puts);
  Bytes reads = puts;
  wire::Envelope lookup = Request(4);
  lookup.mutable_lookup()->set_keys(ToWire(SmallKey(1)) + ToWire(SmallKey(2)) +
                                    ToWire(SmallKey(3)));
  lookup.mutable_lookup()->set_lease_ms(500);
  AppendMessage(kMessage, lookup, &reads);
  wire::Envelope fetch = Request(5);
  ToWire(RemoteWindow{5, 6, 1024}, fetch.mutable_fetch()->mutable_window());
  ToWire(SelectAll(), fetch.mutable_fetch()->add_selections());
  for (uint8_t i = 1; i <= 3; ++i) {
    wire::FetchItem* item = fetch.mutable_fetch()->add_items();
    item->set_key(ToWire(SmallKey(i)));
    item->set_offset(128 * i);
    item->set_capacity(128);
    item->set_immediate_base(16 * i);
  }
  AppendMessage(kMessage, fetch, &reads);
  // The refinements of keys, and a set of layers.
  fetch.set_request_id(6);
  wire::Selection* refinements = fetch.mutable_fetch()->mutable_selections(0);
  refinements->set_first_cuts(1);
  refinements->set_layer_end(3);
  refinements->set_layers("\5");
  AppendMessage(kMessage, fetch, &reads);
  reads.push_back(std::byte{kTransferOk});
  reads.push_back(std::byte{kTransferFailed});
  Bytes calls = puts;
  wire::Envelope pin = Request(6);
  pin.mutable_pin()->set_key(ToWire(SmallKey(1)));
  pin.mutable_pin()->set_duration_ms(1000);
  AppendMessage(kMessage, pin, &calls);
  wire::Envelope report = Request(7);
  report.mutable_report_corrupt()->set_key(ToWire(SmallKey(2)));
  AppendMessage(kMessage, report, &calls);
  wire::Envelope stats = Request(8);
  stats.mutable_stats();
  AppendMessage(kMessage, stats, &calls);
  wire::Envelope abort = Request(3);
  abort.mutable_abort();
  AppendMessage(kMessage, abort, &calls);
  calls.push_back(std::byte{kAdvance});
  calls.push_back(std::byte{200});
  wire::Envelope goodbye = Request(9);
  goodbye.mutable_goodbye();
  AppendMessage(kMessage, goodbye, &calls);
  return {start, puts, reads, calls};
}

}  // namespace kvant::fuzz

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  using namespace kvant::fuzz;
  SilenceProtobuf();
  FuzzInput input(data, size);
  Session session;
  for (size_t i = 0; i < kMostCommands && !input.empty(); ++i) {
    session.Do(static_cast<Command>(input.Take<uint8_t>() % kCommands), &input);
  }
  session.End();
  return 0;
}
