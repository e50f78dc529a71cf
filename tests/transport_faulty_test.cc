// The faulty wrapper: each fault happens, as often as told, the same for the same seed, and breaks
// no more of the contract than it says. Also the list of backends.
#include <gtest/gtest.h>

#include <set>

#include "tests/transport_suite.h"
#include "transport/factory.h"
#include "transport/faulty.h"
#include "transport/loopback.h"

namespace kvant::test {
namespace {

// A client with faults and a plain server on one hub.
class FaultyTest : public ::testing::Test {
 protected:
  void Start(const FaultOptions& options) {
    faulty_ = MakeFaultyTransport(hub_.MakeTransport(), options);
    plain_ = hub_.MakeTransport();
    ASSERT_TRUE(plain_->Listen("loopback:x").ok());
    memory_.assign(4096, std::byte{1});
    remote_memory_.assign(4096, std::byte{2});
    auto region = faulty_->Register(memory_);
    ASSERT_TRUE(region.ok());
    region_ = *std::move(region);
    remote_region_ = *plain_->Register(remote_memory_);
    endpoint_ = *faulty_->Connect("loopback:x", std::chrono::seconds(1));
    Turn();
    ASSERT_FALSE(theirs_.empty());
    peer_ = plain_->Find(theirs_[0].endpoint);
    ours_.clear();
  }
  void TearDown() override {
    region_.reset();
    remote_region_.reset();
  }
  void Turn() {
    faulty_->Poll(&ours_);
    plain_->Poll(&theirs_);
  }
  // Numbered messages from the server; what arrives of them.
  std::vector<uint32_t> Deliver(uint32_t count) {
    for (uint32_t i = 0; i < count; ++i) {
      EXPECT_TRUE(peer_->Send(Packet().U32(i).bytes()).ok());
      Turn();
    }
    for (int i = 0; i < 40; ++i) Turn();
    std::vector<uint32_t> got;
    for (const Event& event : ours_) {
      if (event.kind == Event::Kind::kMessage) got.push_back(Packet(event.message).U32());
    }
    return got;
  }
  size_t Count(Event::Kind kind) const {
    return static_cast<size_t>(std::count_if(ours_.begin(), ours_.end(),
                                             [kind](const Event& e) { return e.kind == kind; }));
  }

