#include "node/safetensors.h"

#include <fmt/ranges.h>

#include <algorithm>
#include <limits>
#include <set>
#include <utility>

#include "base/bytes.h"
#include "node/json.h"

namespace kvant::node {
namespace {

using nlohmann::json;

// The reference implementation's limit (safetensors, MAX_HEADER_SIZE).
constexpr uint64_t kMaxHeaderBytes = 100'000'000;
constexpr uint64_t kMaxIndexBytes = 100'000'000;
constexpr size_t kMaxDimensions = 8;
constexpr size_t kMaxTensors = 1'000'000;

struct StoredType {
  std::string_view name;
  DataType type;
  uint64_t bytes;
};
constexpr StoredType kStoredTypes[] = {
    {"BF16", DataType::kBf16, 2},    {"F16", DataType::kFp16, 2},
    {"F32", DataType::kFp32, 4},     {"F64", DataType::kOther, 8},
    {"I64", DataType::kOther, 8},    {"U64", DataType::kOther, 8},
    {"I32", DataType::kOther, 4},    {"U32", DataType::kOther, 4},
    {"I16", DataType::kOther, 2},    {"U16", DataType::kOther, 2},
    {"I8", DataType::kOther, 1},     {"U8", DataType::kOther, 1},
    {"BOOL", DataType::kOther, 1},   {"F8_E4M3", DataType::kOther, 1},
    {"F8_E5M2", DataType::kOther, 1}};

// Where a tensor says it lies, counted from the end of the header.
struct Extent {
  uint64_t begin = 0;
  uint64_t end = 0;
  std::string name;
};

// One entry of the header. `data` is all that follows it.
Result<std::pair<Extent, Tensor>> ParseEntry(const std::string& tensor_name, const json& entry,
                                             std::span<const std::byte> data,
                                             const std::string& name) {
  const auto wrong = [&](std::string_view what) {
    return InvalidArgument("{}: tensor {}: {}", name, tensor_name, what);
  };
  if (!entry.is_object()) return wrong("its header entry must be an object");
  const json* dtype = FindField(entry, "dtype");
  const json* shape = FindField(entry, "shape");
  const json* offsets = FindField(entry, "data_offsets");
  if (dtype == nullptr || !dtype->is_string()) return wrong("\"dtype\" must be a string");
  if (shape == nullptr || !shape->is_array()) return wrong("\"shape\" must be a list");
  if (offsets == nullptr || !offsets->is_array() || offsets->size() != 2 ||
      !(*offsets)[0].is_number_unsigned() || !(*offsets)[1].is_number_unsigned()) {
    return wrong("\"data_offsets\" must be two integers from 0 on");
  }
  const auto& type_name = dtype->get_ref<const std::string&>();
  const auto* stored =
      std::find_if(std::begin(kStoredTypes), std::end(kStoredTypes),
                   [&](const StoredType& candidate) { return candidate.name == type_name; });
  if (stored == std::end(kStoredTypes)) {
    return wrong("its dtype is unknown: " + type_name.substr(0, 32));
  }
  if (shape->size() > kMaxDimensions) return wrong("it has more than 8 dimensions");

  Tensor tensor;
  tensor.type = stored->type;
  uint64_t expected_bytes = stored->bytes;
  for (const json& dimension : *shape) {
    if (!dimension.is_number_unsigned()) return wrong("a dimension is no integer from 0 on");
    const auto size = dimension.get<uint64_t>();
    if (size > static_cast<uint64_t>(std::numeric_limits<int64_t>::max())) {
      return wrong("a dimension is too large");
    }
    if (size != 0 && expected_bytes > std::numeric_limits<uint64_t>::max() / size) {
      return wrong("the product of its dimensions overflows");
    }
    expected_bytes *= size;
    tensor.shape.push_back(static_cast<int64_t>(size));
  }
  Extent extent{(*offsets)[0].get<uint64_t>(), (*offsets)[1].get<uint64_t>(), tensor_name};
  if (extent.begin > extent.end) return wrong("its data ends before it begins");
  if (!RangeFits(extent.begin, extent.end - extent.begin, data.size())) {
    return wrong(
        fmt::format("its data [{}, {}) lies outside the file's {} bytes of data; is the "
                    "file complete?",
                    extent.begin, extent.end, data.size()));
  }
  if (extent.end - extent.begin != expected_bytes) {
    return wrong(fmt::format("{} of shape [{}] needs {} bytes, its data has {}", stored->name,
                             fmt::join(tensor.shape, ", "), expected_bytes,
                             extent.end - extent.begin));
  }
  tensor.bytes = data.subspan(extent.begin, expected_bytes);
  return std::pair(std::move(extent), std::move(tensor));
}

// A shard's name in an index is joined to the directory, so it must not lead out of it.
bool IsPlainFileName(const std::string& file) {
  return !file.empty() && file != "." && file != ".." && file.find('/') == std::string::npos &&
         file.find('\0') == std::string::npos;
}

}  // namespace

std::string_view DataTypeName(DataType type) {
  switch (type) {
    case DataType::kBf16:
      return "BF16";
    case DataType::kFp16:
      return "F16";
    case DataType::kFp32:
      return "F32";
    case DataType::kOther:
      break;
  }
  return "other";
}

Result<TensorMap> ParseSafetensors(std::span<const std::byte> file, const std::string& name) {
  if (file.size() < 8) {
    return InvalidArgument("{}: {} bytes are too few for a safetensors file", name, file.size());
  }
  const auto header_bytes = LoadLittle<uint64_t>(file.data());
  if (header_bytes > kMaxHeaderBytes || !RangeFits(8, header_bytes, file.size())) {
    return InvalidArgument(
        "{}: says that its header has {} bytes, the file has {}; is it a safetensors file, and "
        "complete?",
        name, header_bytes, file.size());
  }
  KV_ASSIGN_OR_RETURN(const json header, ParseJson(AsText(file.subspan(8, header_bytes)), name));
  if (!header.is_object()) return InvalidArgument("{}: its header must be an object", name);
  if (header.size() > kMaxTensors) {
    return InvalidArgument("{}: lists {} tensors, at most {} are read", name, header.size(),
                           kMaxTensors);
  }

  const auto data = file.subspan(8 + header_bytes);
  TensorMap tensors;
  std::vector<Extent> extents;
  for (const auto& [tensor_name, entry] : header.items()) {
    if (tensor_name == "__metadata__") continue;
    KV_ASSIGN_OR_RETURN(auto parsed, ParseEntry(tensor_name, entry, data, name));
    extents.push_back(std::move(parsed.first));
    tensors.emplace(tensor_name, std::move(parsed.second));
  }
  std::sort(extents.begin(), extents.end(), [](const Extent& a, const Extent& b) {
    return std::pair(a.begin, a.end) < std::pair(b.begin, b.end);
  });
  uint64_t covered = 0;
  for (const Extent& extent : extents) {
    if (extent.begin != covered) {
      return InvalidArgument("{}: tensor {} begins at {}, expected {}: tensors {}", name,
                             extent.name, extent.begin, covered,
                             extent.begin < covered ? "overlap" : "leave a gap");
    }
    covered = extent.end;
  }
  if (covered != data.size()) {
    return InvalidArgument("{}: its tensors cover {} bytes, the file has {} bytes of data", name,
                           covered, data.size());
  }
  return tensors;
}

Checkpoint::Checkpoint() = default;
Checkpoint::~Checkpoint() = default;

Result<std::unique_ptr<Checkpoint>> Checkpoint::Open(const std::filesystem::path& directory) {
  std::unique_ptr<Checkpoint> checkpoint(new Checkpoint);
  checkpoint->name_ = directory.string();
  const auto add_file = [&](const std::string& file) -> Result<TensorMap> {
    KV_ASSIGN_OR_RETURN(auto mapped, MappedFile::Open(directory / file));
    checkpoint->total_bytes_ += mapped->bytes().size();
    checkpoint->files_.push_back(std::move(mapped));
    return ParseSafetensors(checkpoint->files_.back()->bytes(), (directory / file).string());
  };

  std::error_code error;
  const auto index_path = directory / "model.safetensors.index.json";
  if (std::filesystem::exists(directory / "model.safetensors", error)) {
    KV_ASSIGN_OR_RETURN(checkpoint->tensors_, add_file("model.safetensors"));
    return checkpoint;
  }
  if (!std::filesystem::exists(index_path, error)) {
    return InvalidArgument(
        "{}: holds neither model.safetensors nor model.safetensors.index.json; other weight "
        "formats are not read",
        directory.string());
  }
  KV_ASSIGN_OR_RETURN(const std::string text, ReadFile(index_path, kMaxIndexBytes));
  KV_ASSIGN_OR_RETURN(const json index, ParseJson(text, index_path.string()));
  const json* weight_map = index.is_object() ? FindField(index, "weight_map") : nullptr;
  if (weight_map == nullptr || !weight_map->is_object()) {
    return InvalidArgument("{}: field \"weight_map\" must be an object", index_path.string());
  }
  std::map<std::string, std::set<std::string>> tensors_of_file;
  for (const auto& [tensor, file] : weight_map->items()) {
    if (!file.is_string() || !IsPlainFileName(file.get_ref<const std::string&>())) {
      return InvalidArgument("{}: the shard of tensor {} must be a file name without directory",
                             index_path.string(), tensor);
    }
    tensors_of_file[file.get<std::string>()].insert(tensor);
  }
  for (const auto& [file, listed] : tensors_of_file) {
    KV_ASSIGN_OR_RETURN(TensorMap found, add_file(file));
    for (const std::string& tensor : listed) {
      const auto entry = found.find(tensor);
      if (entry == found.end()) {
        return InvalidArgument("{}: tensor {} is not in {}, where the index says it is",
                               directory.string(), tensor, file);
      }
      checkpoint->tensors_.insert(found.extract(entry));
    }
  }
  return checkpoint;
}

Result<Tensor> Checkpoint::Find(std::string_view name, std::span<const int64_t> shape) {
  const auto found = tensors_.find(name);
  if (found == tensors_.end()) {
    return InvalidArgument("{}: the checkpoint lacks tensor {}, expected of shape [{}]", name_,
                           name, fmt::join(shape, ", "));
  }
  const Tensor& tensor = found->second;
  if (!std::equal(shape.begin(), shape.end(), tensor.shape.begin(), tensor.shape.end())) {
    return InvalidArgument(
        "{}: tensor {} has shape [{}], expected [{}] from config.json; do the files belong to one "
        "model?",
        name_, name, fmt::join(tensor.shape, ", "), fmt::join(shape, ", "));
  }
  if (tensor.type == DataType::kOther) {
    return MakeStatus(StatusCode::kUnsupported,
                      "{}: tensor {} is stored as none of BF16, F16 and F32", name_, name);
  }
  return tensor;
}

void Checkpoint::Release(std::string_view name) {
  const auto found = tensors_.find(name);
  if (found == tensors_.end()) return;
  const std::span<const std::byte> bytes = found->second.bytes;
  for (const std::unique_ptr<MappedFile>& file : files_) {
    const std::span<const std::byte> all = file->bytes();
    if (bytes.data() >= all.data() && bytes.data() < all.data() + all.size()) file->Release(bytes);
  }
}

}  // namespace kvant::node
