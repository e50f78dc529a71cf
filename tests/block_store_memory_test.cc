// Counts every byte that a store allocates: what it says of its index is true, and after its
// construction it allocates nothing but what a manifest takes for the length of a call.
#include <gtest/gtest.h>

#include <atomic>
#include <cstdlib>
#include <new>

#include "cache_service/block_store.h"
#include "tests/block_maker.h"

namespace {
std::atomic<int64_t> live_bytes = 0;
std::atomic<int64_t> peak_bytes = 0;
constexpr size_t kHeader = 16;  // keeps the alignment of malloc
}  // namespace

// The compiler sees the header's offset and takes it for a mismatch of new and free.
#pragma GCC diagnostic ignored "-Wmismatched-new-delete"

void* operator new(size_t size) {
  void* const memory = std::malloc(size + kHeader);
  if (memory == nullptr) throw std::bad_alloc();
  *static_cast<size_t*>(memory) = size;
  const int64_t now = live_bytes += static_cast<int64_t>(size);
  if (now > peak_bytes) peak_bytes = now;
  return static_cast<char*>(memory) + kHeader;
}
void operator delete(void* memory) noexcept {
  if (memory == nullptr) return;
  void* const start = static_cast<char*>(memory) - kHeader;
  live_bytes -= static_cast<int64_t>(*static_cast<size_t*>(start));
  std::free(start);
}
void operator delete(void* memory, size_t) noexcept { operator delete(memory); }

namespace kvant {
namespace {

TEST(BlockStoreMemory, TheIndexIsCountedInFull) {
  for (const uint32_t blocks : {1U, 100U, 5000U}) {
    const uint32_t pins = blocks + 3;
    std::vector<std::byte> arena(1 << 16);
    BlockStoreOptions options;
    options.arena = arena;
    options.max_blocks = blocks;
    options.max_pins = pins;
    const int64_t before = live_bytes;
    BlockStore store(options);
    const int64_t taken = live_bytes - before;
    const auto said = static_cast<int64_t>(BlockStore::IndexBytes(blocks, pins, options.policy));
    EXPECT_LE(taken, said) << blocks;
    // And it is not a wild guess either.
    EXPECT_GE(taken + 20000, said * 3 / 4) << blocks;
    EXPECT_EQ(store.limit_bytes(), arena.size() + static_cast<uint64_t>(said));
  }
}

TEST(BlockStoreMemory, NothingGrowsAfterTheStart) {
  std::vector<std::byte> arena(1 << 16);
  BlockStoreOptions options;
  options.arena = arena;
  options.max_blocks = 200;
  BlockStore store(options);
  const int64_t after_start = live_bytes;
  for (uint64_t n = 1; n < 2000; ++n) {
    {
      const TestBlock block = MakeBlock(TestKey(n), n % 10 == 0 ? BlockKey{} : TestKey(n - 1), n);
      const auto reserved = store.Reserve({block.key, block.parent, block.payload.size(),
                                           MaxManifestBytes(9), 1, TimePoint::max()});
      ASSERT_TRUE(reserved.ok());
      std::copy(block.payload.begin(), block.payload.end(), reserved->payload.begin());
      ASSERT_TRUE(store.Seal(reserved->reservation, EncodeManifest(block.manifest)).ok());
      store.Touch(TestKey(n / 2));
    }
    ASSERT_EQ(live_bytes, after_start) << n;
  }
  EXPECT_GT(store.stats().evicted, 1000U);
}

}  // namespace
}  // namespace kvant
