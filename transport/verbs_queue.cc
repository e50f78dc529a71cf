#include "transport/verbs_queue.h"

#include <algorithm>
#include <cerrno>
#include <cstring>

#include "base/random.h"

namespace kvant::verbs {
namespace {

// An acknowledgement is waited for 4.096 us * 2^15 = 134 ms, seven times, so a host that is gone is
// noticed within about a second, and one that was only slow for less is not taken for dead. (7
// retries would be for ever on soft-RoCE.)
constexpr uint8_t kAckTimeout = 15;
constexpr uint8_t kRetries = 6;
// Credits see to it that a receive is there. Against a peer that lies: six tries of 0.64 ms (7
// would be for ever).
constexpr uint8_t kReceiverNotReadyTimer = 12;
constexpr uint8_t kReceiverNotReadyRetries = 6;
constexpr uint64_t kReceiveBit = uint64_t{1} << 63;
// A completion tells of all requests before it, so only some are asked for.
constexpr uint32_t kSignalEvery = 16;
constexpr uint32_t kMax24Bits = (1U << 24) - 1;

}  // namespace

Queue::Queue(const Device* device)
    : device_(device),
      sequence_(static_cast<uint32_t>(SecureRandomUint64() & kMax24Bits)),
      memory_((kReceives + kStaged) * kMaxRecordBytes),
      memory_key_(nullptr, device->library().dereg_mr),
      completions_(nullptr, device->library().destroy_cq),
      pair_(nullptr, device->library().destroy_qp) {}

Result<std::unique_ptr<Queue>> Queue::Make(const Device* device, ibv_comp_channel* channel) {
  std::unique_ptr<Queue> queue(new Queue(device));
  KV_RETURN_IF_ERROR(queue->Create(channel));
  return queue;
}

Status Queue::Create(ibv_comp_channel* channel) {
  const Library& library = device_->library();
  KV_ASSIGN_OR_RETURN(memory_key_,
                      device_->Register(memory_.data(), memory_.size(), IBV_ACCESS_LOCAL_WRITE));
  completions_.reset(
      library.create_cq(device_->context(), kRequests + kReceives, this, channel, 0));
  if (completions_ == nullptr) {
    return MakeStatus(StatusCode::kResourceExhausted, "making a completion queue: {}",
                      std::strerror(errno));
  }
  ibv_qp_init_attr wanted{};
  wanted.send_cq = completions_.get();
  wanted.recv_cq = completions_.get();
  wanted.cap = {.max_send_wr = kRequests,
                .max_recv_wr = kReceives,
                .max_send_sge = 1,
                .max_recv_sge = 1,
                .max_inline_data = kWantedInline};
  wanted.qp_type = IBV_QPT_RC;
  pair_.reset(library.create_qp(device_->domain(), &wanted));
  if (pair_ == nullptr) {
    return MakeStatus(StatusCode::kResourceExhausted, "making a queue pair: {}",
                      std::strerror(errno));
  }
  max_inline_ = wanted.cap.max_inline_data;
  ibv_qp_attr attributes{};
  attributes.qp_state = IBV_QPS_INIT;
  attributes.port_num = device_->port();
  attributes.qp_access_flags = IBV_ACCESS_REMOTE_READ | IBV_ACCESS_REMOTE_WRITE;
  if (const int error =
          library.modify_qp(pair_.get(), &attributes,
                            IBV_QP_STATE | IBV_QP_PKEY_INDEX | IBV_QP_PORT | IBV_QP_ACCESS_FLAGS)) {
    return Unavailable("preparing a queue pair: {}", std::strerror(error));
  }
  for (; taken_count_ < kReceives; ++taken_count_) taken_[taken_count_] = taken_count_;
  Renew();
  owed_ = 0;  // these the greeting tells
  return failed_ == 0 ? OkStatus() : Unavailable("posting receives: {}", std::strerror(failed_));
}

Greeting Queue::Introduce(GreetingType type) const {
  Greeting greeting{.type = type,
                    .mtu = static_cast<uint8_t>(device_->mtu()),
                    .queue = pair_->qp_num,
                    .sequence = sequence_,
                    .lid = device_->lid(),
                    .receives = kReceives,
                    .reads = device_->max_reads_answered()};
  std::copy_n(device_->gid().raw, greeting.gid.size(), greeting.gid.begin());
  return greeting;
}

Status Queue::Connect(const Greeting& peer) {
  const Library& library = device_->library();
  ibv_qp_attr attributes{};
  attributes.qp_state = IBV_QPS_RTR;
  attributes.path_mtu = static_cast<ibv_mtu>(std::min<int>(device_->mtu(), peer.mtu));
  attributes.dest_qp_num = peer.queue;
  attributes.rq_psn = peer.sequence;
  attributes.max_dest_rd_atomic = device_->max_reads_answered();
  attributes.min_rnr_timer = kReceiverNotReadyTimer;
  attributes.ah_attr.port_num = device_->port();
  attributes.ah_attr.dlid = peer.lid;
  attributes.ah_attr.is_global = device_->is_ethernet() ? 1 : 0;
  std::copy(peer.gid.begin(), peer.gid.end(), attributes.ah_attr.grh.dgid.raw);
  attributes.ah_attr.grh.sgid_index = device_->gid_index();
  attributes.ah_attr.grh.hop_limit = 64;
  int error =
      library.modify_qp(pair_.get(), &attributes,
                        IBV_QP_STATE | IBV_QP_AV | IBV_QP_PATH_MTU | IBV_QP_DEST_QPN |
                            IBV_QP_RQ_PSN | IBV_QP_MAX_DEST_RD_ATOMIC | IBV_QP_MIN_RNR_TIMER);
  if (error == 0) {
    attributes = {};
    attributes.qp_state = IBV_QPS_RTS;
    attributes.timeout = kAckTimeout;
    attributes.retry_cnt = kRetries;
    attributes.rnr_retry = kReceiverNotReadyRetries;
    attributes.sq_psn = sequence_;
    attributes.max_rd_atomic = std::min(device_->max_reads_begun(), peer.reads);
    error = library.modify_qp(pair_.get(), &attributes,
                              IBV_QP_STATE | IBV_QP_TIMEOUT | IBV_QP_RETRY_CNT | IBV_QP_RNR_RETRY |
                                  IBV_QP_SQ_PSN | IBV_QP_MAX_QP_RD_ATOMIC);
  }
  if (error != 0) {
    return Unavailable(
        "connecting the queue pair to its peer's: {}; can the RDMA devices reach "
        "each other?",
        std::strerror(error));
  }
  credits_ = peer.receives;
  return OkStatus();
}

ibv_send_wr& Queue::Add(Request request, ibv_wr_opcode opcode, std::span<const std::byte> local,
                        uint32_t local_key) {
  KV_DCHECK(HasRoom(1));
  if (chained_ == kChain) PostSends();
  ibv_send_wr& wr = chain_[chained_];
  wr = {};
  wr.wr_id = first_posted_ + posted_.size();
  wr.opcode = opcode;
  if (!local.empty()) {
    parts_[chained_] = {.addr = reinterpret_cast<uintptr_t>(local.data()),
                        .length = static_cast<uint32_t>(local.size()),
                        .lkey = local_key};
    wr.sg_list = &parts_[chained_];
    wr.num_sge = 1;
  }
  if (++unsignalled_ == kSignalEvery) {
    wr.send_flags = IBV_SEND_SIGNALED;
    unsignalled_ = 0;
  }
  if (chained_ > 0) chain_[chained_ - 1].next = &wr;
  ++chained_;
  posted_.push_back(request);
  return wr;
}

void Queue::PutRecord(RecordHeader header, std::span<const std::byte> body) {
  KV_DCHECK(body.size() <= kMaxPieceBytes && staged_ < kStaged && credits_ > 0);
  header.credits = owed_;
  owed_ = 0;
  --credits_;
  ++staged_;
  const size_t slot = kReceives + next_staged_++ % kStaged;
  const std::span<std::byte> staged(memory_.data() + slot * kMaxRecordBytes,
                                    kRecordHeaderBytes + body.size());
  Encode(header, staged.first<kRecordHeaderBytes>());
  if (!body.empty()) std::memcpy(staged.data() + kRecordHeaderBytes, body.data(), body.size());
  ibv_send_wr& wr = Add({.kind = Request::Kind::kRecord}, IBV_WR_SEND, staged, memory_key_->lkey);
  if (staged.size() <= max_inline_) wr.send_flags |= IBV_SEND_INLINE;
}

void Queue::PutPiece(const Piece& piece, uint32_t index) {
  const auto opcode = !piece.write      ? IBV_WR_RDMA_READ
                      : piece.immediate ? IBV_WR_RDMA_WRITE_WITH_IMM
                                        : IBV_WR_RDMA_WRITE;
  ibv_send_wr& wr = Add({.kind = Request::Kind::kPiece,
                         .index = index,
                         .bytes = static_cast<uint32_t>(piece.local.size())},
                        opcode, piece.local, piece.local_key);
  wr.wr.rdma.remote_addr = piece.remote_address;
  wr.wr.rdma.rkey = piece.remote_key;
  if (piece.write && piece.local.size() <= max_inline_) wr.send_flags |= IBV_SEND_INLINE;
  // Somebody waits for what is read; of what is written nobody but the memory.
  if (!piece.write && piece.last) wr.send_flags |= IBV_SEND_SIGNALED;
  if (piece.immediate) {
    KV_DCHECK(credits_ > 0);
    --credits_;
    wr.imm_data = htobe32(*piece.immediate);
  }
}

void Queue::PutBind(ibv_mw* window, uint32_t device_key, ibv_mr* memory, std::span<std::byte> bytes,
                    int access) {
  ibv_send_wr& wr = Add({.kind = Request::Kind::kBind}, IBV_WR_BIND_MW, {}, 0);
  wr.bind_mw.mw = window;
  wr.bind_mw.rkey = device_key;
  wr.bind_mw.bind_info = {.mr = memory,
                          .addr = reinterpret_cast<uintptr_t>(bytes.data()),
                          .length = bytes.size(),
                          .mw_access_flags = static_cast<unsigned>(access)};
}

void Queue::PutInvalidate(uint32_t device_key, uint32_t index) {
  ibv_send_wr& wr =
      Add({.kind = Request::Kind::kInvalidate, .index = index}, IBV_WR_LOCAL_INV, {}, 0);
  wr.invalidate_rkey = device_key;
}

void Queue::PostSends() {
  if (chained_ == 0) return;
  // The last one tells of those before it.
  chain_[chained_ - 1].send_flags |= IBV_SEND_SIGNALED;
  unsignalled_ = 0;
  ibv_send_wr* refused = nullptr;
  if (const int error = ibv_post_send(pair_.get(), chain_.data(), &refused)) failed_ = error;
  // A driver takes the key that a window had from the window, when it is posted.
  for (const ibv_send_wr& wr : std::span(chain_).first(chained_)) {
    if (wr.opcode == IBV_WR_BIND_MW) wr.bind_mw.mw->rkey = wr.bind_mw.rkey;
  }
  chained_ = 0;
}

void Queue::Renew() {
  if (taken_count_ == 0) return;
  std::array<ibv_recv_wr, kReceives> chain{};
  std::array<ibv_sge, kReceives> parts{};
  for (uint16_t i = 0; i < taken_count_; ++i) {
    parts[i] = {.addr = reinterpret_cast<uintptr_t>(ReceiveBuffer(taken_[i])),
                .length = kMaxRecordBytes,
                .lkey = memory_key_->lkey};
    chain[i].wr_id = kReceiveBit | taken_[i];
    chain[i].sg_list = &parts[i];
    chain[i].num_sge = 1;
    chain[i].next = i + 1 < taken_count_ ? &chain[i + 1U] : nullptr;
  }
  ibv_recv_wr* refused = nullptr;
  if (const int error = ibv_post_recv(pair_.get(), chain.data(), &refused)) failed_ = error;
  owed_ = static_cast<uint16_t>(owed_ + taken_count_);
  taken_count_ = 0;
}

Status Queue::Flush() {
  PostSends();
  return failed_ == 0 ? OkStatus()
                      : Unavailable("posting to the RDMA device: {}", std::strerror(failed_));
}

bool Queue::Ready() {
  if (first_posted_ < retire_until_ || polled_at_ < polled_count_) return true;
  const int count = ibv_poll_cq(completions_.get(), kPollAtOnce, polled_.data());
  polled_at_ = 0;
  // A completion queue that can't be polled is as good as broken.
  if (count < 0) {
    polled_[0] = {};
    polled_[0].status = IBV_WC_FATAL_ERR;
  }
  polled_count_ = static_cast<size_t>(count < 0 ? 1 : count);
  return polled_count_ > 0;
}

bool Queue::Next(Completion* next) {
  while (Ready()) {
    if (first_posted_ < retire_until_) {
      *next = {.kind = Completion::Kind::kDone, .request = posted_.front()};
      posted_.pop_front();
      ++first_posted_;
      if (next->request.kind == Request::Kind::kRecord) --staged_;
      return true;
    }
    const ibv_wc& wc = polled_[polled_at_++];
    if (wc.status != IBV_WC_SUCCESS) {
      *next = {.kind = Completion::Kind::kBroken,
               .status = Unavailable("the connection broke: {}",
                                     device_->library().status_text(wc.status))};
      return true;
    }
    if ((wc.wr_id & kReceiveBit) == 0) {
      retire_until_ = wc.wr_id + 1;
      continue;
    }
    const auto index = static_cast<uint16_t>(wc.wr_id & ~kReceiveBit);
    taken_[taken_count_++] = index;
    if (wc.opcode == IBV_WC_RECV_RDMA_WITH_IMM) {
      *next = {.kind = Completion::Kind::kImmediate, .immediate = be32toh(wc.imm_data)};
    } else {
      *next = {.kind = Completion::Kind::kRecord,
               .record = std::span<const std::byte>(ReceiveBuffer(index), wc.byte_len)};
    }
    return true;
  }
  return false;
}

void Queue::Arm() {
  if (armed_) return;
  armed_ = ibv_req_notify_cq(completions_.get(), 0) == 0;
}

}  // namespace kvant::verbs
