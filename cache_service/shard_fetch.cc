// Shard to client: fetches, planned layer by layer and written into the client's window.
#include <algorithm>

#include "base/bytes.h"
#include "base/check.h"
#include "cache_service/shard_server_impl.h"

namespace kvant {
namespace {
// Room for the manifests of one reply message; the rest goes into the next one.
constexpr size_t kReplyBytes = size_t{256} << 10;
}  // namespace

Status ShardServer::Impl::CheckFetch(const Session& session, const wire::Fetch& fetch) const {
  if (fetch.items_size() == 0 || static_cast<size_t>(fetch.items_size()) > kMaxFetchItems) {
    return InvalidArgument("fetch: {} items, 1 to {} are possible", fetch.items_size(),
                           kMaxFetchItems);
  }
  if (session.fetches.size() >= options_.limits.max_requests_per_client) {
    return BusyStatus("fetches in progress", options_.limits.max_requests_per_client);
  }
  return OkStatus();
}

void ShardServer::Impl::PlanItem(EndpointId endpoint, Session* session, const wire::Fetch& request,
                                 uint32_t index, Fetch* fetch, wire::FetchItemReply* reply) {
  const auto refuse = [&](StatusCode code) { reply->set_code(static_cast<uint32_t>(code)); };
  const wire::FetchItem& wanted = request.items(static_cast<int>(index));
  Item& item = fetch->items[index];
  item.failed = true;
  const Result<BlockKey> key = KeyFromWire(wanted.key());
  if (!key.ok() || wanted.selection() >= static_cast<uint32_t>(request.selections_size()) ||
      !RangeFits(wanted.offset(), wanted.capacity(), fetch->window.length)) {
    return refuse(StatusCode::kInvalidArgument);
  }
  const Result<Selection> selection =
      FromWire(request.selections(static_cast<int>(wanted.selection())));
  if (!selection.ok()) return refuse(StatusCode::kInvalidArgument);
  const std::optional<BlockView> view = store_.View(*key);
  if (!view) {
    ++stats_.misses;
    return;
  }
  const Result<BlockManifest> manifest = ParseManifest(view->manifest);
  if (!manifest.ok()) {
    ++stats_.data_loss;
    static_cast<void>(store_.Reverify(*key));
    return refuse(StatusCode::kDataLoss);
  }
  const std::vector<SelectedRange> ranges = SelectRanges(*manifest, *selection);
  const uint64_t bytes = ranges.empty() ? 0 : ranges.back().packed_offset + ranges.back().length;
  if (bytes > wanted.capacity()) return refuse(StatusCode::kInvalidArgument);
  if (queued_ranges_ + ranges.size() > options_.limits.max_queued_ranges) {
    return refuse(StatusCode::kResourceExhausted);
  }
  const Result<PinId> pin = store_.Pin(*key, endpoint, TimePoint::max());
  if (!pin.ok()) return refuse(pin.status().code());
  DropLease(session, *key);
  store_.Touch(*key);
  ++stats_.hits;
  item.failed = false;
  item.payload = view->payload;
  item.offset = wanted.offset();
  item.immediate_base = wanted.immediate_base();
  item.layer_begin = selection->layer_begin;
  item.remaining = ranges.size();
  if (ranges.empty()) {
    store_.Unpin(*pin);
  } else {
    item.pin = *pin;
  }
  queued_ranges_ += ranges.size();
  for (const SelectedRange& range : ranges) fetch->plan.push_back({index, range});
  reply->set_present(true);
  reply->set_manifest(ToWire(view->manifest));
}

void ShardServer::Impl::OnFetch(EndpointId endpoint, Session* session,
                                const wire::Envelope& request, TimePoint now) {
  const uint64_t id = request.request_id();
  // Ids grow, so the wire repeated this one or held it back. To serve a fetch again would write
  // over bytes that its client has verified already.
  if (id <= session->newest_fetch) return;
  session->newest_fetch = id;
  const Status status = CheckFetch(*session, request.fetch());
  if (!status.ok()) {
    if (status.code() == StatusCode::kInvalidArgument) ++stats_.malformed_messages;
    return SendDone(endpoint, id, status);
  }
  Fetch& fetch = session->fetches[id];
  fetch.request_id = id;
  fetch.window = FromWire(request.fetch().window());
  fetch.deadline = now + CappedMs(request.deadline_ms(), kMaxDeadline);
  const auto count = static_cast<uint32_t>(request.fetch().items_size());
  fetch.items.resize(count);
  wire::Envelope answer = Answer(id);
  size_t reply_bytes = 0;
  for (uint32_t i = 0; i < count; ++i) {
    if (reply_bytes > kReplyBytes) {
      Send(endpoint, answer);
      answer = Answer(id);
      answer.mutable_fetch_reply()->set_first_item(i);
      reply_bytes = 0;
    }
    wire::FetchItemReply* item = answer.mutable_fetch_reply()->add_items();
    PlanItem(endpoint, session, request.fetch(), i, &fetch, item);
    reply_bytes += item->manifest().size() + 16;
  }
  Send(endpoint, answer);
  std::stable_sort(fetch.plan.begin(), fetch.plan.end(), [](const Planned& a, const Planned& b) {
    return a.range.layer < b.range.layer;
  });
  if (fetch.plan.empty()) {
    session->fetches.erase(id);
    return;
  }
  session->fetch_order.push_back(id);
  Advance(endpoint, session);
}

bool ShardServer::Impl::SubmitWrite(EndpointId endpoint, Session* session) {
  while (!session->fetch_order.empty()) {
    const uint64_t id = session->fetch_order.front();
    const auto found = session->fetches.find(id);
    if (found == session->fetches.end() || found->second.next == found->second.plan.size()) {
      session->fetch_order.pop_front();
      continue;
    }
    Fetch& fetch = found->second;
    const Planned& planned = fetch.plan[fetch.next++];
    --queued_ranges_;
    const Item& item = fetch.items[planned.item];
    if (item.failed) {
      ItemStep(&fetch, planned.item);
      EndFetchIfDone(session, id);
      continue;
    }
    Transfer transfer;
    transfer.op = Transfer::Op::kWrite;
    transfer.local = item.payload.subspan(planned.range.payload_offset, planned.range.length);
    transfer.remote = fetch.window;
    transfer.remote_offset = item.offset + planned.range.packed_offset;
    if (planned.range.last_of_layer) {
      transfer.immediate = item.immediate_base + (planned.range.layer - item.layer_begin);
    }
    ++fetch.outstanding;
    Submit(endpoint, session, transfer, {endpoint, id, planned.item, 0, planned.range.length});
    return true;
  }
  return false;
}

void ShardServer::Impl::OnWriteDone(const InFlight& done, Session* session, const Status& status) {
  if (status.ok()) stats_.payload_bytes_served += done.bytes;
  Fetch& fetch = session->fetches.at(done.request_id);
  --fetch.outstanding;
  if (!status.ok()) FailItem(done.endpoint, &fetch, done.item, status);
  ItemStep(&fetch, done.item);
  EndFetchIfDone(session, done.request_id);
}

void ShardServer::Impl::FailItem(EndpointId endpoint, Fetch* fetch, uint32_t item,
                                 const Status& status) {
  if (fetch->items[item].failed) return;
  fetch->items[item].failed = true;
  wire::Envelope envelope = Answer(fetch->request_id);
  envelope.mutable_fetch_item_failed()->set_item(item);
  ToWire(status, envelope.mutable_fetch_item_failed()->mutable_status());
  Send(endpoint, envelope);
}

void ShardServer::Impl::ItemStep(Fetch* fetch, uint32_t item) {
  Item& stepped = fetch->items[item];
  KV_CHECK(stepped.remaining > 0);
  if (--stepped.remaining == 0) store_.Unpin(stepped.pin);
}

void ShardServer::Impl::EndFetchIfDone(Session* session, uint64_t request_id) {
  const auto found = session->fetches.find(request_id);
  if (found->second.outstanding == 0 && found->second.next == found->second.plan.size()) {
    session->fetches.erase(found);
  }
}

}  // namespace kvant
