// RangeAllocator, RegisteredArena: leases, back-pressure, quarantine.
#include "transport/arena.h"

#include <gtest/gtest.h>
#include <rapidcheck.h>

#include <map>

#include "transport/loopback.h"

namespace kvant {
namespace {

TEST(RangeAllocator, LendsAllOfItInAnyOrder) {
  RangeAllocator allocator(64 * 100, 200);
  std::vector<uint32_t> blocks;
  while (auto block = allocator.Allocate(64)) blocks.push_back(*block);
  EXPECT_EQ(blocks.size(), 100U);
  for (size_t i = 0; i < blocks.size(); i += 2) allocator.Free(blocks[i]);
  EXPECT_FALSE(allocator.Allocate(65)) << "free granules are apart";
  EXPECT_TRUE(allocator.Consistent());
  for (size_t i = 1; i < blocks.size(); i += 2) allocator.Free(blocks[i]);
  const auto whole = allocator.Allocate(64 * 100);
  ASSERT_TRUE(whole);
  EXPECT_EQ(allocator.offset(*whole), 0U);
  EXPECT_TRUE(allocator.Consistent());
}

TEST(RangeAllocator, RefusesWhenItsBookkeepingIsFull) {
  RangeAllocator allocator(64 * 100, 3);
  const auto first = allocator.Allocate(64);
  const auto second = allocator.Allocate(64);
  ASSERT_TRUE(first && second);
  EXPECT_FALSE(allocator.Allocate(64));
  EXPECT_TRUE(allocator.Consistent());
  allocator.Free(*second);
  EXPECT_TRUE(allocator.Allocate(64));
}

// Any sequence of lending and returning keeps blocks apart, the books right, and ends whole.
TEST(RangeAllocator, KeepsItsInvariants) {
  EXPECT_TRUE(rc::check([] {
    constexpr uint64_t kCapacity = 64 * 4096;
    RangeAllocator allocator(kCapacity, 512);
    std::map<uint64_t, uint32_t> lent;  // offset -> block
    const auto steps = *rc::gen::container<std::vector<uint32_t>>(rc::gen::arbitrary<uint32_t>());
    for (const uint32_t step : steps) {
      if (step % 3 != 0 || lent.empty()) {
        const uint64_t bytes = 1 + (step >> 2) % ((step & 4) != 0 ? kCapacity : 2000);
        const auto block = allocator.Allocate(bytes);
        if (!block) continue;
        const uint64_t begin = allocator.offset(*block);
        const uint64_t end = begin + allocator.size(*block);
        RC_ASSERT(allocator.size(*block) >= bytes && end <= kCapacity && begin % 64 == 0);
        const auto next = lent.lower_bound(begin);
        const bool before_next = next == lent.end() || next->first >= end;
        const bool after_previous =
            next == lent.begin() ||
            std::prev(next)->first + allocator.size(std::prev(next)->second) <= begin;
        RC_ASSERT(before_next);
        RC_ASSERT(after_previous);
        lent[begin] = *block;
      } else {
        const auto victim = std::next(lent.begin(), (step >> 2) % lent.size());
        allocator.Free(victim->second);
        lent.erase(victim);
      }
      RC_ASSERT(allocator.Consistent());
    }
    for (const auto& [offset, block] : lent) allocator.Free(block);
    RC_ASSERT(allocator.Consistent());
    RC_ASSERT(allocator.Allocate(kCapacity).has_value());
  }));
}

// A region whose receives cannot be called off until told.
class StickyRegion : public MemoryRegion {
 public:
  StickyRegion(std::unique_ptr<MemoryRegion> inner, const bool* landing)
      : inner_(std::move(inner)), landing_(landing) {}
  std::span<std::byte> bytes() const override { return inner_->bytes(); }
  Result<RemoteWindow> Expose(EndpointId peer, uint64_t offset, uint64_t length,
                              Access access) override {
    return inner_->Expose(peer, offset, length, access);
  }
  bool Revoke(uint64_t id) override { return inner_->Revoke(id) && !*landing_; }
  bool Landing(uint64_t) const override { return *landing_; }

 private:
  std::unique_ptr<MemoryRegion> inner_;
  const bool* landing_;
};

class StickyTransport : public Transport {
 public:
  const Capabilities& capabilities() const override { return inner_->capabilities(); }
  Result<std::string> Listen(std::string_view address) override { return inner_->Listen(address); }
  Result<Endpoint*> Connect(std::string_view address, Duration timeout) override {
    return inner_->Connect(address, timeout);
  }
  Endpoint* Find(EndpointId id) override { return inner_->Find(id); }
  Result<std::unique_ptr<MemoryRegion>> Register(std::span<std::byte> memory) override {
    KV_ASSIGN_OR_RETURN(auto inner, inner_->Register(memory));
    return std::unique_ptr<MemoryRegion>(new StickyRegion(std::move(inner), &landing));
  }
  void Poll(std::vector<Event>* events) override { inner_->Poll(events); }
  void Wait(Duration at_most) override { inner_->Wait(at_most); }
  LinkCounters counters() const override { return inner_->counters(); }

