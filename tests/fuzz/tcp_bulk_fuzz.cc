// The bulk side of the tcp transport: any bytes from the peer's socket, against exposed windows and
// reads under way. Nothing may land outside the window that is open for writing.
#include <fcntl.h>
#include <sys/socket.h>
#include <unistd.h>

#include "base/check.h"
#include "tests/fuzz/fuzz_input.h"
#include "transport/tcp_bulk.h"

namespace kvant::fuzz {
namespace {

constexpr size_t kWindowBytes = 256;
constexpr size_t kLargestMessage = 300;
constexpr std::byte kUntouched{0xC3};

struct Memory {
  Bytes guard_before = Bytes(64, kUntouched);
  Bytes writable = Bytes(kWindowBytes);
  Bytes readable = Bytes(kWindowBytes, kUntouched);
  Bytes local = Bytes(kWindowBytes);
};

RemoteWindow ExposeAll(WindowTable* table, Memory* memory) {
  table->AddMemory(memory->writable);
  table->AddMemory(memory->readable);
  table->AddMemory(memory->local);
  table->Expose(1, memory->readable, Access::kRemoteRead);
  return table->Expose(1, memory->writable, Access::kRemoteWrite);
}

void AppendFrame(const tcp::BulkHeader& header, size_t payload, Bytes* out) {
  std::array<std::byte, tcp::kBulkHeaderBytes> bytes;
  tcp::Encode(header, bytes);
  out->insert(out->end(), bytes.begin(), bytes.end());
  out->resize(out->size() + payload, std::byte{0x11});
}

void AppendMessage(size_t length, Bytes* out) {
  std::array<std::byte, tcp::kMessageHeaderBytes> bytes;
  tcp::EncodeMessageHeader(static_cast<uint32_t>(length), bytes);
  out->insert(out->end(), bytes.begin(), bytes.end());
  out->resize(out->size() + length, std::byte{0x22});
}

}  // namespace

std::vector<Bytes> SeedInputs() {
  WindowTable table(7);
  Memory memory;
  table.AddMemory(memory.readable);
  const RemoteWindow readable = table.Expose(1, memory.readable, Access::kRemoteRead);
  const RemoteWindow writable = table.Expose(1, memory.writable, Access::kRemoteWrite);
  Bytes frames(4);
  AppendFrame({.op = tcp::BulkOp::kWrite,
               .immediate = 5,
               .window = writable.id,
               .key = writable.key,
               .offset = 16,
               .length = 100},
              100, &frames);
  AppendFrame({.op = tcp::BulkOp::kRead,
               .tag = 9,
               .window = readable.id,
               .key = readable.key,
               .length = 64},
              0, &frames);
  AppendFrame({.op = tcp::BulkOp::kReadReply, .tag = 0, .length = 128}, 128, &frames);
  AppendFrame({.op = tcp::BulkOp::kReadRefused, .tag = 1}, 0, &frames);
  AppendMessage(40, &frames);
  Bytes with_goodbye = frames;
  AppendFrame({.op = tcp::BulkOp::kGoodbye}, 0, &with_goodbye);
  Bytes beyond(4, std::byte{1});
  AppendFrame({.op = tcp::BulkOp::kWrite,
               .window = writable.id,
               .key = writable.key,
               .offset = ~uint64_t{0} - 8,
               .length = 100},
              100, &beyond);
  Bytes messages(4);
  for (const size_t length : {size_t{0}, size_t{1}, kLargestMessage, kLargestMessage + 1}) {
    AppendMessage(length, &messages);
  }
  return {frames, with_goodbye, beyond, messages};
}

}  // namespace kvant::fuzz

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  using namespace kvant;
  using namespace kvant::fuzz;
  FuzzInput input(data, size);
  const size_t chunk = 1 + input.Take<uint8_t>() * size_t{16};
  const bool revoke_midway = input.Take<uint8_t>() % 2 == 1;
  input.Take<uint16_t>();

  int pair[2];
  KV_CHECK(socketpair(AF_UNIX, SOCK_STREAM | SOCK_NONBLOCK, 0, pair) == 0);
  const tcp::Socket peer(pair[1]);
  WindowTable table(7);
  Memory memory;
  const RemoteWindow writable = ExposeAll(&table, &memory);
  LinkCounters counters;
  TcpDefects defects;
  std::vector<Event> events;
  tcp::BulkStream stream(tcp::Socket{pair[0]},
                         {1, &table, &counters, &defects, &events, 8, kLargestMessage});
  std::vector<Transfer> reads(2);
  for (size_t i = 0; i < reads.size(); ++i) {
    reads[i].op = Transfer::Op::kRead;
    reads[i].local = std::span(memory.local).subspan(i * 128, 128);
    reads[i].remote = {77, 78, 1024};
    reads[i].cookie = i + 1;
  }
  KV_CHECK(stream.Submit(reads) == reads.size());
  KV_CHECK(stream.SendMessage(memory.readable, true));
  Status status;
  bool first = true;
  while (status.ok() && !input.empty()) {
    const auto bytes = input.TakeBytes(chunk);
    (void)!write(peer.fd(), bytes.data(), bytes.size());
    stream.OnReady(true, true, false);
    status = stream.Receive();
    if (status.ok()) status = stream.Send();
    if (first && revoke_midway) table.Revoke(writable.id);
    first = false;
    std::array<char, 4096> drained;
    while (read(peer.fd(), drained.data(), drained.size()) > 0) continue;
  }
  stream.Abort(StatusCode::kUnavailable, "fuzz");
  size_t done = 0;
  for (const Event& event : events) {
    done += event.kind == Event::Kind::kTransferDone;
    KV_CHECK(event.message.size() <= kLargestMessage);
  }
  KV_CHECK(done == reads.size());
  for (const std::byte byte : memory.guard_before) KV_CHECK(byte == kUntouched);
  for (const std::byte byte : memory.readable) KV_CHECK(byte == kUntouched);
  return 0;
}
