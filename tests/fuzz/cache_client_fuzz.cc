// Any replies into a client with operations under way: each operation ends exactly once, by its
// deadline, and what is reported as arrived matches its checksums.
#include <map>
#include <set>

#include "base/check.h"
#include "cache_service/cache_client.h"
#include "tests/fuzz/service_session.h"
#include "transport/arena.h"
#include "transport/loopback.h"

namespace kvant::fuzz {
namespace {

constexpr size_t kMostCommands = 200;
constexpr std::chrono::seconds kDeadline{2};

enum Command : uint8_t {
  kLookup,
  kFetch,
  kPut,
  kPin,
  kStats,
  kRawMessage,
  kReply,  // a message with the id of one of our requests
  kWrite,  // zeros into the window of a fetch, and word of it
  kClose,
  kBind,
  kAdvance,
  kCancel,
  kCommands,
};

// Single-owner.
class Session {
 public:
  Session() : server_(hub_.MakeTransport()), transport_(hub_.MakeTransport()) {
    KV_CHECK(server_->Listen("loopback:shard").ok());
    const auto endpoint = transport_->Connect("loopback:shard", std::chrono::seconds(1));
    KV_CHECK(endpoint.ok());
    endpoint_ = (*endpoint)->id();
    std::vector<Event> events;
    for (int i = 0; i < 4; ++i) {
      server_->Poll(&events);
      transport_->Poll(&events);
    }
    arena_ = *RegisteredArena::Create(transport_.get(),
                                      {.bytes = 64 << 10, .huge_pages = false, .max_leases = 256});
    client_ = std::make_unique<CacheClient>(*ShardMap::Make(kStaticEpoch, {{"loopback:shard"}}),
                                            arena_.get());
    client_->BindShard(0, endpoint_, now_);
    Step();
  }
  ~Session() {
    client_.reset();
    buffers_.clear();
    arena_.reset();
  }

  void Do(Command command, FuzzInput* input) {
    const uint8_t number = 1 + input->Take<uint8_t>() % 4;
    switch (command) {
      case kLookup: {
        const BlockKey chain[] = {SmallKey(number), SmallKey(number + 1)};
        Opened(client_->Lookup(chain, std::chrono::milliseconds(number), now_ + kDeadline, now_));
        break;
      }
      case kFetch:
        Fetch(number);
        break;
      case kPut:
        Put(number, input->Take<uint8_t>());
        break;
      case kPin:
        Opened(client_->Pin(SmallKey(number), 1, std::chrono::seconds(1), now_ + kDeadline, now_));
        break;
      case kStats:
        Opened(client_->Stats(0, now_ + kDeadline, now_));
        break;
      case kRawMessage: {
        const auto bytes = input->TakeBytes(input->Take<uint16_t>());
        Message({bytes.begin(), bytes.end()});
        break;
      }
      case kReply: {
        const auto body = input->TakeBytes(input->Take<uint16_t>());
        wire::Envelope envelope;
        if (Repaired(body, &envelope).empty()) break;
        if (!requests_.empty()) envelope.set_request_id(requests_[number % requests_.size()]);
        Message(EncodeMessage(envelope));
        break;
      }
      case kWrite: {
        Event event{.kind = Event::Kind::kWritten, .endpoint = endpoint_};
        event.immediate = input->Take<uint16_t>();
        event.window = windows_.empty() ? 1 : windows_[number % windows_.size()];
        Give(event);
        break;
      }
      case kClose:
        Give({.kind = Event::Kind::kClosed, .endpoint = endpoint_});
        break;
      case kBind:
        if (!client_->Reachable(0)) client_->BindShard(0, endpoint_, now_);
        break;
      case kAdvance:
        now_ += std::chrono::milliseconds(10) * input->Take<uint8_t>();
        client_->Tick(now_);
        break;
      default:
        if (!open_.empty()) client_->Cancel(*open_.begin(), now_);
    }
    Step();
  }

  void End() {
    now_ += kDeadline;
    client_->Tick(now_);
    Step();
    client_->Tick(now_);
    Step();
    KV_CHECK(open_.empty() && client_->open_operations() == 0);
  }

