// Arrays for numpy: files in the NPY format, version 1.0.
#pragma once

#include <cstddef>
#include <cstdio>
#include <memory>
#include <span>
#include <string>

#include "base/status.h"

namespace kvant::node {

// Writes an array [rows][columns] of fp32, row by row. The bytes go to a file of the same name and
// ".part", which Finish renames: what stands under the name is whole. Single-owner.
class NpyWriter {
 public:
  // kInvalidArgument: the file cannot be written there.
  static Result<std::unique_ptr<NpyWriter>> Create(const std::string& path, size_t rows,
                                                   size_t columns);
  // Without Finish, removes what was written.
  ~NpyWriter();
  NpyWriter(const NpyWriter&) = delete;
  NpyWriter& operator=(const NpyWriter&) = delete;

  // values: whole rows, in order. kUnavailable: the disk does not take them.
  Status Append(std::span<const float> values);
  // REQUIRES: all rows were appended.
  Status Finish();

 private:
  NpyWriter(std::string path, size_t values);
  Status Failure(const char* doing) const;

  std::string path_;
  std::string part_;
  size_t values_left_;
  std::FILE* file_ = nullptr;
};

}  // namespace kvant::node
