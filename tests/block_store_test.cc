// The block store: reserve, seal, pin, evict, its limits, and random histories against a model.
#include "cache_service/block_store.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <map>
#include <set>
#include <vector>

#include "cache_service/interval_set.h"
#include "tests/block_maker.h"

namespace kvant {
namespace {

TimePoint At(int64_t ms) { return TimePoint(std::chrono::milliseconds(ms)); }

struct StoreFixture {
  explicit StoreFixture(uint64_t arena_bytes = 64 << 10, uint32_t max_blocks = 1000,
                        uint32_t max_pins = 64, uint64_t user_pinned = 1 << 20)
      : arena(arena_bytes) {
    BlockStoreOptions options;
    options.arena = arena;
    options.max_blocks = max_blocks;
    options.max_pins = max_pins;
    options.max_user_pinned_bytes = user_pinned;
    store = std::make_unique<BlockStore>(options);
  }
  Result<ReserveResult> Reserve(const TestBlock& block, OwnerId owner = 1,
                                TimePoint deadline = At(1000)) {
    return store->Reserve({block.key, block.parent, block.payload.size(),
                           MaxManifestBytes(block.manifest.rows.size()), owner, deadline});
  }
  Status Put(const TestBlock& block) {
    const Result<ReserveResult> reserved = Reserve(block);
    if (!reserved.ok()) return reserved.status();
    if (reserved->found != BlockState::kAbsent) return OkStatus();
    std::copy(block.payload.begin(), block.payload.end(), reserved->payload.begin());
    return store->Seal(reserved->reservation, EncodeManifest(block.manifest));
  }
  BlockState Find(const TestBlock& block) const { return store->Find(block.key); }
  void ExpectSound() const { EXPECT_EQ(store->CheckInvariants(), ""); }

