#include "node/npy.h"

#include <cerrno>
#include <cstring>
#include <utility>

#include "base/check.h"

namespace kvant::node {
namespace {

// The data begins at a multiple of it (numpy/lib/format.py, "Format Version 1.0").
constexpr size_t kAlignment = 64;

std::string Header(size_t rows, size_t columns) {
  std::string text =
      fmt::format("{{'descr': '<f4', 'fortran_order': False, 'shape': ({}, {}), }}", rows, columns);
  constexpr size_t kBeforeText = 10;  // magic, version, length
  const size_t used = kBeforeText + text.size() + 1;
  text.append((kAlignment - used % kAlignment) % kAlignment, ' ');
  text += '\n';
  std::string header("\x93NUMPY\x01\x00", 8);
  header += static_cast<char>(text.size() & 0xFF);
  header += static_cast<char>(text.size() >> 8);
  return header + text;
}

}  // namespace

NpyWriter::NpyWriter(std::string path, size_t values)
    : path_(std::move(path)), part_(path_ + ".part"), values_left_(values) {}

NpyWriter::~NpyWriter() {
  if (file_ == nullptr) return;
  std::fclose(file_);
  std::remove(part_.c_str());
}

Status NpyWriter::Failure(const char* doing) const {
  return Unavailable("{} {}: {}", doing, part_, std::strerror(errno));
}

Result<std::unique_ptr<NpyWriter>> NpyWriter::Create(const std::string& path, size_t rows,
                                                     size_t columns) {
  std::unique_ptr<NpyWriter> writer(new NpyWriter(path, rows * columns));
  writer->file_ = std::fopen(writer->part_.c_str(), "wb");
  if (writer->file_ == nullptr) {
    return InvalidArgument("writing {}: {}; does the folder exist, and may it be written to?", path,
                           std::strerror(errno));
  }
  const std::string header = Header(rows, columns);
  if (std::fwrite(header.data(), 1, header.size(), writer->file_) != header.size()) {
    return writer->Failure("writing");
  }
  return writer;
}

Status NpyWriter::Append(std::span<const float> values) {
  KV_CHECK(values.size() <= values_left_);
  values_left_ -= values.size();
  if (std::fwrite(values.data(), sizeof(float), values.size(), file_) != values.size()) {
    return Failure("writing");
  }
  return OkStatus();
}

Status NpyWriter::Finish() {
  KV_CHECK(values_left_ == 0);
  if (std::fflush(file_) != 0) return Failure("writing");
  // Renamed while it is open, so that a failure leaves it to the destructor.
  if (std::rename(part_.c_str(), path_.c_str()) != 0) {
    return InvalidArgument("renaming {} to {}: {}", part_, path_, std::strerror(errno));
  }
  std::fclose(std::exchange(file_, nullptr));
  return OkStatus();
}

}  // namespace kvant::node
