// Shard to client: fetches, from the request to the last verified layer.
#include <algorithm>
#include <utility>

#include "base/bytes.h"
#include "base/check.h"
#include "cache_service/cache_client_impl.h"

namespace kvant {
namespace {
using Kind = ClientEvent::Kind;
}  // namespace

OpId CacheClient::Impl::Fetch(FetchRequest request, TimePoint now) {
  const OpId op = next_op_++;
  FetchOp& fetch = fetches_[op];
  fetch.request = std::move(request);
  const std::vector<FetchItem>& items = fetch.request.items;
  KV_CHECK(fetch.request.buffer != nullptr && *fetch.request.buffer);
  fetch.ended.assign(items.size(), false);
  fetch.open = items.size();
  fetch.blocks.resize(items.size());
  std::map<size_t, std::vector<size_t>> by_shard;
  for (size_t i = 0; i < items.size(); ++i) {
    const Selection& selection = items[i].selection;
    Status possible = selection.Validate();
    if (!RangeFits(items[i].offset, items[i].capacity, fetch.request.buffer->size()) ||
        items[i].key.IsZero()) {
      possible = InvalidArgument("fetch: item {}: {} bytes at {} of {} are not possible", i,
                                 items[i].capacity, items[i].offset, fetch.request.buffer->size());
    }
    if (!possible.ok()) {
      EndItem(&fetch, op, nullptr, i, possible, false);
      continue;
    }
    fetch.blocks[i] = ArrivingBlock(items[i].key, selection, items[i].capacity);
    by_shard[map_.Owner(items[i].run)].push_back(i);
  }
  for (auto& [shard, indices] : by_shard) {
    for (size_t begin = 0; begin < indices.size(); begin += kMaxFetchItems) {
      const size_t end = std::min(indices.size(), begin + kMaxFetchItems);
      StartPart(op, &fetch, shard,
                {indices.begin() + static_cast<ptrdiff_t>(begin),
                 indices.begin() + static_cast<ptrdiff_t>(end)},
                now);
    }
  }
  EndFetchIfDone(op);
  return op;
}

void CacheClient::Impl::StartPart(OpId op, FetchOp* fetch, size_t shard, std::vector<size_t> items,
                                  TimePoint now) {
  const Lease& buffer = *fetch->request.buffer;
  Result<ExposedWindow> window = Expose(buffer, shard, buffer.size(), Access::kRemoteWrite);
  if (!window.ok()) {
    for (const size_t item : items) EndItem(fetch, op, nullptr, item, window.status(), false);
    return;
  }
  const uint64_t id = NewRequest(Request::Kind::kFetch, op, shard);
  FetchPart& part = fetch->parts[id];
  part.window = *std::move(window);
  part.open = items.size();
  part.endpoint = endpoints_[shard];
  windows_[{part.endpoint, part.window.remote().id}] = id;
  wire::Envelope ask = Ask(id, fetch->request.deadline, now);
  wire::Fetch* message = ask.mutable_fetch();
  ToWire(part.window.remote(), message->mutable_window());
  uint32_t immediate = 0;
  // A request has few selections: one for each way in which what a client holds falls short.
  std::vector<const Selection*> said;
  for (const size_t index : items) {
    const FetchItem& item = fetch->request.items[index];
    const auto same = std::find_if(said.begin(), said.end(), [&](const Selection* selection) {
      return *selection == item.selection;
    });
    wire::FetchItem* wanted = message->add_items();
    wanted->set_key(ToWire(item.key));
    wanted->set_selection(static_cast<uint32_t>(same - said.begin()));
    if (same == said.end()) {
      ToWire(item.selection, message->add_selections());
      said.push_back(&item.selection);
    }
    wanted->set_offset(item.offset);
    wanted->set_capacity(item.capacity);
    wanted->set_immediate_base(immediate);
    part.immediates.push_back(immediate);
    immediate += static_cast<uint32_t>(fetch->blocks[index].layers());
  }
  part.items = std::move(items);
  Send(shard, ask);
}

void CacheClient::Impl::OnFetchReply(uint64_t request_id, const Request& request,
                                     const wire::FetchReply& reply, TimePoint now) {
  FetchOp& fetch = fetches_.at(request.op);
  const Status status = FromWire(reply.status());
  if (!status.ok()) {
    EndPart(&fetch, request.op, request_id, status);
    return EndFetchIfDone(request.op);
  }
  FetchPart& part = fetch.parts.at(request_id);
  if (!RangeFits(reply.first_item(), static_cast<uint64_t>(reply.items_size()),
                 part.items.size())) {
    ++stats_.malformed_messages;
    return;
  }
  for (int i = 0; i < reply.items_size(); ++i) {
    const size_t item = part.items[reply.first_item() + static_cast<size_t>(i)];
    OnFetchItem(&fetch, request.op, &part, item, reply.items(i), now);
  }
  EndFetchIfDone(request.op);
}

void CacheClient::Impl::OnFetchItem(FetchOp* fetch, OpId op, FetchPart* part, size_t item,
                                    const wire::FetchItemReply& reply, TimePoint now) {
  ArrivingBlock& block = fetch->blocks[item];
  if (fetch->ended[item] || block.manifest() != nullptr) return;
  if (reply.code() != 0) {
    wire::Status refused;
    refused.set_code(reply.code());
    refused.set_message(fmt::format("the shard refused block {}", block.key().ShortHex()));
    return EndItem(fetch, op, part, item, FromWire(refused), false);
  }
  if (!reply.present()) return EndItem(fetch, op, part, item, OkStatus(), false);
  const Status status = block.SetManifest(AsBytes(reply.manifest()));
  if (!status.ok()) {
    if (status.code() == StatusCode::kDataLoss) {
      ++stats_.data_loss;
      ReportCorrupt(block.key(), fetch->request.items[item].run, now);
    }
    return EndItem(fetch, op, part, item, status, false);
  }
  ReportLayers(fetch, op, part, item, now);
}

bool CacheClient::Impl::OnWritten(const Event& event, TimePoint now) {
  const auto window = windows_.find({event.endpoint, event.window});
  if (window == windows_.end()) return false;
  const Request request = requests_.at(window->second);
  FetchOp& fetch = fetches_.at(request.op);
  FetchPart& part = fetch.parts.at(window->second);
  const auto above =
      std::upper_bound(part.immediates.begin(), part.immediates.end(), event.immediate);
  if (above == part.immediates.begin()) return true;
  const auto index = static_cast<size_t>(above - part.immediates.begin()) - 1;
  const size_t item = part.items[index];
  if (fetch.ended[item] ||
      !fetch.blocks[item].SetWritten(event.immediate - part.immediates[index])) {
    return true;
  }
  ReportLayers(&fetch, request.op, &part, item, now);
  EndFetchIfDone(request.op);
  return true;
}

void CacheClient::Impl::ReportLayers(FetchOp* fetch, OpId op, FetchPart* part, size_t item,
                                     TimePoint now) {
  ArrivingBlock& block = fetch->blocks[item];
  const FetchItem& wanted = fetch->request.items[item];
  uint16_t layer = 0;
  while (block.TakeComplete(&layer)) {
    if (options_.verify) {
      uint64_t bytes = 0;
      const auto destination =
          fetch->request.buffer->bytes().subspan(wanted.offset, wanted.capacity);
      const Status status = block.Verify(layer, destination, &bytes);
      if (!status.ok()) {
        ++stats_.data_loss;
        ReportCorrupt(wanted.key, wanted.run, now);
        return EndItem(fetch, op, part, item, status, false);
      }
      stats_.payload_bytes_fetched += bytes;
    }
    ClientEvent& event = Report(Kind::kLayerArrived, op, OkStatus());
    event.item = item;
    event.layer = layer;
    event.present = true;
    event.manifest = block.manifest();
  }
  if (block.complete()) EndItem(fetch, op, part, item, OkStatus(), true);
}

void CacheClient::Impl::EndItem(FetchOp* fetch, OpId op, FetchPart* part, size_t item,
                                const Status& status, bool present) {
  if (fetch->ended[item]) return;
  fetch->ended[item] = true;
  --fetch->open;
  if (part != nullptr) --part->open;
  if (!status.ok()) {
    ++stats_.items_failed;
    if (fetch->status.ok()) fetch->status = status;
  } else {
    ++(present ? stats_.items_fetched : stats_.items_absent);
  }
  ClientEvent& event = Report(Kind::kItemDone, op, status);
  event.item = item;
  event.present = present;
  event.manifest = fetch->blocks[item].manifest();
}

void CacheClient::Impl::EndPart(FetchOp* fetch, OpId op, uint64_t request_id,
                                const Status& status) {
  FetchPart& part = fetch->parts.at(request_id);
  for (const size_t item : part.items) EndItem(fetch, op, &part, item, status, false);
}

void CacheClient::Impl::EndFetchIfDone(OpId op) {
  FetchOp& fetch = fetches_.at(op);
  // A shard that has nothing more to write loses its window at once.
  for (auto part = fetch.parts.begin(); part != fetch.parts.end();) {
    if (part->second.open > 0) {
      ++part;
      continue;
    }
    windows_.erase({part->second.endpoint, part->second.window.remote().id});
    requests_.erase(part->first);
    part = fetch.parts.erase(part);
  }
  if (fetch.open > 0) return;
  Report(Kind::kFetchDone, op, fetch.status);
  fetches_.erase(op);
}

void CacheClient::Impl::EndFetch(OpId op, const Status& status) {
  FetchOp& fetch = fetches_.at(op);
  std::vector<uint64_t> ids;
  for (const auto& [id, part] : fetch.parts) ids.push_back(id);
  for (const uint64_t id : ids) EndPart(&fetch, op, id, status);
  EndFetchIfDone(op);
}

}  // namespace kvant
