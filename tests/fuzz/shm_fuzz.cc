// A peer of the shm transport that writes anything anywhere into what is shared, and sends any
// packet. Nothing may land outside the window that is open for writing, and every transfer
// completes once.
#include <unistd.h>

#include "base/bytes.h"
#include "base/check.h"
#include "tests/fuzz/fuzz_input.h"
#include "tests/support/raw_shm_peer.h"
#include "transport/arena.h"
#include "transport/shm.h"

namespace kvant::fuzz {
namespace {

constexpr std::byte kUntouched{0xC3};
constexpr size_t kWindowBytes = 256;

// What an input is made of: a byte that says what is done, and its arguments.
enum Step : uint8_t { kRecord, kRing, kTail, kPacket, kPages, kSlot, kTransfer, kTurn, kSteps };

void Put(std::initializer_list<uint64_t> values, Bytes* out) {
  for (const uint64_t value : values) {
    const auto bytes = std::as_bytes(std::span(&value, 1));
    out->insert(out->end(), bytes.begin(), bytes.end());
  }
}
void Put(Step step, std::initializer_list<uint64_t> values, Bytes* out) {
  out->push_back(static_cast<std::byte>(step));
  Put(values, out);
}

}  // namespace

std::vector<Bytes> SeedInputs() {
  Bytes message;
  Put(kRecord, {16 | uint64_t{1} << 32 | uint64_t{1} << 40, 0, 0}, &message);
  message.resize(message.size() + 16, std::byte{7});
  Put(kTurn, {}, &message);
  Put(kRecord, {uint64_t{3} << 32 | uint64_t{1} << 40, 0, 0}, &message);
  Bytes window;
  Put(kPages, {1}, &window);
  Put(kSlot, {5, 3, 1, 128, 512, 77}, &window);
  Put(kTransfer, {1, 5, 77, 512, 16, 100}, &window);
  Put(kTransfer, {0, 5, 77, 512, 0, 200}, &window);
  Put(kTurn, {}, &window);
  Put(kTail, {24}, &window);
  Bytes garbage;
  Put(kRing, {100}, &garbage);
  garbage.resize(garbage.size() + 100, std::byte{0x55});
  Put(kPacket, {0x0400013153564B, 1, 4096}, &garbage);
  return {message, window, garbage};
}

}  // namespace kvant::fuzz

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  using namespace kvant;
  using namespace kvant::fuzz;
  FuzzInput input(data, size);
  static const std::string name = fmt::format("fuzz-{}", getpid());
  static const auto server = [] {
    auto made = *MakeShmTransport({});
    KV_CHECK(made->Listen("shm:" + name).ok());
    return made;
  }();
  static const auto arena = *RegisteredArena::Create(server.get(), {.bytes = 1 << 20});

  support::RawShmPeer peer(name);
  std::vector<Event> events;
  for (int i = 0; i < 1000 && events.empty(); ++i) server->Poll(&events);
  KV_CHECK(!events.empty() && events[0].kind == Event::Kind::kConnected);
  const EndpointId id = events[0].endpoint;
  Lease guarded = *arena->Lend(3 * kWindowBytes);
  std::fill(guarded.bytes().begin(), guarded.bytes().end(), kUntouched);
  const Lease local = *arena->Lend(kWindowBytes);
  const auto window = *arena->Expose(guarded, id, kWindowBytes, kWindowBytes, Access::kRemoteWrite);
  // What the peer says of itself counts alone: it has this memory mapped, as it may.
  const SharedMemory pages = *SharedMemory::Create(4096);
  size_t submitted = 0;
  const auto turn = [&] {
    server->Poll(&events);
    if (Endpoint* endpoint = server->Find(id)) static_cast<void>(endpoint->Send(AsBytes("x")));
  };
  while (!input.empty()) {
    shm::Channel& channel = peer.channel();
    switch (input.Take<uint8_t>() % kSteps) {
      case kRecord: {
        auto record = input.Take<shm::Record>();
        const auto body = input.TakeBytes(record.bytes % 4096);
        record.bytes = static_cast<uint32_t>(body.size());
        if (channel.HasSpace(body.size())) channel.Put(record, body);
        break;
      }
      case kRing: {
        const auto head = input.Take<uint64_t>();
        peer.PutBytes(input.TakeBytes(head % 4096), head);
        break;
      }
      case kTail:
        channel.ours().tail.store(input.Take<uint64_t>());
        break;
      case kPacket:
        shm::SendPacket(peer.socket(), input.Take<shm::PacketHeader>(), AsText(input.TakeBytes(16)),
                        {});
        break;
      case kPages:
        shm::SendPacket(peer.socket(),
                        {.type = shm::PacketType::kPages,
                         .first = input.Take<uint64_t>(),
                         .second = pages.bytes().size()},
                        {}, {pages.fd()});
        break;
      case kSlot: {
        const auto number = input.Take<uint64_t>();
        shm::WindowSlot& slot = channel.our_window(number % shm::kWindows);
        slot.id.store(number);
        slot.access.store(static_cast<uint32_t>(input.Take<uint64_t>()));
        slot.pages.store(input.Take<uint64_t>());
        slot.offset.store(input.Take<uint64_t>());
        slot.length.store(input.Take<uint64_t>());
        slot.key.store(input.Take<uint64_t>());
        break;
      }
      case kTransfer: {
        Transfer transfer;
        const bool write = input.Take<uint64_t>() % 2 == 0;
        transfer.op = write ? Transfer::Op::kWrite : Transfer::Op::kRead;
        transfer.remote.id = input.Take<uint64_t>();
        transfer.remote.key = input.Take<uint64_t>();
        transfer.remote.length = input.Take<uint64_t>();
        transfer.remote_offset = input.Take<uint64_t>();
        transfer.local = local.bytes().first(input.Take<uint64_t>() % (kWindowBytes + 1));
        if (transfer.remote_offset % 2 == 1) transfer.immediate = 7;
        if (Endpoint* endpoint = server->Find(id)) {
          submitted += endpoint->Submit(std::span(&transfer, 1));
        }
        break;
      }
      default:
        turn();
    }
  }
  for (int i = 0; i < 4; ++i) turn();
  peer.HangUp();
  const auto closed = [&] {
    return std::any_of(events.begin(), events.end(), [&](const Event& event) {
      return event.kind == Event::Kind::kClosed && event.endpoint == id;
    });
  };
  for (int i = 0; i < 1000 && !closed(); ++i) server->Poll(&events);
  KV_CHECK(closed());
  size_t done = 0;
  for (const Event& event : events) done += event.kind == Event::Kind::kTransferDone ? 1 : 0;
  KV_CHECK(done == submitted);
  for (const std::byte byte : guarded.bytes()) KV_CHECK(byte == kUntouched);
  return 0;
}
