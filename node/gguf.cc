#include "node/gguf.h"

#include <algorithm>
#include <bit>
#include <limits>
#include <utility>

#include "base/bytes.h"

namespace kvant::node {
namespace {

constexpr uint32_t kMagic = 0x46554747;  // "GGUF"
constexpr uint64_t kHeaderBytes = 24;    // magic, version, number of tensors and of keys
// The fewest bytes that one of a kind takes: they bound every count.
constexpr uint64_t kMinTensorBytes = 8 + 1 + 4 + 8 + 4 + 8;
constexpr uint64_t kMinKeyBytes = 8 + 1 + 4 + 1;
constexpr uint64_t kMinArrayBytes = 4 + 8;
// What a map of names may cost beyond the file itself; real files have hundreds of tensors and
// dozens of keys.
constexpr uint64_t kMaxTensors = 1 << 18;
constexpr uint64_t kMaxKeys = 1 << 16;
constexpr uint64_t kMaxKeyName = 65535;   // docs/gguf.md
constexpr uint64_t kMaxTensorName = 255;  // docs/gguf.md: 64; files of its forks have longer ones
constexpr uint32_t kMaxDimensions = 4;
constexpr uint64_t kDefaultAlignment = 32;
constexpr int64_t kMaxAlignment = 1 << 20;
constexpr int kMaxNesting = 4;

// Bytes of one value of a kind; 0 where they vary.
uint64_t FixedBytes(GgufKind kind) {
  switch (kind) {
    case GgufKind::kUint8:
    case GgufKind::kInt8:
    case GgufKind::kBool:
      return 1;
    case GgufKind::kUint16:
    case GgufKind::kInt16:
      return 2;
    case GgufKind::kUint32:
    case GgufKind::kInt32:
    case GgufKind::kFloat32:
      return 4;
    case GgufKind::kUint64:
    case GgufKind::kInt64:
    case GgufKind::kFloat64:
      return 8;
    case GgufKind::kString:
    case GgufKind::kArray:
      break;
  }
  return 0;
}

// The integer of a kind at `at`; nothing when it is none or too large for int64.
std::optional<int64_t> IntegerAt(GgufKind kind, const std::byte* at) {
  switch (kind) {
    case GgufKind::kUint8:
      return LoadLittle<uint8_t>(at);
    case GgufKind::kInt8:
      return static_cast<int8_t>(LoadLittle<uint8_t>(at));
    case GgufKind::kUint16:
      return LoadLittle<uint16_t>(at);
    case GgufKind::kInt16:
      return static_cast<int16_t>(LoadLittle<uint16_t>(at));
    case GgufKind::kUint32:
      return LoadLittle<uint32_t>(at);
    case GgufKind::kInt32:
      return static_cast<int32_t>(LoadLittle<uint32_t>(at));
    case GgufKind::kInt64:
      return static_cast<int64_t>(LoadLittle<uint64_t>(at));
    case GgufKind::kUint64: {
      const auto value = LoadLittle<uint64_t>(at);
      if (value > uint64_t{std::numeric_limits<int64_t>::max()}) return std::nullopt;
      return static_cast<int64_t>(value);
    }
    default:
      return std::nullopt;
  }
}

bool IsPrintable(std::string_view text) {
  return std::all_of(text.begin(), text.end(), [](char c) { return c > ' ' && c < '\x7F'; });
}

// Reads the front of a file piece by piece. Single-owner.
class Cursor {
 public:
  Cursor(std::span<const std::byte> bytes, const std::string* name) : bytes_(bytes), name_(*name) {}

  uint64_t at() const { return at_; }
  uint64_t left() const { return bytes_.size() - at_; }

  // What is being read, for errors.
  void SetSubject(std::string subject) { subject_ = std::move(subject); }
  Status Wrong(std::string_view what) const {
    return InvalidArgument("{}: {}: {}", name_, subject_, what);
  }

  Result<std::span<const std::byte>> Take(uint64_t length) {
    if (!RangeFits(at_, length, bytes_.size())) {
      return Wrong(fmt::format("needs {} bytes at offset {}, the file has {} left; is it complete?",
                               length, at_, left()));
    }
    const auto taken = bytes_.subspan(at_, length);
    at_ += length;
    return taken;
  }
  template <typename T>
  Result<T> Number() {
    KV_ASSIGN_OR_RETURN(const auto taken, Take(sizeof(T)));
    return LoadLittle<T>(taken.data());
  }
  // A length and as many bytes.
  Result<std::string_view> Text() {
    KV_ASSIGN_OR_RETURN(const uint64_t length, Number<uint64_t>());
    KV_ASSIGN_OR_RETURN(const auto taken, Take(length));
    return AsText(taken);
  }
  // The name of a key or a tensor: it will stand in errors, so it must be plain.
  Result<std::string> Name(uint64_t limit) {
    KV_ASSIGN_OR_RETURN(const std::string_view text, Text());
    if (text.empty() || text.size() > limit || !IsPrintable(text)) {
      return Wrong(
          fmt::format("its name must be 1 to {} printable ASCII characters, found {} bytes "
                      "of something else at offset {}; is the file damaged?",
                      limit, text.size(), at_ - text.size()));
    }
    return std::string(text);
  }
  // What was taken since `begin`.
  std::span<const std::byte> Since(uint64_t begin) const {
    return bytes_.subspan(begin, at_ - begin);
  }