 private:
  void Opened(OpId op) { KV_CHECK(open_.insert(op).second); }
  void Give(const Event& event) { client_->OnEvent(event, now_); }
  void Message(Bytes bytes) {
    Give({.kind = Event::Kind::kMessage, .endpoint = endpoint_, .message = std::move(bytes)});
  }
  void Fetch(uint8_t number) {
    auto lease = arena_->Lend(512);
    if (!lease.ok()) return;
    FetchRequest request;
    request.buffer = std::make_shared<Lease>(std::move(*lease));
    std::ranges::fill(request.buffer->bytes(), std::byte{});
    Selection keys_only = SelectAll();
    if (number % 2 == 0) keys_only.cuts[1] = 0;
    if (number % 4 == 1) keys_only.first_cuts[0] = 1;
    if (number % 8 >= 4) keys_only.SetLayers({true, false, true});
    for (uint8_t i = 0; i < 2; ++i) {
      request.items.push_back(
          {SmallKey(static_cast<uint8_t>(number + i)), 1, keys_only, uint64_t{256} * i, 256});
    }
    request.deadline = now_ + kDeadline;
    const auto buffer = request.buffer;
    const OpId op = client_->Fetch(std::move(request), now_);
    Opened(op);
    buffers_[op] = buffer;
    selections_[op] = keys_only;
  }
  void Put(uint8_t number, uint8_t how) {
    auto lease = arena_->Lend(128);
    if (!lease.ok()) return;
    const BlockManifest manifest = ZeroManifest(number);
    PutRequest request;
    request.key = manifest.key;
    request.run = 1;
    request.payload_bytes = manifest.payload_bytes();
    request.manifest_rows = manifest.rows.size();
    request.buffer = std::make_shared<Lease>(std::move(*lease));
    request.deadline = now_ + kDeadline;
    const OpId op = client_->BeginPut(request, now_);
    Opened(op);
    if (how % 2 == 0) client_->PutReady(op, 0, 64, now_);
    if (how % 4 < 2) client_->PutReady(op, 64, 64, now_);
    if (how % 8 < 4) client_->SealPut(op, manifest, now_);
  }
  void Step() {
    std::vector<Action> actions;
    client_->TakeActions(&actions);
    for (const Action& action : actions) {
      // The server alone moves bytes.
      KV_CHECK(action.kind != Action::Kind::kTransfer);
      if (action.kind != Action::Kind::kSend) continue;
      wire::Envelope envelope;
      KV_CHECK(DecodeMessage(action.message, &envelope).ok());
      requests_.push_back(envelope.request_id());
      if (envelope.has_fetch()) windows_.push_back(envelope.fetch().window().id());
    }
    std::vector<ClientEvent> events;
    client_->TakeEvents(&events);
    for (const ClientEvent& event : events) OnEvent(event);
    std::vector<Event> ignored;
    transport_->Poll(&ignored);
  }
  void OnEvent(const ClientEvent& event) {
    KV_CHECK(open_.contains(event.op));
    if (event.kind == ClientEvent::Kind::kLayerArrived) {
      KV_CHECK(event.manifest != nullptr);
      const auto place = buffers_[event.op]->bytes().subspan(256 * event.item, 256);
      KV_CHECK(VerifyPackedLayer(*event.manifest, selections_[event.op], event.layer, place).ok());
      return;
    }
    if (event.kind == ClientEvent::Kind::kItemDone) return;
    open_.erase(event.op);
    buffers_.erase(event.op);
    selections_.erase(event.op);
  }

  LoopbackHub hub_;
  std::unique_ptr<Transport> server_;
  std::unique_ptr<Transport> transport_;
  EndpointId endpoint_ = 0;
  std::unique_ptr<RegisteredArena> arena_;
  std::unique_ptr<CacheClient> client_;
  TimePoint now_{std::chrono::seconds(1)};
  std::set<OpId> open_;
  std::map<OpId, std::shared_ptr<Lease>> buffers_;
  std::map<OpId, Selection> selections_;
  std::vector<uint64_t> requests_;
  std::vector<uint64_t> windows_;
};

wire::Envelope Reply() {
  wire::Envelope envelope;
  envelope.set_version(kProtocolVersion);
  envelope.set_epoch(kStaticEpoch);
  envelope.set_request_id(1);
  return envelope;
}

void Append(std::initializer_list<uint8_t> commands, Bytes* out) {
  for (const uint8_t byte : commands) out->push_back(static_cast<std::byte>(byte));
}

// AppendMessage puts the length behind the command; here the number of the request comes between.
void AppendReply(uint8_t number, const wire::Envelope& envelope, Bytes* out) {
  AppendMessage(kReply, envelope, out);
  const std::string body = envelope.SerializeAsString();
  out->insert(out->end() - static_cast<ptrdiff_t>(body.size() + 2), std::byte{number});
}

}  // namespace

std::vector<Bytes> SeedInputs() {
  std::vector<Bytes> seeds;
  for (uint8_t request = 0; request < 4; ++request) {
    Bytes lookup;
    Append({kLookup, 0}, &lookup);
    wire::Envelope found = Reply();
    found.mutable_lookup_reply()->mutable_status();
    found.mutable_lookup_reply()->set_states(std::string("\2\0", 2));
    found.mutable_lookup_reply()->add_cuts(9);
    found.mutable_lookup_reply()->add_payload_bytes(128);
    // Seeds of both kinds: 9 is one cut of two parts, 18 two.
    if (request % 2 != 0) {
      found.mutable_lookup_reply()->set_cuts(0, 18);
      found.mutable_lookup_reply()->add_cut_ends(64);
    }
    AppendReply(request, found, &lookup);
    seeds.push_back(lookup);

    Bytes fetch;
    Append({kFetch, 0}, &fetch);
    wire::Envelope items = Reply();
    items.mutable_fetch_reply()->mutable_status();
    for (uint8_t i = 1; i <= 2; ++i) {
      wire::FetchItemReply* item = items.mutable_fetch_reply()->add_items();
      item->set_present(true);
      item->set_manifest(ToWire(EncodeManifest(ZeroManifest(i))));
    }
    AppendReply(request, items, &fetch);
    for (uint8_t i = 0; i < 4; ++i) Append({kWrite, 0, i, 0}, &fetch);
    wire::Envelope failed = Reply();
    failed.mutable_fetch_item_failed()->set_item(1);
    failed.mutable_fetch_item_failed()->mutable_status()->set_code(2);
    AppendReply(request, failed, &fetch);
    seeds.push_back(fetch);

    Bytes put;
    Append({kPut, 0, 0}, &put);
    for (const auto phase : {wire::PutReply::RESERVED, wire::PutReply::SEALED}) {
      wire::Envelope reply = Reply();
      reply.mutable_put_reply()->set_phase(phase);
      AppendReply(request, reply, &put);
    }
    Append({kCancel, 0, kClose, 0, kBind, 0, kAdvance, 0, 100}, &put);
    seeds.push_back(put);

    Bytes calls;
    Append({kPin, 0, kStats, 0}, &calls);
    wire::Envelope done = Reply();
    done.mutable_done()->mutable_status()->set_code(4);
    AppendReply(request, done, &calls);
    wire::Envelope stats = Reply();
    stats.mutable_stats_reply()->set_json("{}");
    AppendReply(request, stats, &calls);
    seeds.push_back(calls);
  }
  return seeds;
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
