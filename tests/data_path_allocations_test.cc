// Once warm, the data path allocates nothing: transfers over loopback, shm and tcp, tiles,
// attention, prefill and decode steps. Every `operator new` of this program counts.
#include <fmt/format.h>
#include <gtest/gtest.h>
#include <unistd.h>

#include <atomic>
#include <cstdlib>
#include <new>

#include "kernels/attention.h"
#include "node/block_past.h"
#include "node/decoder.h"
#include "tests/kernel_fixtures.h"
#include "tests/support/random_model.h"
#include "transport/arena.h"
#include "transport/factory.h"

namespace {

std::atomic<uint64_t> allocations = 0;            // by all threads
thread_local uint64_t allocations_of_thread = 0;  // tcp's messages have threads of ZeroMQ

void* Allocate(size_t bytes, size_t alignment) noexcept {
  ++allocations;
  ++allocations_of_thread;
  const size_t whole = (bytes + alignment - 1) / alignment * alignment;
  return std::aligned_alloc(alignment, whole == 0 ? alignment : whole);
}
void* AllocateOrThrow(size_t bytes, size_t alignment) {
  void* const memory = Allocate(bytes, alignment);
  if (memory == nullptr) throw std::bad_alloc();
  return memory;
}
constexpr size_t kPlain = __STDCPP_DEFAULT_NEW_ALIGNMENT__;

}  // namespace

void* operator new(size_t bytes) { return AllocateOrThrow(bytes, kPlain); }
void* operator new[](size_t bytes) { return AllocateOrThrow(bytes, kPlain); }
void* operator new(size_t bytes, const std::nothrow_t&) noexcept { return Allocate(bytes, kPlain); }
void* operator new[](size_t bytes, const std::nothrow_t&) noexcept {
  return Allocate(bytes, kPlain);
}
void* operator new(size_t bytes, std::align_val_t alignment) {
  return AllocateOrThrow(bytes, static_cast<size_t>(alignment));
}
void* operator new[](size_t bytes, std::align_val_t alignment) {
  return AllocateOrThrow(bytes, static_cast<size_t>(alignment));
}
void operator delete(void* memory) noexcept { std::free(memory); }
void operator delete[](void* memory) noexcept { std::free(memory); }
void operator delete(void* memory, size_t) noexcept { std::free(memory); }
void operator delete[](void* memory, size_t) noexcept { std::free(memory); }
void operator delete(void* memory, std::align_val_t) noexcept { std::free(memory); }
void operator delete[](void* memory, std::align_val_t) noexcept { std::free(memory); }
void operator delete(void* memory, size_t, std::align_val_t) noexcept { std::free(memory); }
void operator delete[](void* memory, size_t, std::align_val_t) noexcept { std::free(memory); }

namespace kvant {
namespace {

// By all threads, while `work` runs.
template <typename Work>
uint64_t AllocationsOf(const Work& work) {
  const uint64_t before = allocations;
  work();
  return allocations - before;
}

TEST(AllocationsTest, AreCounted) {
  std::vector<int>* made = nullptr;
  EXPECT_EQ(AllocationsOf([&] { made = new std::vector<int>(100); }), 2U);
  delete made;
}

constexpr size_t kSlots = 16;
constexpr uint64_t kSlotBytes = 65536;
constexpr Duration kPatience = std::chrono::seconds(10);

// Two transports of one thread; ours moves the bytes, as a server does.
class TransportPair {
 public:
  TransportPair(std::unique_ptr<Transport> ours, std::unique_ptr<Transport> theirs,
                const std::string& listen)
      : ours_(std::move(ours)), theirs_(std::move(theirs)) {
    const auto arena = [](Transport* transport) {
      return *RegisteredArena::Create(transport, {.bytes = kSlots * kSlotBytes});
    };
    our_arena_ = arena(ours_.get());
    their_arena_ = arena(theirs_.get());
    const std::string address = *theirs_->Listen(listen);
    endpoint_ = *ours_->Connect(address, kPatience);
    EXPECT_TRUE(PollUntil([&] { return connected_ == 2; }));
    lease_ = *our_arena_->Lend(kSlots * kSlotBytes);
    their_lease_ = *their_arena_->Lend(kSlots * kSlotBytes);
    window_ = *their_arena_->Expose(their_lease_, their_peer_, 0, their_lease_.size(),
                                    Access::kRemoteReadWrite);
    for (size_t slot = 0; slot < kSlots; ++slot) {
      Transfer& transfer = transfers_[slot];
      transfer.local = lease_.bytes().subspan(slot * kSlotBytes, kSlotBytes);
      transfer.remote = window_.remote();
      transfer.remote_offset = slot * kSlotBytes;
    }
  }

