#include "node/mapped_file.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>

namespace kvant::node {

Result<std::unique_ptr<MappedFile>> MappedFile::Open(const std::filesystem::path& path) {
  // Non-blocking: opening a pipe would wait for its writer.
  const int file = ::open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK);
  if (file < 0) return InvalidArgument("opening {}: {}", path.string(), std::strerror(errno));
  struct stat about {};
  const bool known = ::fstat(file, &about) == 0 && S_ISREG(about.st_mode);
  if (!known || about.st_size <= 0) {
    ::close(file);
    return InvalidArgument("{}: not a regular file with content", path.string());
  }
  const auto size = static_cast<size_t>(about.st_size);
  void* base = ::mmap(nullptr, size, PROT_READ, MAP_PRIVATE, file, 0);
  const int mmap_error = errno;
  ::close(file);
  if (base == MAP_FAILED) {
    return InvalidArgument("mapping {}: {}", path.string(), std::strerror(mmap_error));
  }
  return std::unique_ptr<MappedFile>(new MappedFile(base, size));
}

void MappedFile::Release(std::span<const std::byte> part) const {
  const auto page = static_cast<size_t>(::sysconf(_SC_PAGESIZE));
  const auto first = static_cast<size_t>(part.data() - static_cast<const std::byte*>(base_));
  const size_t begin = (first + page - 1) / page * page;
  const size_t end = (first + part.size()) / page * page;
  // Advice: where it is not taken, the pages stay until they are needed elsewhere.
  if (begin < end) ::madvise(static_cast<std::byte*>(base_) + begin, end - begin, MADV_DONTNEED);
}

MappedFile::~MappedFile() { ::munmap(base_, size_); }

}  // namespace kvant::node
