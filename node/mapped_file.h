// A file's bytes in memory without reading them first.
#pragma once

#include <cstddef>
#include <filesystem>
#include <memory>
#include <span>

#include "base/status.h"

namespace kvant::node {

// A whole file, mapped read-only. Immutable. The file must not be truncated while it lives: reading
// what is gone ends the process.
class MappedFile {
 public:
  // kInvalidArgument: it cannot be opened, or is no regular file with content.
  static Result<std::unique_ptr<MappedFile>> Open(const std::filesystem::path& path);
  ~MappedFile();
  MappedFile(const MappedFile&) = delete;
  MappedFile& operator=(const MappedFile&) = delete;

  std::span<const std::byte> bytes() const { return {static_cast<const std::byte*>(base_), size_}; }
  // Gives back the memory of the pages that lie wholly in `part` of bytes(); they may be read
  // again.
  void Release(std::span<const std::byte> part) const;

 private:
  MappedFile(void* base, size_t size) : base_(base), size_(size) {}
  void* base_;
  size_t size_;
};

}  // namespace kvant::node