  // All slots at once, until they have landed.
  void Move(Transfer::Op op) {
    for (Transfer& transfer : transfers_) {
      transfer.op = op;
      transfer.immediate.reset();
      if (op == Transfer::Op::kWrite) transfer.immediate = 1;
    }
    done_ = written_ = 0;
    const size_t expected = op == Transfer::Op::kWrite ? kSlots : 0;
    size_t submitted = 0;
    EXPECT_TRUE(PollUntil([&] {
      submitted += endpoint_->Submit(std::span(transfers_).subspan(submitted));
      return done_ == kSlots && written_ == expected;
    }));
  }
  // A message there and back.
  void Exchange() {
    static constexpr std::byte kMessage[64] = {};
    const auto pass = [&](Endpoint* from) {
      messages_ = 0;
      EXPECT_TRUE(from->Send(kMessage).ok());
      EXPECT_TRUE(PollUntil([&] { return messages_ == 1; }));
    };
    pass(endpoint_);
    pass(theirs_->Find(their_peer_));
  }

 private:
  template <typename Done>
  bool PollUntil(const Done& done) {
    const TimePoint end = SteadyClock().Now() + kPatience;
    while (!done()) {
      Take(ours_.get());
      Take(theirs_.get());
      if (SteadyClock().Now() > end) return false;
    }
    return true;
  }
  void Take(Transport* transport) {
    transport->Poll(&events_);
    for (const Event& event : events_) {
      connected_ += event.kind == Event::Kind::kConnected ? 1 : 0;
      done_ += event.kind == Event::Kind::kTransferDone && event.status.ok() ? 1 : 0;
      written_ += event.kind == Event::Kind::kWritten ? 1 : 0;
      messages_ += event.kind == Event::Kind::kMessage ? 1 : 0;
      if (transport == theirs_.get() && event.kind == Event::Kind::kConnected)
        their_peer_ = event.endpoint;
    }
    events_.clear();
  }

