// Client to shard: puts, from the reservation to the seal.
#include <algorithm>
#include <utility>

#include "base/bytes.h"
#include "base/check.h"
#include "cache_service/cache_client_impl.h"

namespace kvant {
namespace {
using Kind = ClientEvent::Kind;
}  // namespace

OpId CacheClient::Impl::BeginPut(const PutRequest& request, TimePoint now) {
  const OpId op = next_op_++;
  PutOp& put = puts_[op];
  put.request = request;
  put.shard = map_.Owner(request.run);
  put.request_id = NewRequest(Request::Kind::kPut, op, put.shard);
  KV_CHECK(request.buffer != nullptr && *request.buffer);
  if (request.key.IsZero() || request.payload_bytes == 0 || request.manifest_rows == 0 ||
      request.manifest_rows > kMaxManifestRows || request.payload_bytes > request.buffer->size()) {
    EndPut(op,
           InvalidArgument("put of block {}: a payload of {} bytes in a buffer of {}, {} rows, is "
                           "not possible",
                           request.key.ShortHex(), request.payload_bytes, request.buffer->size(),
                           request.manifest_rows),
           false, false, now);
    return op;
  }
  Result<ExposedWindow> window =
      Expose(*request.buffer, put.shard, request.payload_bytes, Access::kRemoteRead);
  if (!window.ok()) {
    EndPut(op, window.status(), false, false, now);
    return op;
  }
  put.window = *std::move(window);
  wire::Envelope ask = Ask(put.request_id, request.deadline, now);
  wire::Reserve* reserve = ask.mutable_reserve();
  reserve->set_key(ToWire(request.key));
  if (!request.parent.IsZero()) reserve->set_parent(ToWire(request.parent));
  reserve->set_payload_bytes(request.payload_bytes);
  reserve->set_manifest_bytes(MaxManifestBytes(request.manifest_rows));
  ToWire(put.window.remote(), reserve->mutable_window());
  Send(put.shard, ask);
  return op;
}

void CacheClient::Impl::PutReady(OpId op, uint64_t payload_offset, uint64_t length, TimePoint now) {
  const auto found = puts_.find(op);
  if (found == puts_.end() || found->second.sealing) return;
  PutOp& put = found->second;
  KV_CHECK(RangeFits(payload_offset, length, put.request.payload_bytes));
  auto& ready = put.ready;
  if (!ready.empty() && ready.back().first + ready.back().second == payload_offset) {
    ready.back().second += length;
  } else {
    ready.emplace_back(payload_offset, length);
  }
  if (put.reserved) SendReady(&put, now);
}

void CacheClient::Impl::SendReady(PutOp* put, TimePoint now) {
  size_t next = 0;
  while (next < put->ready.size()) {
    wire::Envelope ask = Ask(put->request_id, put->request.deadline, now);
    const size_t end = std::min(put->ready.size(), next + kMaxPutRanges);
    for (; next < end; ++next) {
      ask.mutable_put_ranges()->add_ranges(put->ready[next].first);
      ask.mutable_put_ranges()->add_ranges(put->ready[next].second);
    }
    Send(put->shard, ask);
  }
  put->ready.clear();
}

void CacheClient::Impl::SealPut(OpId op, const BlockManifest& manifest, TimePoint now) {
  const auto found = puts_.find(op);
  if (found == puts_.end() || found->second.sealing) return;
  PutOp& put = found->second;
  Status status = manifest.Validate();
  if (status.ok() &&
      (manifest.key != put.request.key || manifest.payload_bytes() != put.request.payload_bytes ||
       manifest.rows.size() > put.request.manifest_rows)) {
    status = InvalidArgument(
        "put of block {}: {} bytes in at most {} rows were announced, the "
        "manifest is of block {} with {} bytes in {} rows",
        put.request.key.ShortHex(), put.request.payload_bytes, put.request.manifest_rows,
        manifest.key.ShortHex(), manifest.payload_bytes(), manifest.rows.size());
  }
  if (!status.ok()) return EndPut(op, status, false, true, now);
  put.sealing = true;
  // Without waiting for the reservation: the shard takes Reserve first, and it answers for both
  // when it refuses.
  SendSeal(put, manifest, now);
}

void CacheClient::Impl::SendSeal(const PutOp& put, const BlockManifest& manifest, TimePoint now) {
  wire::Envelope ask = Ask(put.request_id, put.request.deadline, now);
  ask.mutable_seal()->set_manifest(ToWire(EncodeManifest(manifest)));
  Send(put.shard, ask);
}

void CacheClient::Impl::OnPutReply(const Request& request, const wire::PutReply& reply,
                                   TimePoint now) {
  PutOp& put = puts_.at(request.op);
  switch (reply.phase()) {
    case wire::PutReply::RESERVED:
      if (put.reserved) return;
      put.reserved = true;
      if (!put.sealing) SendReady(&put, now);
      return;
    case wire::PutReply::ALREADY_THERE:
    case wire::PutReply::IN_PROGRESS:
      // Only the answer to Reserve can say so; a late copy of one that was overtaken is ignored.
      if (put.reserved) return;
      return EndPut(request.op, OkStatus(), true, false, now);
    case wire::PutReply::SEALED:
      if (put.sealing) EndPut(request.op, OkStatus(), false, false, now);
      return;
    default: {
      const Status status = FromWire(reply.status());
      EndPut(request.op, status.ok() ? Unavailable("the shard gave the put up") : status, false,
             false, now);
    }
  }
}

void CacheClient::Impl::EndPut(OpId op, const Status& status, bool already_there, bool tell_shard,
                               TimePoint now) {
  const auto found = puts_.find(op);
  PutOp& put = found->second;
  if (tell_shard) {
    wire::Envelope ask = Ask(put.request_id, put.request.deadline, now);
    ask.mutable_abort();
    Send(put.shard, ask);
  }
  if (!status.ok()) {
    ++stats_.puts_failed;
  } else if (already_there) {
    ++stats_.puts_already_there;
  } else {
    ++stats_.puts_sealed;
    stats_.payload_bytes_put += put.request.payload_bytes;
  }
  requests_.erase(put.request_id);
  puts_.erase(found);
  Report(Kind::kPutDone, op, status).already_there = already_there;
}

}  // namespace kvant