  bool landing = false;

 private:
  LoopbackHub hub_;
  std::unique_ptr<Transport> inner_ = hub_.MakeTransport();
};

class ArenaTest : public ::testing::Test {
 protected:
  std::unique_ptr<RegisteredArena> Make(uint64_t bytes) {
    auto arena = RegisteredArena::Create(&transport_, {.bytes = bytes, .huge_pages = false});
    EXPECT_TRUE(arena.ok()) << arena.status().ToString();
    return *std::move(arena);
  }
  StickyTransport transport_;
};

TEST_F(ArenaTest, LeasesReturnWhatTheyTook) {
  auto arena = Make(10000);
  EXPECT_EQ(arena->use().capacity_bytes, 12288U) << "whole pages";
  auto first = arena->Lend(5000);
  ASSERT_TRUE(first.ok());
  EXPECT_EQ(first->size(), 5000U);
  EXPECT_EQ(reinterpret_cast<uintptr_t>(first->bytes().data()) % 64, 0U);
  EXPECT_EQ(arena->bytes().data() + first->offset(), first->bytes().data());
  auto second = arena->Lend(9000);
  EXPECT_EQ(second.status().code(), StatusCode::kResourceExhausted);
  EXPECT_EQ(arena->use().exhausted, 1U);
  Lease moved = *std::move(first);
  EXPECT_EQ(arena->use().leases, 1U);
  moved.Reset();
  EXPECT_FALSE(moved);
  EXPECT_EQ(arena->use().lent_bytes, 0U);
  EXPECT_EQ(arena->use().high_water_bytes, 5056U);
  EXPECT_TRUE(arena->Lend(9000).ok());
  EXPECT_EQ(arena->Lend(0).status().code(), StatusCode::kInvalidArgument);
  EXPECT_EQ(arena->Lend(20000).status().code(), StatusCode::kInvalidArgument);
}

TEST_F(ArenaTest, AWindowHoldsTheMemoryOfAGoneLease) {
  auto arena = Make(4096);
  auto lease = arena->Lend(4096);
  ASSERT_TRUE(lease.ok());
  EXPECT_FALSE(arena->Expose(*lease, 1, 4000, 97, Access::kRemoteRead).ok());
  auto window = arena->Expose(*lease, 1, 0, 4096, Access::kRemoteWrite);
  ASSERT_TRUE(window.ok());
  EXPECT_EQ(window->remote().length, 4096U);
  lease->Reset();
  EXPECT_FALSE(arena->Lend(64).ok());
  EXPECT_TRUE(window->Revoke());
  EXPECT_TRUE(arena->Lend(64).ok());
}

TEST_F(ArenaTest, LandingMemoryIsQuarantined) {
  auto arena = Make(4096);
  {
    auto lease = arena->Lend(4096);
    ASSERT_TRUE(lease.ok());
    auto window = arena->Expose(*lease, 1, 0, 100, Access::kRemoteWrite);
    ASSERT_TRUE(window.ok());
    transport_.landing = true;
  }
  EXPECT_EQ(arena->use().quarantined_bytes, 4096U);
  EXPECT_EQ(arena->use().leases, 0U);
  EXPECT_FALSE(arena->Lend(64).ok()) << "memory in which bytes still land was lent";
  EXPECT_EQ(arena->Collect(), 1U);
  transport_.landing = false;
  EXPECT_TRUE(arena->Lend(64).ok()) << "Lend collects what has landed";
  EXPECT_EQ(arena->use().quarantined_bytes, 0U);
}

TEST_F(ArenaTest, MayEndWhileBytesStillLand) {
  auto arena = Make(4096);
  {
    auto lease = arena->Lend(4096);
    ASSERT_TRUE(lease.ok());
    auto window = arena->Expose(*lease, 1, 0, 100, Access::kRemoteWrite);
    ASSERT_TRUE(window.ok());
    transport_.landing = true;
  }
  const std::span<std::byte> memory = arena->bytes();
  arena.reset();
  memory[99] = std::byte{1};  // still mapped, for what comes
}

TEST_F(ArenaTest, SaysWhatCannotBe) {
  EXPECT_FALSE(RegisteredArena::Create(&transport_, {.bytes = 0}).ok());
  EXPECT_FALSE(RegisteredArena::Create(&transport_, {.bytes = 1, .max_leases = 0}).ok());
  EXPECT_EQ(RegisteredArena::Create(&transport_, {.bytes = uint64_t{1} << 47, .huge_pages = false})
                .status()
                .code(),
            StatusCode::kResourceExhausted);
}

}  // namespace
}  // namespace kvant
