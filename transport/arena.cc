#include "transport/arena.h"

#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cstring>

#include "base/bytes.h"

namespace kvant {

Lease& Lease::operator=(Lease&& other) noexcept {
  if (this == &other) return *this;
  Reset();
  arena_ = std::exchange(other.arena_, nullptr);
  block_ = other.block_;
  offset_ = std::exchange(other.offset_, 0);
  bytes_ = std::exchange(other.bytes_, {});
  return *this;
}

void Lease::Reset() {
  if (arena_ == nullptr) return;
  --arena_->use_.leases;
  std::exchange(arena_, nullptr)->Drop(block_);
  offset_ = 0;
  bytes_ = {};
}

ExposedWindow& ExposedWindow::operator=(ExposedWindow&& other) noexcept {
  if (this == &other) return *this;
  Revoke();
  arena_ = std::exchange(other.arena_, nullptr);
  block_ = other.block_;
  remote_ = std::exchange(other.remote_, {});
  return *this;
}

bool ExposedWindow::Revoke() {
  if (arena_ == nullptr) return true;
  return std::exchange(arena_, nullptr)->Revoke(std::exchange(remote_, {}).id, block_);
}

Result<std::unique_ptr<RegisteredArena>> RegisteredArena::Create(Transport* transport,
                                                                 const ArenaOptions& options) {
  const auto page = static_cast<uint64_t>(sysconf(_SC_PAGESIZE));
  if (options.bytes == 0 || options.bytes > (uint64_t{1} << 48)) {
    return InvalidArgument("mapping an arena of {} bytes: give between 1 byte and 256 TiB",
                           options.bytes);
  }
  if (options.max_leases == 0) {
    return InvalidArgument("mapping an arena with room for no lease: give max_leases of 1 or more");
  }
  const uint64_t bytes = (options.bytes + page - 1) / page * page;
  KV_ASSIGN_OR_RETURN(const std::span<std::byte> memory, transport->MapPages(bytes));
  // Only advice: without huge pages everything works, with more TLB misses.
  if (options.huge_pages) madvise(memory.data(), bytes, MADV_HUGEPAGE);
  if (options.populate) std::memset(memory.data(), 0, bytes);
  auto region = transport->Register(memory);
  if (!region.ok()) {
    transport->UnmapPages(memory);
    return region.status();
  }
  return std::unique_ptr<RegisteredArena>(
      new RegisteredArena(transport, memory, *std::move(region), options.max_leases));
}

RegisteredArena::RegisteredArena(Transport* transport, std::span<std::byte> memory,
                                 std::unique_ptr<MemoryRegion> region, uint32_t max_leases)
    : transport_(transport),
      memory_(memory),
      region_(std::move(region)),
      allocator_(memory.size(), max_leases),
      holders_(max_leases) {
  use_.capacity_bytes = memory.size();
  // Windows beyond this many at once in quarantine are an unusual storm; growing then is fine.
  quarantine_.reserve(1024);
}

RegisteredArena::~RegisteredArena() {
  const bool landing = Collect() > 0;
  const ArenaUse last = use();
  KV_CHECK(last.leases == 0 && last.lent_bytes == last.quarantined_bytes);
  region_.reset();
  // Where a receive cannot be called off, its memory must stay mapped until the process ends.
  if (!landing) transport_->UnmapPages(memory_);
}

Result<Lease> RegisteredArena::Lend(uint64_t bytes) {
  if (bytes == 0 || bytes > memory_.size()) {
    return InvalidArgument(
        "leasing {} bytes of an arena of {}: ask for at least 1 byte and no more "
        "than it has",
        bytes, memory_.size());
  }
  auto block = allocator_.Allocate(bytes);
  if (!block && !quarantine_.empty()) {
    Collect();
    block = allocator_.Allocate(bytes);
  }
  if (!block) {
    ++use_.exhausted;
    return MakeStatus(StatusCode::kResourceExhausted,
                      "leasing {} bytes: {} of the arena's {} are lent; wait until leases return",
                      bytes, use_.lent_bytes, use_.capacity_bytes);
  }
  Lease lease;
  lease.arena_ = this;
  lease.block_ = *block;
  lease.offset_ = allocator_.offset(*block);
  lease.bytes_ = memory_.subspan(lease.offset_, bytes);
  Hold(*block);
  ++use_.leases;
  use_.lent_bytes += allocator_.size(*block);
  use_.high_water_bytes = std::max(use_.high_water_bytes, use_.lent_bytes);
  return lease;
}

Result<ExposedWindow> RegisteredArena::Expose(const Lease& lease, EndpointId peer, uint64_t offset,
                                              uint64_t length, Access access) {
  KV_CHECK(lease.arena_ == this);
  if (!RangeFits(offset, length, lease.size())) {
    return InvalidArgument("exposing [{}, +{}) of a lease of {} bytes to endpoint {}: outside it",
                           offset, length, lease.size(), peer);
  }
  KV_ASSIGN_OR_RETURN(RemoteWindow remote,
                      region_->Expose(peer, lease.offset() + offset, length, access));
  ExposedWindow window;
  window.arena_ = this;
  window.block_ = lease.block_;
  window.remote_ = remote;
  Hold(lease.block_);
  return window;
}

void RegisteredArena::Drop(uint32_t block) {
  KV_CHECK(holders_[block] > 0);
  if (--holders_[block] > 0) return;
  use_.lent_bytes -= allocator_.size(block);
  allocator_.Free(block);
}

bool RegisteredArena::Revoke(uint64_t window, uint32_t block) {
  if (region_->Revoke(window)) {
    Drop(block);
    return true;
  }
  quarantine_.push_back({window, block});
  return false;
}

size_t RegisteredArena::Collect() {
  std::erase_if(quarantine_, [this](const Quarantined& entry) {
    if (region_->Landing(entry.window)) return false;
    Drop(entry.block);
    return true;
  });
  return quarantine_.size();
}

ArenaUse RegisteredArena::use() const {
  ArenaUse use = use_;
  use.quarantined_bytes = 0;
  for (size_t i = 0; i < quarantine_.size(); ++i) {
    const uint32_t block = quarantine_[i].block;
    const bool counted =
        std::any_of(quarantine_.begin(), quarantine_.begin() + static_cast<ptrdiff_t>(i),
                    [block](const Quarantined& e) { return e.block == block; });
    if (!counted) use.quarantined_bytes += allocator_.size(block);
  }
  return use;
}

}  // namespace kvant
