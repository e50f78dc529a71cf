// GGUF files as they lie on disk: metadata and tensors, versions 2 and 3, little-endian
// (github.com/ggml-org/ggml, docs/gguf.md). What they mean to a model is in gguf_model.h.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <map>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "base/status.h"
#include "kernels/ggml_blocks.h"

namespace kvant::node {

// Kinds of metadata values, by their numbers in files.
enum class GgufKind : uint32_t {
  kUint8 = 0,
  kInt8 = 1,
  kUint16 = 2,
  kInt16 = 3,
  kUint32 = 4,
  kInt32 = 5,
  kFloat32 = 6,
  kBool = 7,
  kString = 8,
  kArray = 9,
  kUint64 = 10,
  kInt64 = 11,
  kFloat64 = 12,
};

// A metadata value; its bytes were checked when the file was parsed. Each reader gives nothing when
// the value is of another kind.
struct GgufValue {
  GgufKind kind = GgufKind::kUint8;
  GgufKind element = GgufKind::kUint8;  // of an array; otherwise equal to kind
  uint64_t count = 1;                   // elements of an array
  std::span<const std::byte> bytes;     // all elements one after the other; a string's text

  std::optional<int64_t> Integer() const;  // of any width, if it fits
  std::optional<double> Number() const;    // a float or an integer
  std::optional<bool> Boolean() const;
  std::optional<std::string_view> Text() const;
  // Arrays.
  std::optional<std::vector<std::string_view>> Texts() const;
  std::optional<std::vector<int64_t>> Integers() const;
  std::optional<std::vector<float>> Floats() const;  // of kFloat32
};

struct GgufTensor {
  const kernels::GgmlType* type = nullptr;  // never null
  std::vector<int64_t> shape;  // outermost first, as PyTorch has it: the file's order reversed
  std::span<const std::byte> bytes;  // row-major blocks; size fits type and shape
};

// Immutable. Borrows the bytes of the file, which must not change while it lives.
// Invariants: every value and tensor lies inside the file; tensors do not overlap and begin at
// multiples of the file's alignment; every row of a tensor is whole blocks of its type.
class GgufFile {
 public:
  using Values = std::map<std::string, GgufValue, std::less<>>;
  using Tensors = std::map<std::string, GgufTensor, std::less<>>;

  // The only entry for bytes that nobody vouches for: nothing is allocated beyond what they can
  // fill. `name` is the file named in errors. kInvalidArgument says what is wrong with which key or
  // tensor; kUnsupported: a version, byte order or tensor type that is not known.
  static Result<GgufFile> Parse(std::span<const std::byte> bytes, const std::string& name);

  const std::string& name() const { return name_; }
  const Values& values() const { return values_; }
  const Tensors& tensors() const { return tensors_; }
  // nullptr when the file has none of that name.
  const GgufValue* FindValue(std::string_view key) const;
  const GgufTensor* FindTensor(std::string_view name) const;

 private:
  std::string name_;
  Values values_;
  Tensors tensors_;
};

}  // namespace kvant::node