  std::vector<std::byte> arena;
  std::unique_ptr<BlockStore> store;
};

TestBlock Numbered(uint64_t n, uint64_t parent = 0) {
  return MakeBlock(TestKey(n), parent == 0 ? BlockKey{} : TestKey(parent), n);
}

TEST(BlockStore, PublishesInTwoPhases) {
  StoreFixture f;
  const TestBlock block = Numbered(1);
  const Result<ReserveResult> first = f.Reserve(block);
  ASSERT_TRUE(first.ok());
  EXPECT_EQ(f.Find(block), BlockState::kReserved);
  EXPECT_FALSE(f.store->View(block.key).has_value());
  EXPECT_EQ(f.Reserve(block)->found, BlockState::kReserved);
  std::copy(block.payload.begin(), block.payload.end(), first->payload.begin());
  ASSERT_TRUE(f.store->Seal(first->reservation, EncodeManifest(block.manifest)).ok());
  EXPECT_EQ(f.Reserve(block)->found, BlockState::kPresent);
  const std::optional<BlockView> view = f.store->View(block.key);
  ASSERT_TRUE(view.has_value());
  EXPECT_TRUE(std::equal(view->payload.begin(), view->payload.end(), block.payload.begin()));
  EXPECT_EQ(*ParseManifest(view->manifest), block.manifest);
  EXPECT_EQ(f.store->Seal(first->reservation, {}).code(), StatusCode::kInvalidArgument);
  f.ExpectSound();
}

TEST(BlockStore, SealRefusesWhatDoesNotMatch) {
  StoreFixture f;
  TestBlock block = Numbered(1);
  const auto seal = [&](auto&& spoil) {
    const Result<ReserveResult> reserved = f.Reserve(block);
    EXPECT_TRUE(reserved.ok());
    std::copy(block.payload.begin(), block.payload.end(), reserved->payload.begin());
    BlockManifest manifest = block.manifest;
    spoil(*reserved, manifest);
    const Status status = f.store->Seal(reserved->reservation, EncodeManifest(manifest));
    EXPECT_EQ(f.Find(block), BlockState::kAbsent);
    EXPECT_EQ(f.store->stats().used_bytes, StoreFixture().store->stats().used_bytes);
    return status.code();
  };
  EXPECT_EQ(seal([](auto& r, auto&) { r.payload[5] ^= std::byte{1}; }), StatusCode::kDataLoss);
  EXPECT_EQ(seal([](auto&, auto& m) { m.key = TestKey(2); }), StatusCode::kInvalidArgument);
  EXPECT_EQ(seal([](auto&, auto& m) { m.rows.pop_back(); }), StatusCode::kInvalidArgument);
  f.ExpectSound();
}

TEST(BlockStore, RefusesImpossibleSizes) {
  StoreFixture f;
  const BlockKey key = TestKey(1);
  EXPECT_EQ(f.store->Reserve({key, {}, 0, 100, 1, At(1)}).status().code(),
            StatusCode::kInvalidArgument);
  EXPECT_EQ(f.store->Reserve({key, {}, 100, 0, 1, At(1)}).status().code(),
            StatusCode::kInvalidArgument);
  EXPECT_EQ(f.store->Reserve({key, {}, 1 << 20, 100, 1, At(1)}).status().code(),
            StatusCode::kInvalidArgument);
  EXPECT_EQ(f.store->Reserve({key, key, 100, 100, 1, At(1)}).status().code(),
            StatusCode::kInvalidArgument);
  EXPECT_EQ(f.store->Reserve({{}, {}, 100, 100, 1, At(1)}).status().code(),
            StatusCode::kInvalidArgument);
  f.ExpectSound();
}

TEST(BlockStore, GivesUpLeavesFirst) {
  StoreFixture f(64 << 10, 8);
  for (uint64_t n = 1; n <= 8; ++n) ASSERT_TRUE(f.Put(Numbered(n, n - 1)).ok());
  for (uint64_t n = 101; n <= 106; ++n) ASSERT_TRUE(f.Put(Numbered(n)).ok());
  // Whatever is left of the chain is its beginning.
  bool gone = false;
  for (uint64_t n = 1; n <= 8; ++n) {
    const bool present = f.Find(Numbered(n)) == BlockState::kPresent;
    EXPECT_FALSE(gone && present) << n;
    gone = gone || !present;
  }
  EXPECT_TRUE(gone);
  f.ExpectSound();
}

TEST(BlockStore, PinsHoldUntilTheirDeadline) {
  StoreFixture f(64 << 10, 4);
  for (uint64_t n = 1; n <= 4; ++n) ASSERT_TRUE(f.Put(Numbered(n)).ok());
  std::vector<PinId> pins;
  for (uint64_t n = 1; n <= 4; ++n) pins.push_back(*f.store->Pin(TestKey(n), 7, At(100)));
  EXPECT_EQ(f.Put(Numbered(5)).code(), StatusCode::kResourceExhausted);
  f.store->Reap(At(99));
  EXPECT_EQ(f.Put(Numbered(5)).code(), StatusCode::kResourceExhausted);
  f.store->Unpin(pins[2]);
  EXPECT_TRUE(f.Put(Numbered(5)).ok());
  EXPECT_EQ(f.Find(Numbered(3)), BlockState::kAbsent);
  f.store->Reap(At(100));
  EXPECT_EQ(f.store->stats().pins, 0U);
  EXPECT_TRUE(f.Put(Numbered(6)).ok());
  EXPECT_FALSE(f.store->Pin(TestKey(3), 7, At(100)).ok());
  f.ExpectSound();
}

TEST(BlockStore, UserPinsHaveACap) {
  StoreFixture f(64 << 10, 16, 64, 2000);
  for (uint64_t n = 1; n <= 3; ++n) ASSERT_TRUE(f.Put(Numbered(n)).ok());  // 900 bytes each
  EXPECT_TRUE(f.store->SetUserPin(TestKey(1), At(50)).ok());
  EXPECT_TRUE(f.store->SetUserPin(TestKey(1), At(60)).ok());
  EXPECT_TRUE(f.store->SetUserPin(TestKey(2), At(50)).ok());
  EXPECT_EQ(f.store->SetUserPin(TestKey(3), At(50)).code(), StatusCode::kResourceExhausted);
  EXPECT_EQ(f.store->stats().user_pinned_bytes, 1800U);
  f.store->ReleaseOwner(1);
  EXPECT_EQ(f.store->stats().user_pinned_bytes, 1800U);
  EXPECT_TRUE(f.store->SetUserPin(TestKey(1), std::nullopt).ok());
  EXPECT_TRUE(f.store->SetUserPin(TestKey(3), At(50)).ok());
  f.store->Reap(At(50));
  EXPECT_EQ(f.store->stats().user_pinned_bytes, 0U);
  EXPECT_EQ(f.store->SetUserPin(TestKey(9), At(50)).code(), StatusCode::kUnavailable);
  f.ExpectSound();
}

TEST(BlockStore, MemoryIsNotLentWhileBytesMayLand) {
  StoreFixture f(2048, 4);
  const TestBlock block = Numbered(1);
  const Result<ReserveResult> reserved = f.Reserve(block);
  ASSERT_TRUE(f.store->AddLanding(reserved->reservation, +1));
  f.store->ReleaseOwner(1);
  EXPECT_EQ(f.Find(block), BlockState::kAbsent);
  EXPECT_FALSE(f.store->AddLanding(reserved->reservation, +1));
  EXPECT_EQ(f.Put(block).code(), StatusCode::kResourceExhausted);
  f.ExpectSound();
  EXPECT_TRUE(f.store->AddLanding(reserved->reservation, -1));
  EXPECT_TRUE(f.Put(block).ok());
  EXPECT_FALSE(f.store->AddLanding(reserved->reservation, -1));
  f.ExpectSound();
}

TEST(BlockStore, ReapsAbandonedReservations) {
  StoreFixture f;
  ASSERT_TRUE(f.Reserve(Numbered(1), 1, At(10)).ok());
  ASSERT_TRUE(f.Reserve(Numbered(2, 1), 1, At(20)).ok());
  f.store->Reap(At(10));
  EXPECT_EQ(f.Find(Numbered(1)), BlockState::kAbsent);
  EXPECT_EQ(f.Find(Numbered(2)), BlockState::kReserved);
  f.ExpectSound();
  f.store->Reap(At(20));
  EXPECT_EQ(f.store->stats().reservations, 0U);
  EXPECT_EQ(f.store->stats().reaped, 2U);
  f.ExpectSound();
}

TEST(BlockStore, ABadBlockIsInvisibleAtOnceAndGoesWithItsLastReader) {
  StoreFixture f;
  const TestBlock block = Numbered(1);
  const TestBlock child = Numbered(2, 1);
  ASSERT_TRUE(f.Put(block).ok());
  ASSERT_TRUE(f.Put(child).ok());
  const PinId pin = *f.store->Pin(block.key, 3, TimePoint::max());
  ASSERT_TRUE(f.store->SetUserPin(block.key, At(1000)).ok());
  EXPECT_TRUE(f.store->Reverify(block.key).ok());
  f.store->View(block.key)->payload[17] ^= std::byte{4};
  EXPECT_EQ(f.store->Reverify(block.key).code(), StatusCode::kDataLoss);
  EXPECT_EQ(f.Find(block), BlockState::kAbsent);
  f.ExpectSound();
  // It may be put again while the old memory is still being read.
  ASSERT_TRUE(f.Put(block).ok());
  const uint64_t used = f.store->stats().used_bytes;
  f.store->Unpin(pin);
  EXPECT_LT(f.store->stats().used_bytes, used);
  EXPECT_EQ(f.Find(child), BlockState::kPresent);
  EXPECT_EQ(f.store->stats().dropped_corrupt, 1U);
  f.ExpectSound();
}

// Keys are hashes, so only a liar can say this; it must not make blocks stay for ever.
TEST(BlockStore, ACircleOfParentsDoesNotStickInTheStore) {
  StoreFixture f(64 << 10, 4);
  ASSERT_TRUE(f.Put(Numbered(1, 2)).ok());
  ASSERT_TRUE(f.Put(Numbered(2, 3)).ok());
  ASSERT_TRUE(f.Put(Numbered(3, 1)).ok());
  f.ExpectSound();
  for (uint64_t n = 10; n < 20; ++n) ASSERT_TRUE(f.Put(Numbered(n)).ok()) << n;
  f.ExpectSound();
}

TEST(BlockStore, AScanPassesByWhatIsUsed) {
  StoreFixture f(1 << 20, 100);
  for (uint64_t n = 1; n <= 20; ++n) ASSERT_TRUE(f.Put(Numbered(n)).ok());
  for (uint64_t n = 1; n <= 20; ++n) f.store->Touch(TestKey(n));
  for (uint64_t n = 1000; n < 2000; ++n) ASSERT_TRUE(f.Put(Numbered(n)).ok());
  for (uint64_t n = 1; n <= 20; ++n) EXPECT_EQ(f.Find(Numbered(n)), BlockState::kPresent) << n;
  f.ExpectSound();
}

// Random operations beside a model that knows only what was promised.
TEST(BlockStore, KeepsItsInvariantsUnderRandomOperations) {
  for (uint64_t seed = 1; seed <= 40; ++seed) {
    SCOPED_TRACE(seed);
    Random random(seed);
    StoreFixture f(8 << 10 << random.Below(3), 1 + static_cast<uint32_t>(random.Below(24)), 12,
                   4000);
    std::map<uint64_t, ReservationId> reserved;  // by block
    std::map<PinId, uint64_t> pinned;            // to block
    std::map<ReservationId, int> landing;
    const auto block_of = [&](uint64_t n) {
      return MakeBlock(TestKey(n), n % 8 == 0 ? BlockKey{} : TestKey(n - 1), n, 1 + n % 3,
                       60 + n * 7);
    };
    for (int step = 0; step < 600; ++step) {
      const uint64_t n = 1 + random.Below(40);
      const TestBlock block = block_of(n);
      std::set<uint64_t> before;
      for (uint64_t m = 1; m <= 40; ++m) {
        if (f.store->Find(TestKey(m)) == BlockState::kPresent) before.insert(m);
      }
      switch (random.Below(8)) {
        case 0:
        case 1:
        case 2: {
          const auto result = f.Reserve(block, 1 + n % 2, At(1000000));
          if (result.ok() && result->found == BlockState::kAbsent) {
            reserved[n] = result->reservation;
            std::copy(block.payload.begin(), block.payload.end(), result->payload.begin());
          }
          break;
        }
        case 3:
          if (reserved.contains(n) && landing[reserved[n]] == 0) {
            EXPECT_TRUE(f.store->Seal(reserved[n], EncodeManifest(block.manifest)).ok());
            reserved.erase(n);
          }
          break;
        case 4:
          if (reserved.contains(n)) {
            f.store->Abort(reserved[n]);
            reserved.erase(n);
          }
          break;
        case 5: {
          const auto pin = f.store->Pin(block.key, 3, TimePoint::max());
          if (pin.ok()) pinned[*pin] = n;
          break;
        }
        case 6:
          if (!pinned.empty()) {
            const auto pin =
                std::next(pinned.begin(), static_cast<ptrdiff_t>(random.Below(pinned.size())));
            f.store->Unpin(pin->first);
            pinned.erase(pin);
          }
          break;
        default:
          if (reserved.contains(n) && f.store->AddLanding(reserved[n], +1)) ++landing[reserved[n]];
          for (auto& [id, count] : landing) {
            if (count == 0 || random.Chance(0.3)) continue;
            EXPECT_TRUE(f.store->AddLanding(id, -1));
            --count;
          }
      }
      ASSERT_EQ(f.store->CheckInvariants(), "");
      ASSERT_LE(f.store->stats().used_bytes, f.store->limit_bytes());
      std::set<uint64_t> after;
      for (uint64_t m = 1; m <= 40; ++m) {
        if (f.store->Find(TestKey(m)) == BlockState::kPresent) after.insert(m);
      }
      for (const uint64_t m : before) {
        if (after.contains(m)) continue;
        for (const auto& [pin, block_number] : pinned)
          EXPECT_NE(block_number, m) << "pinned, evicted";
        // Its child, if it was stored or being written before, went first.
        const bool has_child = m % 8 != 7 && (after.contains(m + 1) || reserved.contains(m + 1));
        EXPECT_FALSE(has_child && before.contains(m + 1)) << m << " orphaned " << m + 1;
      }
      for (const uint64_t m : after) {
        const BlockView view = *f.store->View(TestKey(m));
        ASSERT_TRUE(VerifyPayload(*ParseManifest(view.manifest), view.payload).ok());
      }
    }
  }
}

TEST(PlanStore, SplitsABudget) {
  for (const uint64_t memory : {uint64_t{1} << 20, uint64_t{64} << 20, uint64_t{8} << 30}) {
    const Result<StorePlan> plan = PlanStore(memory, 16 << 10);
    ASSERT_TRUE(plan.ok());
    EXPECT_LE(plan->arena_bytes + plan->index_bytes, memory);
    EXPECT_GE(plan->arena_bytes, memory * 9 / 10);
  }
  EXPECT_FALSE(PlanStore(1000, 16 << 10).ok());
  EXPECT_FALSE(PlanStore(1 << 30, 1).ok());
}

TEST(IntervalSet, GivesBackWhatIsNew) {
  for (uint64_t seed = 0; seed < 200; ++seed) {
    Random random(seed);
    IntervalSet set;
    std::vector<bool> model(64, false);
    for (int i = 0; i < 30; ++i) {
      const uint64_t begin = random.Below(64);
      const uint64_t end = begin + random.Below(65 - begin);
      std::vector<bool> fresh(64, false);
      for (const Interval& piece : set.Add({begin, end})) {
        ASSERT_LT(piece.begin, piece.end);
        for (uint64_t at = piece.begin; at < piece.end; ++at) fresh[at] = true;
      }
      for (uint64_t at = 0; at < 64; ++at) {
        const bool expected = at >= begin && at < end && !model[at];
        ASSERT_EQ(fresh[at], expected) << seed << " " << at;
        model[at] = model[at] || expected;
      }
    }
    size_t pieces = 0;
    for (size_t at = 0; at < 64; ++at) pieces += model[at] && (at == 0 || !model[at - 1]);
    EXPECT_EQ(set.pieces(), pieces);
  }
}

}  // namespace
}  // namespace kvant