  std::unique_ptr<Transport> ours_;
  std::unique_ptr<Transport> theirs_;
  std::unique_ptr<RegisteredArena> our_arena_;
  std::unique_ptr<RegisteredArena> their_arena_;
  Endpoint* endpoint_ = nullptr;
  EndpointId their_peer_ = 0;
  Lease lease_;
  Lease their_lease_;
  ExposedWindow window_;
  std::array<Transfer, kSlots> transfers_;
  std::vector<Event> events_;
  size_t connected_ = 0;
  size_t done_ = 0;
  size_t written_ = 0;
  size_t messages_ = 0;
};

// Of the thread that polls, for a message there and back: each arrives as a vector of its own
// (Event::message). ZeroMQ's threads are its own affair.
constexpr uint64_t kPerExchange = 2;

void ExpectNoAllocations(TransportPair* pair) {
  constexpr int kWarm = 50;
  constexpr int kRounds = 200;
  for (int i = 0; i < kWarm; ++i) {
    pair->Move(Transfer::Op::kWrite);
    pair->Move(Transfer::Op::kRead);
    pair->Exchange();
  }
  for (const Transfer::Op op : {Transfer::Op::kWrite, Transfer::Op::kRead}) {
    const uint64_t before = allocations_of_thread;
    for (int i = 0; i < kRounds; ++i) pair->Move(op);
    EXPECT_EQ(allocations_of_thread, before) << (op == Transfer::Op::kWrite ? "writes" : "reads");
  }
  const uint64_t before = allocations_of_thread;
  for (int i = 0; i < kRounds; ++i) pair->Exchange();
  EXPECT_LE(allocations_of_thread - before, kPerExchange * kRounds);
}

TEST(AllocationsTest, LoopbackTransfersHaveNone) {
  LoopbackHub hub;
  TransportPair pair(hub.MakeTransport(), hub.MakeTransport(), "loopback:allocations");
  ExpectNoAllocations(&pair);
}

TEST(AllocationsTest, ShmTransfersHaveNone) {
  TransportPair pair(*MakeShmTransport({}), *MakeShmTransport({}),
                     fmt::format("shm:allocations-{}", getpid()));
  ExpectNoAllocations(&pair);
}

TEST(AllocationsTest, TcpTransfersHaveNone) {
  TransportPair pair(*MakeTcpTransport({}), *MakeTcpTransport({}), "tcp://127.0.0.1:0");
  ExpectNoAllocations(&pair);
}

TEST(AllocationsTest, EncodingDecodingAndAttendingHaveNone) {
  using namespace kernels;
  Random random(1);
  constexpr int kTokens = 64;
  const LayerShape shapes[] = {KeysAndValues({kTokens, 2, 128}),
                               {{kTokens, 1, 64}, {kTokens, 1, 512}, true}};
  for (const Codec* codec : Codecs()) {
    for (const LayerShape& shape : shapes) {
      const std::vector<float> keys = MakeSegment(shape.keys, &random);
      const std::vector<float> values = MakeSegment(shape.values, &random);
      EncodedSegment encoded_keys = Encode(*codec, SegmentKind::kKey, shape.keys, keys.data());
      const EncodedSegment encoded_values =
          Encode(*codec, shape.value_kind(), shape.values, values.data());
      MutableSegmentRanges ranges;
      for (size_t cut = 0; cut < encoded_keys.bytes.size(); ++cut)
        ranges.range[cut] = encoded_keys.bytes[cut].data();
      std::vector<float> decoded(keys.size());
      constexpr int kHeads = 8;
      const auto value_dim = static_cast<size_t>(shape.values.head_dim);
      const std::vector<float> q(static_cast<size_t>(kHeads * KeyDim(shape)), 0.1F);
      std::vector<float> partials(2 * kHeads * (2 + value_dim));
      const auto block = [&](size_t which) {
        float* const at = partials.data() + which * kHeads * (2 + value_dim);
        return QueryBlock{1, kHeads, q.data(), 0.1F, at, at + kHeads, at + 2 * kHeads};
      };
      const auto all = [&] {
        codec->encode(SegmentKind::kKey, shape.keys, keys.data(), ranges,
                      encoded_keys.max_error.data());
        codec->decode(SegmentKind::kKey, shape.keys, encoded_keys.Ranges(codec->key_cuts),
                      decoded.data());
        for (const size_t which : {0, 1}) InitPartials(block(which), shape.values.head_dim);
        AttendTile(block(0), {codec, shape, encoded_keys.Ranges(codec->key_cuts),
                              encoded_values.Ranges(codec->value_cuts)});
        AttendRaw(block(1), {keys.data(), values.data(), shape});
        MergePartials(block(0), block(1), shape.values.head_dim);
        FinishPartials(block(1), shape.values.head_dim, block(1).weighted);
      };
      all();
      EXPECT_EQ(AllocationsOf(all), 0U) << codec->name;
    }
  }
}

// Several sequences over whole blocks, and a block of prefill between their steps.
TEST(AllocationsTest, DecodeAndPrefillHaveNone) {
  using namespace node;
  constexpr int kSequences = 3;
  constexpr int kBlocks = 9;  // more than one piece of attention
  constexpr int kContext = kBlocks * kBlockTokens;
  for (ModelConfig config :
       {support::TinyConfig(), support::TinySlidingConfig(), support::TinyLatentConfig()}) {
    config.max_positions = kContext + 2 * kBlockTokens;
    const support::TemporaryDirectory directory;
    support::RandomModelOptions options;
    options.config = config;
    ASSERT_TRUE(support::WriteRandomModel(directory.path(), options).ok());
    const auto model = *Model::Load(directory.path());
    kernels::ThreadPool pool(2);
    Decoder decoder(model.get(), &pool);
    const BlockClass block_class(model.get(), *kernels::FindCodec("tile8"), {});
    std::vector<CachedBlockPtr> blocks;
    for (int i = 0; i < kBlocks; ++i) {
      blocks.push_back(
          std::make_shared<CachedBlock>(block_class, BlockKey{}, block_class.FullCuts()));
      for (int layer = 0; layer < config.layers; ++layer) blocks.back()->MarkReady(layer);
    }
    CachedBlock made(block_class, BlockKey{}, block_class.FullCuts());
    const LayerSink sink = [&](int layer, const float* keys, const float* values) {
      block_class.EncodeLayer(layer, keys, values, made.bytes.data(), nullptr);
      return OkStatus();
    };
    BlockPast past(block_class, blocks, block_class.FullCuts(), nullptr);
    const std::vector<int32_t> tokens(kBlockTokens, 7);
    std::vector<OpenTile> open(kSequences, OpenTile(config));
    std::vector<DecodeRow> rows(kSequences);
    std::vector<float> logits(kSequences * static_cast<size_t>(config.vocab));
    const auto step = [&] {
      for (size_t i = 0; i < kSequences; ++i) {
        rows[i].token = static_cast<int32_t>(10 * i) + open[i].tokens();
        rows[i].position = kContext + open[i].tokens();
        rows[i].past = &past;
        rows[i].open = &open[i];
      }
      decoder.DecodeStep(rows, logits.data());
      for (const DecodeRow& row : rows) EXPECT_TRUE(row.status.ok());
      EXPECT_TRUE(decoder.Prefill({tokens, kContext, &past}, sink, nullptr).ok());
    };
    step();
    EXPECT_EQ(AllocationsOf([&] {
                for (int i = 1; i < kBlockTokens; ++i) step();
              }),
              0U)
        << config.layers << " layers";
  }
}

}  // namespace
}  // namespace kvant
