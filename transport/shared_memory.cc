#include "transport/shared_memory.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>

namespace kvant {
namespace {

constexpr int kSeals = F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_SEAL;

Result<std::span<std::byte>> MapFile(int fd, uint64_t bytes) {
  void* start = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
  if (start == MAP_FAILED) {
    return MakeStatus(StatusCode::kResourceExhausted, "mapping {} bytes of shared memory: {}",
                      bytes, std::strerror(errno));
  }
  return std::span(static_cast<std::byte*>(start), bytes);
}

}  // namespace

SharedMemory::~SharedMemory() {
  if (!bytes_.empty()) munmap(bytes_.data(), bytes_.size());
}

Result<SharedMemory> SharedMemory::Create(uint64_t bytes) {
  tcp::Socket file(memfd_create("kvant", MFD_CLOEXEC | MFD_ALLOW_SEALING));
  if (!file || ftruncate(file.fd(), static_cast<off_t>(bytes)) != 0 ||
      fcntl(file.fd(), F_ADD_SEALS, kSeals) != 0) {
    return MakeStatus(StatusCode::kResourceExhausted,
                      "making {} bytes of shared memory: {}; ask for less, or raise ulimit -n",
                      bytes, std::strerror(errno));
  }
  KV_ASSIGN_OR_RETURN(const std::span<std::byte> mapped, MapFile(file.fd(), bytes));
  return SharedMemory(std::move(file), mapped);
}

Result<SharedMemory> SharedMemory::Map(tcp::Socket file, uint64_t bytes) {
  struct stat status = {};
  if (fstat(file.fd(), &status) != 0 || static_cast<uint64_t>(status.st_size) != bytes ||
      bytes == 0) {
    return InvalidArgument("mapping a peer's memory: it has not the {} bytes that were said",
                           bytes);
  }
  const int seals = fcntl(file.fd(), F_GET_SEALS);
  if (seals < 0 || (seals & F_SEAL_SHRINK) == 0) {
    return InvalidArgument("mapping a peer's memory: it is not sealed against shrinking");
  }
  KV_ASSIGN_OR_RETURN(const std::span<std::byte> mapped, MapFile(file.fd(), bytes));
  return SharedMemory(std::move(file), mapped);
}

}  // namespace kvant
