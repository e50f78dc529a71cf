// The bytes of the verbs backend, and what is said where no device is.
#include "transport/verbs_wire.h"

#include <gtest/gtest.h>

#include <cstdlib>

#include "base/random.h"
#include "transport/factory.h"

namespace kvant::verbs {
namespace {

Greeting SomeGreeting() {
  Greeting greeting{.type = GreetingType::kWelcome,
                    .mtu = 5,
                    .queue = 0x123456,
                    .sequence = 0xABCDEF,
                    .lid = 77,
                    .receives = 64,
                    .reads = 16};
  for (size_t i = 0; i < greeting.gid.size(); ++i) greeting.gid[i] = static_cast<uint8_t>(i * 7);
  return greeting;
}

TEST(VerbsWire, GreetingsComeBackAsTheyWere) {
  const Greeting sent = SomeGreeting();
  const auto got = DecodeGreeting(Encode(sent));
  ASSERT_TRUE(got.has_value());
  EXPECT_EQ(got->type, sent.type);
  EXPECT_EQ(got->mtu, sent.mtu);
  EXPECT_EQ(got->queue, sent.queue);
  EXPECT_EQ(got->sequence, sent.sequence);
  EXPECT_EQ(got->gid, sent.gid);
  EXPECT_EQ(got->lid, sent.lid);
  EXPECT_EQ(got->receives, sent.receives);
  EXPECT_EQ(got->reads, sent.reads);
  // The layout that docs/transport-guide.md gives.
  const auto bytes = Encode(sent);
  EXPECT_EQ(bytes[0], std::byte{'K'});
  EXPECT_EQ(bytes[3], std::byte{'1'});
  EXPECT_EQ(bytes[4], std::byte{1});
  EXPECT_EQ(bytes[6], std::byte{2});
  EXPECT_EQ(bytes[8], std::byte{0x56});
  EXPECT_EQ(bytes[34], std::byte{64});
}

TEST(VerbsWire, GreetingsOutOfRangeAreNone) {
  const auto with = [](auto change) {
    Greeting greeting = SomeGreeting();
    change(&greeting);
    return DecodeGreeting(Encode(greeting)).has_value();
  };
  EXPECT_TRUE(with([](Greeting*) {}));
  EXPECT_FALSE(with([](Greeting* g) { g->mtu = 0; }));
  EXPECT_FALSE(with([](Greeting* g) { g->mtu = 6; }));
  EXPECT_FALSE(with([](Greeting* g) { g->queue = 1 << 24; }));
  EXPECT_FALSE(with([](Greeting* g) { g->sequence = 1 << 24; }));
  EXPECT_FALSE(with([](Greeting* g) { g->receives = 3; }));
  EXPECT_FALSE(with([](Greeting* g) { g->reads = 0; }));
  EXPECT_FALSE(with([](Greeting* g) { g->text_bytes = kMaxTextBytes + 1; }));
  EXPECT_FALSE(with([](Greeting* g) { g->type = static_cast<GreetingType>(0); }));
  EXPECT_FALSE(with([](Greeting* g) { g->type = static_cast<GreetingType>(5); }));
  EXPECT_TRUE(DecodeGreeting(Encode(Greeting{.type = GreetingType::kReady})).has_value());
  for (const size_t at : {0U, 3U, 4U, 5U, 37U}) {
    auto bytes = Encode(SomeGreeting());
    bytes[at] ^= std::byte{0x40};
    EXPECT_FALSE(DecodeGreeting(bytes).has_value()) << at;
  }
}

TEST(VerbsWire, RecordsComeBackAsTheyWere) {
  const RecordHeader sent{.type = RecordType::kGoodbye,
                          .last = false,
                          .credits = 40000,
                          .written = 0xDEADBEEF,
                          .read = 7};
  std::array<std::byte, kRecordHeaderBytes> bytes;
  Encode(sent, bytes);
  const auto got = DecodeRecordHeader(bytes);
  ASSERT_TRUE(got.has_value());
  EXPECT_EQ(got->type, sent.type);
  EXPECT_EQ(got->last, sent.last);
  EXPECT_EQ(got->credits, sent.credits);
  EXPECT_EQ(got->written, sent.written);
  EXPECT_EQ(got->read, sent.read);
  for (const uint8_t type : {0, 8, 255}) {
    bytes[0] = std::byte{type};
    EXPECT_FALSE(DecodeRecordHeader(bytes).has_value());
  }
  bytes[0] = std::byte{1};
  bytes[1] = std::byte{2};
  EXPECT_FALSE(DecodeRecordHeader(bytes).has_value());
}

TEST(VerbsWire, WindowsComeBackAsTheyWere) {
  const WindowRecord sent{.id = (uint64_t{9} << 16) | (kMaxWindows - 1),
                          .key = 0x1122334455667788,
                          .address = 0x7FFF12345678,
                          .length = 1 << 20,
                          .device_key = 0xCAFE01,
                          .access = 3};
  const auto bytes = Encode(sent);
  const auto got = DecodeWindow(bytes);
  ASSERT_TRUE(got.has_value());
  EXPECT_EQ(got->id, sent.id);
  EXPECT_EQ(got->key, sent.key);
  EXPECT_EQ(got->address, sent.address);
  EXPECT_EQ(got->length, sent.length);
  EXPECT_EQ(got->device_key, sent.device_key);
  EXPECT_EQ(got->access, sent.access);
  EXPECT_FALSE(DecodeWindow(std::span(bytes).first(39)).has_value());
  WindowRecord bad = sent;
  bad.id = kMaxWindows;
  EXPECT_FALSE(DecodeWindow(Encode(bad)).has_value());
  for (const uint32_t access : {0U, 4U}) {
    bad = sent;
    bad.access = access;
    EXPECT_FALSE(DecodeWindow(Encode(bad)).has_value());
  }
}

TEST(VerbsWire, ImmediatesOfSixteenBitsTravelWithTheWrite) {
  EXPECT_EQ(PackImmediate((uint64_t{5} << 16) | 0x1234, 0xFFFF), 0x1234FFFFU);
  EXPECT_EQ(PackImmediate(1, 0x10000), std::nullopt);
}

TEST(VerbsWire, NoiseIsRefusedOrDecoded) {
  Random random(4);
  std::array<std::byte, kGreetingBytes> bytes;
  for (int i = 0; i < 100000; ++i) {
    for (std::byte& byte : bytes) byte = static_cast<std::byte>(random.Next());
    EXPECT_FALSE(DecodeGreeting(bytes).has_value());
    const auto header = DecodeRecordHeader(std::span(bytes).first<kRecordHeaderBytes>());
    if (header) {
      EXPECT_LE(header->type, RecordType::kGoodbye);
    }
    const auto window = DecodeWindow(bytes);
    if (window) {
      EXPECT_LT(SlotOf(window->id), kMaxWindows);
    }
  }
}

TEST(VerbsFactory, WithoutADeviceOneSentenceSaysSo) {
  const TransportOptions options{.verbs = {.device = "no-such-device"}};
  const auto made = MakeTransport("verbs", options);
  ASSERT_EQ(made.status().code(), StatusCode::kUnsupported);
  EXPECT_NE(made.status().message().find("no RDMA device: "), std::string::npos)
      << made.status().message();
  EXPECT_EQ(made.status().message().find('\n'), std::string::npos);
}

}  // namespace
}  // namespace kvant::verbs
