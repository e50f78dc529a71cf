#include "transport/mpi_courier.h"

#include <sched.h>

#include <algorithm>
#include <cstring>

#include "base/bytes.h"

namespace kvant::mpi {
namespace {

constexpr int kPacketTag = 1;
constexpr uint32_t kFirstPayloadTag = 16;
// Large payloads go in pieces: a revoked window stops landing after the pieces that are posted.
constexpr uint64_t kPieceBytes = uint64_t{1} << 20;
// Pieces of one rank that MPI holds, each way.
constexpr size_t kMaxPieces = 16;
constexpr size_t kMaxPacketsOut = 1024;
constexpr int kPacketsATurn = 256;
constexpr size_t kSparePackets = 256;
constexpr Duration kDrainTimeout = std::chrono::seconds(2);

constexpr uint8_t kHasImmediate = 1;

void Encode(const Header& header, std::byte* to) {
  StoreLittle(to, static_cast<uint8_t>(header.type));
  StoreLittle(to + 1, header.immediate ? kHasImmediate : uint8_t{0});
  StoreLittle(to + 2, uint16_t{0});
  StoreLittle(to + 4, header.immediate.value_or(0));
  StoreLittle(to + 8, header.to);
  StoreLittle(to + 16, header.from);
  StoreLittle(to + 24, header.tag);
  StoreLittle(to + 28, header.read);
  StoreLittle(to + 32, header.window);
  StoreLittle(to + 40, header.key);
  StoreLittle(to + 48, header.offset);
  StoreLittle(to + 56, header.length);
}

std::optional<Header> Decode(std::span<const std::byte> packet) {
  if (packet.size() < kHeaderBytes) return std::nullopt;
  const std::byte* from = packet.data();
  const auto type = LoadLittle<uint8_t>(from);
  if (type < static_cast<uint8_t>(PacketType::kHello) ||
      type > static_cast<uint8_t>(PacketType::kGoodbye)) {
    return std::nullopt;
  }
  Header header;
  header.type = static_cast<PacketType>(type);
  if (LoadLittle<uint8_t>(from + 1) == kHasImmediate) {
    header.immediate = LoadLittle<uint32_t>(from + 4);
  }
  header.to = LoadLittle<uint64_t>(from + 8);
  header.from = LoadLittle<uint64_t>(from + 16);
  header.tag = LoadLittle<uint32_t>(from + 24);
  header.read = LoadLittle<uint32_t>(from + 28);
  header.window = LoadLittle<uint64_t>(from + 32);
  header.key = LoadLittle<uint64_t>(from + 40);
  header.offset = LoadLittle<uint64_t>(from + 48);
  header.length = LoadLittle<uint64_t>(from + 56);
  return header;
}

// What a peer gets of a window that was revoked while it was reading.
std::byte* Zeros() {
  static std::vector<std::byte> zeros(kPieceBytes);
  return zeros.data();
}

}  // namespace

Courier::Courier(MPI_Comm communicator, WindowTable* windows, Receiver* receiver,
                 size_t max_body_bytes)
    : communicator_(communicator),
      windows_(windows),
      receiver_(receiver),
      max_body_bytes_(max_body_bytes) {
  int size = 1;
  MPI_Comm_rank(communicator_, &rank_);
  MPI_Comm_size(communicator_, &size);
  lanes_ = std::vector<Lane>(static_cast<size_t>(size));
  int* bound = nullptr;
  int found = 0;
  MPI_Comm_get_attr(communicator_, MPI_TAG_UB, static_cast<void*>(&bound), &found);
  constexpr int kGuaranteed = 32767;  // by the standard
  tag_count_ = static_cast<uint32_t>(found != 0 ? *bound : kGuaranteed) - kFirstPayloadTag;
}

Courier::~Courier() {
  const TimePoint deadline = SteadyClock().Now() + kDrainTimeout;
  while (!Idle() && SteadyClock().Now() < deadline) {
    Progress();
    sched_yield();
  }
  CallOff();
  MPI_Comm_free(&communicator_);
}

void Courier::CallOff() {
  // A send cannot be cancelled: it is left to MPI, with the packet's bytes, until the process ends.
  // Its peer did not answer for kDrainTimeout, so this is rare.
  static std::vector<std::vector<std::byte>> abandoned;
  for (size_t i = 0; i < requests_.size(); ++i) {
    Work& work = works_[i];
    if (work.kind == Work::Kind::kPacketOut || work.kind == Work::Kind::kPieceOut) {
      abandoned.push_back(std::move(work.packet));
      MPI_Request_free(&requests_[i]);
    } else {
      MPI_Cancel(&requests_[i]);
      MPI_Request_free(&requests_[i]);
      if (work.incoming != nullptr) abandoned.push_back(std::move(work.incoming->bytes));
      if (work.scratch)
        abandoned.push_back(std::move(lanes_[static_cast<size_t>(work.rank)].scratch));
    }
  }
}

bool Courier::Idle() const {
  if (!requests_.empty()) return false;
  return std::all_of(lanes_.begin(), lanes_.end(), [](const Lane& lane) {
    return lane.waiting.empty() && lane.sending.empty() && lane.landing.empty() &&
           lane.packets_in.empty();
  });
}

bool Courier::Full(int rank) const {
  return lanes_[static_cast<size_t>(rank)].packets_out >= kMaxPacketsOut;
}

MPI_Request* Courier::Start(Work work) {
  works_.push_back(std::move(work));
  return &requests_.emplace_back(MPI_REQUEST_NULL);
}

void Courier::SendPacket(int rank, const Header& header, std::span<const std::byte> body) {
  std::vector<std::byte> packet;
  if (!spare_packets_.empty()) {
    packet = std::move(spare_packets_.back());
    spare_packets_.pop_back();
  }
  packet.resize(kHeaderBytes + body.size());
  Encode(header, packet.data());
  if (!body.empty()) std::memcpy(packet.data() + kHeaderBytes, body.data(), body.size());
  ++lanes_[static_cast<size_t>(rank)].packets_out;
  const std::byte* bytes = packet.data();  // moving the vector leaves its bytes in place
  const auto count = static_cast<int>(packet.size());
  MPI_Request* request =
      Start({.kind = Work::Kind::kPacketOut, .rank = rank, .packet = std::move(packet)});
  MPI_Isend(bytes, count, MPI_BYTE, rank, kPacketTag, communicator_, request);
}

void Courier::SendPayload(int rank, const Outbound& job) {
  lanes_[static_cast<size_t>(rank)].waiting.push_back(std::make_unique<Outbound>(job));
  StartSends(rank);
}

void Courier::StartSends(int rank) {
  Lane& lane = lanes_[static_cast<size_t>(rank)];
  while (lane.pieces_out < kMaxPieces) {
    // The last one whose header is out may have pieces left; all before it are posted.
    Outbound* job = lane.sending.empty() ? nullptr : lane.sending.back().get();
    if (job == nullptr || job->posted == job->bytes.size()) {
      if (lane.waiting.empty()) return;
      lane.sending.push_back(std::move(lane.waiting.front()));
      lane.waiting.pop_front();
      job = lane.sending.back().get();
      job->header.tag = kFirstPayloadTag + lane.next_tag++ % tag_count_;
      SendPacket(rank, job->header, {});
      if (job->bytes.empty()) continue;
    }
    const uint64_t piece = std::min<uint64_t>(kPieceBytes, job->bytes.size() - job->posted);
    const std::byte* from = job->bytes.data() + job->posted;
    uint64_t held = 0;
    if (job->from_window) {
      if (windows_->Exposed(job->header.window)) {
        held = job->header.window;
        windows_->BeginLanding(held);
      } else {
        from = Zeros();
      }
    }
    job->posted += piece;
    ++lane.pieces_out;
    MPI_Request* request = Start({.kind = Work::Kind::kPieceOut,
                                  .rank = rank,
                                  .outbound = job,
                                  .bytes = piece,
                                  .window = held});
    MPI_Isend(from, static_cast<int>(piece), MPI_BYTE, rank, static_cast<int>(job->header.tag),
              communicator_, request);
  }
}

void Courier::ReceivePayload(int rank, const Inbound& job) {
  lanes_[static_cast<size_t>(rank)].landing.push_back(std::make_unique<Inbound>(job));
  StartReceives(rank);
}

void Courier::StartReceives(int rank) {
  Lane& lane = lanes_[static_cast<size_t>(rank)];
  for (auto& job : lane.landing) {
    while (job->posted < job->header.length) {
      if (lane.pieces_in >= kMaxPieces) return;
      if (job->sink == Inbound::Sink::kWindow && !windows_->Exposed(job->header.window)) {
        job->sink = Inbound::Sink::kDiscard;
      }
      const bool discard = job->sink == Inbound::Sink::kDiscard;
      if (discard && lane.scratch_busy) return;
      const uint64_t piece = std::min(kPieceBytes, job->header.length - job->posted);
      std::byte* to = nullptr;
      uint64_t held = 0;
      if (discard) {
        lane.scratch_busy = true;
        lane.scratch.resize(kPieceBytes);
        to = lane.scratch.data();
      } else {
        to = job->bytes.data() + job->posted;
        if (job->sink == Inbound::Sink::kWindow) {
          held = job->header.window;
          windows_->BeginLanding(held);
        }
      }
      job->posted += piece;
      ++lane.pieces_in;
      MPI_Request* request = Start({.kind = Work::Kind::kPieceIn,
                                    .rank = rank,
                                    .inbound = job.get(),
                                    .bytes = piece,
                                    .window = held,
                                    .scratch = discard});
      MPI_Irecv(to, static_cast<int>(piece), MPI_BYTE, rank, static_cast<int>(job->header.tag),
                communicator_, request);
    }
  }
}

void Courier::CancelWrites(int rank, EndpointId from, std::vector<uint64_t>* cancelled) {
  std::erase_if(lanes_[static_cast<size_t>(rank)].waiting, [&](const auto& job) {
    if (job->from_window || job->header.from != from) return false;
    cancelled->push_back(job->cookie);
    return true;
  });
}

void Courier::CancelReads(int rank, EndpointId to, std::vector<uint64_t>* cancelled) {
  for (auto& job : lanes_[static_cast<size_t>(rank)].landing) {
    if (job->sink != Inbound::Sink::kRead || job->header.to != to) continue;
    if (job->posted > job->landed) continue;  // MPI holds local memory: it will land
    job->sink = Inbound::Sink::kDiscard;
    cancelled->push_back(job->cookie);
  }
}

void Courier::Finish(Work* work) {
  Lane& lane = lanes_[static_cast<size_t>(work->rank)];
  if (work->window != 0) windows_->EndLanding(work->window);
  switch (work->kind) {
    case Work::Kind::kPacketOut:
      --lane.packets_out;
      if (spare_packets_.size() < kSparePackets) spare_packets_.push_back(std::move(work->packet));
      return;
    case Work::Kind::kPacketIn:
      work->incoming->complete = true;
      return;
    case Work::Kind::kPieceOut:
      --lane.pieces_out;
      work->outbound->sent += work->bytes;
      return;
    case Work::Kind::kPieceIn:
      --lane.pieces_in;
      if (work->scratch) lane.scratch_busy = false;
      work->inbound->landed += work->bytes;
      return;
  }
}

void Courier::TakePackets() {
  for (int i = 0; i < kPacketsATurn; ++i) {
    int found = 0;
    MPI_Message message = MPI_MESSAGE_NULL;
    MPI_Status status;
    MPI_Improbe(MPI_ANY_SOURCE, kPacketTag, communicator_, &found, &message, &status);
    if (found == 0) return;
    int count = 0;
    MPI_Get_count(&status, MPI_BYTE, &count);
    const int rank = status.MPI_SOURCE;
    IncomingPacket& packet = lanes_[static_cast<size_t>(rank)].packets_in.emplace_back();
    packet.bytes.resize(static_cast<size_t>(count));
    MPI_Request request = MPI_REQUEST_NULL;
    MPI_Imrecv(packet.bytes.data(), count, MPI_BYTE, &message, &request);
    int done = 0;
    MPI_Test(&request, &done, MPI_STATUS_IGNORE);
    if (done != 0) {
      packet.complete = true;
      DeliverPackets(rank);
    } else {
      *Start({.kind = Work::Kind::kPacketIn, .rank = rank, .incoming = &packet}) = request;
    }
  }
}

void Courier::DeliverPackets(int rank) {
  Lane& lane = lanes_[static_cast<size_t>(rank)];
  while (!lane.packets_in.empty() && lane.packets_in.front().complete) {
    const std::vector<std::byte> bytes = std::move(lane.packets_in.front().bytes);
    lane.packets_in.pop_front();
    const auto header = Decode(bytes);
    // A rank that sends such a thing runs another program; it is not heard.
    if (!header || bytes.size() - kHeaderBytes > max_body_bytes_) continue;
    receiver_->OnPacket(rank, *header, std::span(bytes).subspan(kHeaderBytes));
  }
}

void Courier::Settle(int rank) {
  Lane& lane = lanes_[static_cast<size_t>(rank)];
  // Sends end in any order; each is reported when MPI is done with all its memory.
  for (size_t i = 0; i < lane.sending.size();) {
    Outbound& job = *lane.sending[i];
    if (job.posted < job.bytes.size() || job.sent < job.posted) {
      ++i;
      continue;
    }
    const std::unique_ptr<Outbound> done = std::move(lane.sending[i]);
    lane.sending.erase(lane.sending.begin() + static_cast<ptrdiff_t>(i));
    receiver_->OnSent(*done);
  }
  while (!lane.landing.empty() &&
         lane.landing.front()->landed == lane.landing.front()->header.length) {
    const std::unique_ptr<Inbound> done = std::move(lane.landing.front());
    lane.landing.pop_front();
    receiver_->OnLanded(*done);
  }
  StartSends(rank);
  StartReceives(rank);
}

void Courier::Progress() {
  TakePackets();
  if (!requests_.empty()) {
    int count = 0;
    finished_.resize(requests_.size());
    MPI_Testsome(static_cast<int>(requests_.size()), requests_.data(), &count, finished_.data(),
                 MPI_STATUSES_IGNORE);
    if (count != MPI_UNDEFINED && count > 0) {
      for (int i = 0; i < count; ++i)
        Finish(&works_[static_cast<size_t>(finished_[static_cast<size_t>(i)])]);
      // Finished requests are null now; compact both arrays, order kept.
      size_t kept = 0;
      for (size_t i = 0; i < requests_.size(); ++i) {
        if (requests_[i] == MPI_REQUEST_NULL) continue;
        if (kept != i) {
          requests_[kept] = requests_[i];
          works_[kept] = std::move(works_[i]);
        }
        ++kept;
      }
      requests_.resize(kept);
      works_.resize(kept);
    }
  }
  for (int rank = 0; rank < size(); ++rank) {
    DeliverPackets(rank);
    Settle(rank);
  }
}

}  // namespace kvant::mpi