  LoopbackHub hub_;
  std::unique_ptr<FaultyTransport> faulty_;
  std::unique_ptr<Transport> plain_;
  std::vector<std::byte> memory_;
  std::vector<std::byte> remote_memory_;
  std::unique_ptr<MemoryRegion> region_;
  std::unique_ptr<MemoryRegion> remote_region_;
  Endpoint* endpoint_ = nullptr;
  Endpoint* peer_ = nullptr;
  std::vector<Event> ours_;
  std::vector<Event> theirs_;
};

TEST_F(FaultyTest, DropsMessages) {
  Start({.seed = 1, .drop_message = 0.5});
  const auto got = Deliver(200);
  EXPECT_TRUE(std::is_sorted(got.begin(), got.end()));
  EXPECT_EQ(got.size() + faulty_->counts().dropped, 200U);
  EXPECT_GT(faulty_->counts().dropped, 60U);
  EXPECT_GT(got.size(), 60U);
}

TEST_F(FaultyTest, DelaysMessagesPastEachOther) {
  Start({.seed = 2, .delay_message = 0.5});
  auto got = Deliver(200);
  EXPECT_EQ(got.size(), 200U);
  EXPECT_FALSE(std::is_sorted(got.begin(), got.end()));
  EXPECT_GT(faulty_->counts().delayed, 60U);
}

TEST_F(FaultyTest, DuplicatesMessages) {
  Start({.seed = 3, .duplicate_message = 0.5});
  const auto got = Deliver(200);
  EXPECT_EQ(got.size(), 200U + faulty_->counts().duplicated);
  EXPECT_EQ(std::set<uint32_t>(got.begin(), got.end()).size(), 200U);
}

TEST_F(FaultyTest, CorruptsOneByteOfMessages) {
  Start({.seed = 4, .corrupt_message = 1});
  const auto got = Deliver(50);
  ASSERT_EQ(got.size(), 50U);
  for (uint32_t i = 0; i < 50; ++i) {
    const uint32_t changed = got[i] ^ i;
    int bytes = 0;
    for (int shift = 0; shift < 32; shift += 8) bytes += ((changed >> shift) & 0xFF) != 0 ? 1 : 0;
    EXPECT_EQ(bytes, 1);
  }
}

TEST_F(FaultyTest, TheSameSeedGivesTheSameFaults) {
  const FaultOptions options{
      .seed = 5, .drop_message = 0.2, .delay_message = 0.3, .duplicate_message = 0.2};
  Start(options);
  const auto first = Deliver(300);
  TearDown();
  LoopbackHub fresh;
  hub_ = fresh;
  ours_.clear();
  theirs_.clear();
  Start(options);
  EXPECT_EQ(Deliver(300), first);
}

TEST_F(FaultyTest, CorruptsPayloadBothWays) {
  Start({.seed = 6, .corrupt_payload = 1});
  const RemoteWindow window = *region_->Expose(endpoint_->id(), 0, 4096, Access::kRemoteWrite);
  const Transfer write{.op = Transfer::Op::kWrite,
                       .local = remote_memory_,
                       .remote = window,
                       .immediate = 1,
                       .cookie = 1};
  ASSERT_EQ(peer_->Submit(std::span(&write, 1)), 1U);
  plain_->Poll(&theirs_);
  faulty_->Poll(&ours_);
  EXPECT_EQ(Count(Event::Kind::kWritten), 1U);
  EXPECT_EQ(std::count(memory_.begin(), memory_.end(), std::byte{2}), 4095);
  const EndpointId peer_id = peer_->id();
  const RemoteWindow readable = *remote_region_->Expose(peer_id, 0, 4096, Access::kRemoteRead);
  const Transfer read{.op = Transfer::Op::kRead, .local = memory_, .remote = readable, .cookie = 2};
  ASSERT_EQ(endpoint_->Submit(std::span(&read, 1)), 1U);
  faulty_->Poll(&ours_);
  EXPECT_EQ(std::count(memory_.begin(), memory_.end(), std::byte{2}), 4095);
  EXPECT_EQ(std::count(remote_memory_.begin(), remote_memory_.end(), std::byte{2}), 4096);
}

TEST_F(FaultyTest, CutCompletesEverythingOnce) {
  Start({.seed = 7, .cut = 1});
  const RemoteWindow window =
      *remote_region_->Expose(peer_->id(), 0, 4096, Access::kRemoteReadWrite);
  ASSERT_TRUE(peer_->Send(Packet('E').bytes()).ok());
  std::vector<Transfer> transfers(20);
  for (size_t i = 0; i < transfers.size(); ++i) {
    transfers[i] = {.op = Transfer::Op::kRead, .local = memory_, .remote = window, .cookie = i};
  }
  const EndpointId id = endpoint_->id();
  ASSERT_EQ(endpoint_->Submit(transfers), 20U);
  for (int i = 0; i < 5; ++i) Turn();
  EXPECT_EQ(Count(Event::Kind::kMessage), 0U);
  EXPECT_EQ(Count(Event::Kind::kTransferDone), 20U);
  ASSERT_EQ(Count(Event::Kind::kClosed), 1U);
  EXPECT_EQ(ours_.back().kind, Event::Kind::kClosed);
  EXPECT_EQ(ours_.back().status.code(), StatusCode::kUnavailable);
  EXPECT_EQ(faulty_->Find(id), nullptr);
  EXPECT_EQ(faulty_->counts().cut, 1U);
}

TEST_F(FaultyTest, FailsTransfersAndRefusesSends) {
  Start({.seed = 8, .refuse_send = 1, .fail_transfer = 1});
  const RemoteWindow window = *remote_region_->Expose(peer_->id(), 0, 10, Access::kRemoteWrite);
  const Transfer write{
      .op = Transfer::Op::kWrite, .local = std::span(memory_).first(10), .remote = window};
  EXPECT_EQ(endpoint_->Submit(std::span(&write, 1)), 1U);
  for (int i = 0; i < 3; ++i) Turn();
  ASSERT_EQ(Count(Event::Kind::kTransferDone), 1U);
  EXPECT_EQ(ours_.back().status.code(), StatusCode::kUnavailable);
  EXPECT_EQ(remote_memory_[0], std::byte{2}) << "nothing was sent";
  EXPECT_EQ(endpoint_->Send({}).code(), StatusCode::kResourceExhausted);
}

// An operation that needs one register, one expose and two submits passes once the n-th failure
// lies beyond it, and fails cleanly before.
TEST(FaultyCounts, TheNthFails) {
  for (uint64_t n = 0; n < 4; ++n) {
    LoopbackHub hub;
    auto plain = hub.MakeTransport();
    ASSERT_TRUE(plain->Listen("loopback:x").ok());
    auto faulty = MakeFaultyTransport(
        hub.MakeTransport(), {.fail_submit_at = n, .fail_register_at = n, .fail_expose_at = n});
    std::vector<std::byte> memory(100);
    auto region = faulty->Register(memory);
    EXPECT_EQ(region.ok(), n != 0);
    if (!region.ok()) continue;
    Endpoint* endpoint = *faulty->Connect("loopback:x", std::chrono::seconds(1));
    EXPECT_TRUE((*region)->Expose(endpoint->id(), 0, 10, Access::kRemoteRead).ok());
    EXPECT_EQ((*region)->Expose(endpoint->id(), 0, 10, Access::kRemoteRead).ok(), n != 1);
    const Transfer write{.op = Transfer::Op::kWrite, .local = {}};
    for (uint64_t i = 0; i < 3; ++i) {
      EXPECT_EQ(endpoint->Submit(std::span(&write, 1)), i == n ? 0U : 1U);
    }
  }
}

TEST(TransportBackends, AreListedAndExplained) {
  EXPECT_EQ(TransportBackends().size(), 5U);
  EXPECT_TRUE(MakeTransport("tcp", {}).ok());
  EXPECT_EQ(MakeTransport("loopback", {}).status().code(), StatusCode::kUnsupported);
  EXPECT_EQ(MakeTransport("mpi", {}).status().code(), StatusCode::kUnsupported);
  LoopbackHub hub;
  EXPECT_TRUE(MakeTransport("loopback", {.tcp = {}, .loopback = &hub}).ok());
  const auto unknown = MakeTransport("pigeon", {});
  EXPECT_EQ(unknown.status().code(), StatusCode::kInvalidArgument);
  EXPECT_NE(unknown.status().message().find("loopback"), std::string::npos);
}

}  // namespace
}  // namespace kvant::test
