// Client to shard: puts, read from the client's window into a reservation and sealed.
#include "base/bytes.h"
#include "cache_service/shard_server_impl.h"

namespace kvant {
namespace {
// Separate stretches that one put may announce.
constexpr size_t kMaxPutPieces = 65536;
}  // namespace

void ShardServer::Impl::OnReserve(EndpointId endpoint, Session* session,
                                  const wire::Envelope& request, TimePoint now) {
  const uint64_t id = request.request_id();
  const wire::Reserve& reserve = request.reserve();
  if (session->puts.contains(id)) return SendPut(endpoint, id, wire::PutReply::RESERVED);
  const auto fail = [&](const Status& status) {
    if (status.code() == StatusCode::kInvalidArgument) ++stats_.malformed_messages;
    SendPut(endpoint, id, wire::PutReply::FAILED, status);
  };
  if (session->puts.size() >= options_.limits.max_puts_per_client) {
    return fail(BusyStatus("open puts", options_.limits.max_puts_per_client));
  }
  ReserveRequest wanted;
  const Result<BlockKey> key = KeyFromWire(reserve.key());
  if (!key.ok()) return fail(key.status());
  wanted.key = *key;
  if (!reserve.parent().empty()) {
    const Result<BlockKey> parent = KeyFromWire(reserve.parent());
    if (!parent.ok()) return fail(parent.status());
    wanted.parent = *parent;
  }
  wanted.payload_bytes = reserve.payload_bytes();
  wanted.manifest_bytes = reserve.manifest_bytes();
  wanted.owner = endpoint;
  wanted.deadline = now + CappedMs(request.deadline_ms(), kMaxDeadline);
  const RemoteWindow window = FromWire(reserve.window());
  if (window.length < wanted.payload_bytes) {
    return fail(InvalidArgument("reserve: the window has {} bytes, the payload {}", window.length,
                                wanted.payload_bytes));
  }
  const Result<ReserveResult> result = store_.Reserve(wanted);
  if (!result.ok()) return fail(result.status());
  if (result->found != BlockState::kAbsent) {
    ++stats_.puts_refused;
    if (result->found == BlockState::kReserved) {
      return SendPut(endpoint, id, wire::PutReply::IN_PROGRESS);
    }
    stats_.dedup_bytes += wanted.payload_bytes;
    store_.Touch(wanted.key);
    return SendPut(endpoint, id, wire::PutReply::ALREADY_THERE);
  }
  Put& put = session->puts[id];
  put.key = wanted.key;
  put.reservation = result->reservation;
  put.window = window;
  put.payload = result->payload;
  put.deadline = wanted.deadline;
  SendPut(endpoint, id, wire::PutReply::RESERVED);
}

void ShardServer::Impl::OnPutRanges(EndpointId endpoint, Session* session,
                                    const wire::Envelope& request) {
  const auto found = session->puts.find(request.request_id());
  // A put that has ended meanwhile: the client was told.
  if (found == session->puts.end() || found->second.sealing) return;
  Put& put = found->second;
  const auto& ranges = request.put_ranges().ranges();
  const auto invalid = [&](const Status& status) {
    ++stats_.malformed_messages;
    FailPut(endpoint, session, request.request_id(), status);
  };
  if (ranges.size() % 2 != 0 || static_cast<size_t>(ranges.size()) > 2 * kMaxPutRanges) {
    return invalid(InvalidArgument("put ranges: {} numbers are not 1 to {} pairs", ranges.size(),
                                   kMaxPutRanges));
  }
  for (int i = 0; i < ranges.size(); i += 2) {
    if (!RangeFits(ranges[i], ranges[i + 1], put.payload.size())) {
      return invalid(InvalidArgument("put ranges: {} bytes at {} lie outside a payload of {}",
                                     ranges[i + 1], ranges[i], put.payload.size()));
    }
    for (const Interval& fresh : put.asked.Add({ranges[i], ranges[i] + ranges[i + 1]})) {
      put.queued.push_back(fresh);
    }
  }
  if (put.asked.pieces() > kMaxPutPieces || put.queued.size() > kMaxPutPieces) {
    return FailPut(endpoint, session, request.request_id(),
                   BusyStatus("separate stretches in one put", kMaxPutPieces));
  }
  Advance(endpoint, session);
}

void ShardServer::Impl::OnSeal(EndpointId endpoint, Session* session,
                               const wire::Envelope& request) {
  const uint64_t id = request.request_id();
  const auto found = session->puts.find(id);
  if (found == session->puts.end()) {
    return SendPut(endpoint, id, wire::PutReply::FAILED,
                   InvalidArgument("seal: there is no such put; its lease may have ended"));
  }
  Put& put = found->second;
  if (put.sealing) return;
  put.sealing = true;
  const auto manifest = AsBytes(request.seal().manifest());
  put.manifest.assign(manifest.begin(), manifest.end());
  // Whatever was not announced before is there now.
  for (const Interval& rest : put.asked.Add({0, put.payload.size()})) put.queued.push_back(rest);
  Advance(endpoint, session);
  SealIfLanded(endpoint, session, id);
}

void ShardServer::Impl::SealIfLanded(EndpointId endpoint, Session* session, uint64_t put_id) {
  const auto found = session->puts.find(put_id);
  if (found == session->puts.end()) return;
  Put& put = found->second;
  const bool landed = put.queued.empty() && put.outstanding == 0;
  if (!put.sealing || (!landed && !options_.faults.seal_before_landed)) return;
  const Status status = store_.Seal(put.reservation, put.manifest);
  if (!status.ok()) {
    if (status.code() == StatusCode::kDataLoss) ++stats_.data_loss;
    return FailPut(endpoint, session, put_id, status);
  }
  ++stats_.puts_sealed;
  session->puts.erase(found);
  SendPut(endpoint, put_id, wire::PutReply::SEALED);
}

void ShardServer::Impl::FailPut(EndpointId endpoint, Session* session, uint64_t put_id,
                                const Status& status) {
  const auto found = session->puts.find(put_id);
  if (found == session->puts.end()) return;
  store_.Abort(found->second.reservation);
  session->puts.erase(found);
  SendPut(endpoint, put_id, wire::PutReply::FAILED, status);
}

bool ShardServer::Impl::SubmitRead(EndpointId endpoint, Session* session) {
  for (auto& [id, put] : session->puts) {
    if (put.queued.empty()) continue;
    const Interval interval = put.queued.front();
    if (!store_.AddLanding(put.reservation, +1)) {
      FailPut(endpoint, session, id,
              MakeStatus(StatusCode::kDeadlineExceeded, "put of block {}: its lease has ended",
                         put.key.ShortHex()));
      return true;
    }
    put.queued.pop_front();
    ++put.outstanding;
    Transfer transfer;
    transfer.op = Transfer::Op::kRead;
    transfer.local = put.payload.subspan(interval.begin, interval.end - interval.begin);
    transfer.remote = put.window;
    transfer.remote_offset = interval.begin;
    Submit(endpoint, session, transfer, {endpoint, id, 0, put.reservation, transfer.local.size()});
    return true;
  }
  return false;
}

void ShardServer::Impl::OnReadDone(const InFlight& done, Session* session, const Status& status) {
  store_.AddLanding(done.reservation, -1);
  const auto put = session->puts.find(done.request_id);
  if (put == session->puts.end() || put->second.reservation != done.reservation) return;
  --put->second.outstanding;
  if (!status.ok()) {
    return FailPut(done.endpoint, session, done.request_id,
                   Unavailable("put of block {}: reading {} bytes from the client failed: {}",
                               put->second.key.ShortHex(), done.bytes, status.message()));
  }
  stats_.payload_bytes_stored += done.bytes;
  SealIfLanded(done.endpoint, session, done.request_id);
}

}  // namespace kvant