 private:
  std::span<const std::byte> bytes_;
  const std::string& name_;
  std::string subject_ = "header";
  uint64_t at_ = 0;
};

Result<GgufKind> ReadKind(Cursor* in) {
  KV_ASSIGN_OR_RETURN(const uint32_t number, in->Number<uint32_t>());
  if (number > static_cast<uint32_t>(GgufKind::kFloat64)) {
    return in->Wrong(
        fmt::format("has a value of unknown kind {}, known are 0 to 12; is the file "
                    "damaged?",
                    number));
  }
  return static_cast<GgufKind>(number);
}

Status CheckBooleans(const Cursor& in, std::span<const std::byte> bytes) {
  const bool fine =
      std::all_of(bytes.begin(), bytes.end(), [](std::byte b) { return b <= std::byte{1}; });
  return fine ? OkStatus() : in.Wrong("a boolean must be 0 or 1; is the file damaged?");
}

Result<GgufValue> ReadValue(Cursor* in, GgufKind kind, int nesting) {
  GgufValue value;
  value.kind = kind;
  value.element = kind;
  if (kind == GgufKind::kString) {
    KV_ASSIGN_OR_RETURN(const std::string_view text, in->Text());
    value.bytes = AsBytes(text);
    return value;
  }
  if (kind != GgufKind::kArray) {
    KV_ASSIGN_OR_RETURN(value.bytes, in->Take(FixedBytes(kind)));
    if (kind == GgufKind::kBool) KV_RETURN_IF_ERROR(CheckBooleans(*in, value.bytes));
    return value;
  }
  if (nesting == kMaxNesting) return in->Wrong("its arrays are nested too deep");
  KV_ASSIGN_OR_RETURN(value.element, ReadKind(in));
  KV_ASSIGN_OR_RETURN(value.count, in->Number<uint64_t>());
  const uint64_t fixed = FixedBytes(value.element);
  const uint64_t fewest = fixed != 0                           ? fixed
                          : value.element == GgufKind::kString ? sizeof(uint64_t)
                                                               : kMinArrayBytes;
  if (value.count > in->left() / fewest) {
    return in->Wrong(
        fmt::format("says that it has {} elements, the file has {} bytes left; is it "
                    "complete?",
                    value.count, in->left()));
  }
  const uint64_t begin = in->at();
  if (fixed != 0) {
    KV_RETURN_IF_ERROR(in->Take(value.count * fixed).status());
  } else {
    for (uint64_t i = 0; i < value.count; ++i) {
      KV_RETURN_IF_ERROR(ReadValue(in, value.element, nesting + 1).status());
    }
  }
  value.bytes = in->Since(begin);
  if (value.element == GgufKind::kBool) KV_RETURN_IF_ERROR(CheckBooleans(*in, value.bytes));
  return value;
}

// Where a tensor says it lies, counted from the beginning of the data.
struct Extent {
  uint64_t offset = 0;
  uint64_t bytes = 0;
  GgufTensor* tensor = nullptr;  // in the map
  const std::string* name = nullptr;
};

// The shape and type of a tensor; fills extent->offset and ->bytes.
Result<GgufTensor> ReadTensor(Cursor* in, Extent* extent) {
  GgufTensor tensor;
  KV_ASSIGN_OR_RETURN(const uint32_t dimensions, in->Number<uint32_t>());
  if (dimensions < 1 || dimensions > kMaxDimensions) {
    return in->Wrong(
        fmt::format("has {} dimensions, allowed are 1 to {}", dimensions, kMaxDimensions));
  }
  uint64_t values = 1;
  for (uint32_t i = 0; i < dimensions; ++i) {
    KV_ASSIGN_OR_RETURN(const uint64_t size, in->Number<uint64_t>());
    // 2^60 values: no type makes more than 2^63 bytes of them.
    if (size == 0 || size > (uint64_t{1} << 60) / values) {
      return in->Wrong(
          fmt::format("its dimension {} is {}: none may be 0, nor their product more "
                      "than 2^60",
                      i, size));
    }
    values *= size;
    tensor.shape.push_back(static_cast<int64_t>(size));
  }
  const auto row = static_cast<uint64_t>(tensor.shape.front());
  std::reverse(tensor.shape.begin(), tensor.shape.end());
  KV_ASSIGN_OR_RETURN(const uint32_t type, in->Number<uint32_t>());
  tensor.type = kernels::FindGgmlType(type);
  if (tensor.type == nullptr) {
    return MakeStatus(StatusCode::kUnsupported, "{}",
                      in->Wrong(fmt::format("its type {} is none that ggml has; use a file "
                                            "quantized to one of the usual types, e.g. Q4_K_M",
                                            type))
                          .message());
  }
  if (row % tensor.type->block_values != 0) {
    return in->Wrong(fmt::format("its rows of {} values are no whole blocks of {} {} values", row,
                                 tensor.type->block_values, tensor.type->name));
  }
  extent->bytes = values / tensor.type->block_values * tensor.type->block_bytes;
  KV_ASSIGN_OR_RETURN(extent->offset, in->Number<uint64_t>());
  return tensor;
}

// Gives each tensor its bytes of `data`.
Status PlaceTensors(std::span<const std::byte> data, uint64_t alignment, const std::string& name,
                    std::vector<Extent>* extents) {
  std::sort(extents->begin(), extents->end(),
            [](const Extent& a, const Extent& b) { return a.offset < b.offset; });
  uint64_t covered = 0;
  const std::string* previous = nullptr;
  for (const Extent& extent : *extents) {
    if (extent.offset % alignment != 0) {
      return InvalidArgument("{}: tensor {} begins at {}, which is no multiple of the alignment {}",
                             name, *extent.name, extent.offset, alignment);
    }
    if (!RangeFits(extent.offset, extent.bytes, data.size())) {
      return InvalidArgument(
          "{}: tensor {} has {} bytes from {} on, but the file holds {} bytes of data; is it "
          "complete?",
          name, *extent.name, extent.bytes, extent.offset, data.size());
    }
    if (extent.offset < covered) {
      return InvalidArgument("{}: tensors {} and {} overlap", name, *previous, *extent.name);
    }
    covered = extent.offset + extent.bytes;
    previous = extent.name;
    extent.tensor->bytes = data.subspan(extent.offset, extent.bytes);
  }
  return OkStatus();
}

// Reads magic, version and counts: {tensors, keys}.
Result<std::pair<uint64_t, uint64_t>> ReadHeader(Cursor* in) {
  if (in->left() < kHeaderBytes) {
    return in->Wrong(fmt::format("{} bytes are too few for a GGUF file", in->left()));
  }
  KV_ASSIGN_OR_RETURN(const uint32_t magic, in->Number<uint32_t>());
  if (magic != kMagic) return in->Wrong("does not begin with \"GGUF\": not a GGUF file");
  KV_ASSIGN_OR_RETURN(const uint32_t version, in->Number<uint32_t>());
  const auto refuse = [&](std::string_view what) {
    return MakeStatus(StatusCode::kUnsupported, "{}", in->Wrong(what).message());
  };
  if (version != 0 && (version & 0xFFFFU) == 0) {
    return refuse("is big-endian, which is not read; gguf-py's gguf-convert-endian converts it");
  }
  if (version < 2 || version > 3) {
    return refuse(
        fmt::format("is of GGUF version {}, read are 2 and 3; convert the model again "
                    "with a current llama.cpp",
                    version));
  }
  KV_ASSIGN_OR_RETURN(const uint64_t tensors, in->Number<uint64_t>());
  KV_ASSIGN_OR_RETURN(const uint64_t keys, in->Number<uint64_t>());
  if (tensors > std::min(kMaxTensors, in->left() / kMinTensorBytes) ||
      keys > std::min(kMaxKeys, in->left() / kMinKeyBytes)) {
    return in->Wrong(
        fmt::format("announces {} tensors and {} keys, which {} bytes cannot hold; is "
                    "the file complete?",
                    tensors, keys, in->left()));
  }
  return std::pair(tensors, keys);
}

// The elements of an array of strings or of numbers of one width, in turn.
template <typename Each>
void ForEachElement(const GgufValue& array, Each each) {
  const std::byte* at = array.bytes.data();
  for (uint64_t i = 0; i < array.count; ++i) {
    uint64_t length = FixedBytes(array.element);
    if (array.element == GgufKind::kString) {
      length = LoadLittle<uint64_t>(at);
      at += sizeof(uint64_t);
    }
    each(std::span(at, length));
    at += length;
  }
}

}  // namespace

std::optional<int64_t> GgufValue::Integer() const { return IntegerAt(kind, bytes.data()); }

std::optional<double> GgufValue::Number() const {
  if (kind == GgufKind::kFloat32) return std::bit_cast<float>(LoadLittle<uint32_t>(bytes.data()));
  if (kind == GgufKind::kFloat64) return std::bit_cast<double>(LoadLittle<uint64_t>(bytes.data()));
  const auto integer = Integer();
  if (!integer) return std::nullopt;
  return static_cast<double>(*integer);
}

std::optional<bool> GgufValue::Boolean() const {
  if (kind != GgufKind::kBool) return std::nullopt;
  return bytes[0] != std::byte{0};
}

std::optional<std::string_view> GgufValue::Text() const {
  if (kind != GgufKind::kString) return std::nullopt;
  return AsText(bytes);
}

std::optional<std::vector<std::string_view>> GgufValue::Texts() const {
  if (kind != GgufKind::kArray || element != GgufKind::kString) return std::nullopt;
  std::vector<std::string_view> texts;
  texts.reserve(count);
  ForEachElement(*this, [&](std::span<const std::byte> text) { texts.push_back(AsText(text)); });
  return texts;
}

std::optional<std::vector<int64_t>> GgufValue::Integers() const {
  if (kind != GgufKind::kArray || FixedBytes(element) == 0) return std::nullopt;
  std::vector<int64_t> integers;
  integers.reserve(count);
  bool all = true;
  ForEachElement(*this, [&](std::span<const std::byte> bits) {
    const auto integer = IntegerAt(element, bits.data());
    all = all && integer.has_value();
    integers.push_back(integer.value_or(0));
  });
  if (!all) return std::nullopt;
  return integers;
}

std::optional<std::vector<float>> GgufValue::Floats() const {
  if (kind != GgufKind::kArray || element != GgufKind::kFloat32) return std::nullopt;
  std::vector<float> floats;
  floats.reserve(count);
  ForEachElement(*this, [&](std::span<const std::byte> bits) {
    floats.push_back(std::bit_cast<float>(LoadLittle<uint32_t>(bits.data())));
  });
  return floats;
}

Result<GgufFile> GgufFile::Parse(std::span<const std::byte> bytes, const std::string& name) {
  GgufFile file;
  file.name_ = name;
  Cursor in(bytes, &name);
  KV_ASSIGN_OR_RETURN(const auto counts, ReadHeader(&in));
  const auto [tensors, keys] = counts;

  for (uint64_t i = 0; i < keys; ++i) {
    in.SetSubject(fmt::format("key {} of {}", i + 1, keys));
    KV_ASSIGN_OR_RETURN(std::string key, in.Name(kMaxKeyName));
    in.SetSubject("key " + key);
    KV_ASSIGN_OR_RETURN(const GgufKind kind, ReadKind(&in));
    KV_ASSIGN_OR_RETURN(GgufValue value, ReadValue(&in, kind, 0));
    if (!file.values_.emplace(std::move(key), value).second) return in.Wrong("is there twice");
  }
  uint64_t alignment = kDefaultAlignment;
  if (const GgufValue* value = file.FindValue("general.alignment"); value != nullptr) {
    const auto stated = value->Integer();
    if (!stated || *stated < 1 || *stated > kMaxAlignment ||
        !std::has_single_bit(static_cast<uint64_t>(*stated))) {
      return InvalidArgument("{}: key general.alignment must be a power of two up to {}", name,
                             kMaxAlignment);
    }
    alignment = static_cast<uint64_t>(*stated);
  }

  std::vector<Extent> extents;
  for (uint64_t i = 0; i < tensors; ++i) {
    in.SetSubject(fmt::format("tensor {} of {}", i + 1, tensors));
    KV_ASSIGN_OR_RETURN(std::string tensor_name, in.Name(kMaxTensorName));
    in.SetSubject("tensor " + tensor_name);
    Extent extent;
    KV_ASSIGN_OR_RETURN(GgufTensor tensor, ReadTensor(&in, &extent));
    const auto [entry, inserted] = file.tensors_.emplace(std::move(tensor_name), std::move(tensor));
    if (!inserted) return in.Wrong("is there twice");
    extent.name = &entry->first;
    extent.tensor = &entry->second;
    extents.push_back(extent);
  }
  const uint64_t padding = (alignment - in.at() % alignment) % alignment;
  const uint64_t data_begin = std::min<uint64_t>(in.at() + padding, bytes.size());
  KV_RETURN_IF_ERROR(PlaceTensors(bytes.subspan(data_begin), alignment, name, &extents));
  return file;
}

const GgufValue* GgufFile::FindValue(std::string_view key) const {
  const auto found = values_.find(key);
  return found == values_.end() ? nullptr : &found->second;
}

const GgufTensor* GgufFile::FindTensor(std::string_view name) const {
  const auto found = tensors_.find(name);
  return found == tensors_.end() ? nullptr : &found->second;
}

}  // namespace kvant::node
