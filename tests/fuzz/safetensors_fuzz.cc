// The header of a safetensors file.
#include "base/check.h"
#include "node/safetensors.h"
#include "tests/fuzz/text_seeds.h"

namespace kvant::fuzz {

std::vector<Bytes> SeedInputs() {
  std::vector<Bytes> seeds;
  for (const std::string_view header :
       {R"({"a":{"dtype":"F32","shape":[2,2],"data_offsets":[0,16]},)"
        R"("b":{"dtype":"BF16","shape":[4],"data_offsets":[16,24]}})",
        R"({"__metadata__":{"format":"pt"},"x":{"dtype":"F16","shape":[],"data_offsets":[0,2]}})",
        R"({})"}) {
    Bytes seed(8);
    const uint64_t length = header.size();
    std::memcpy(seed.data(), &length, sizeof(length));
    const Bytes text = ToBytes(header);
    seed.insert(seed.end(), text.begin(), text.end());
    seed.resize(seed.size() + (seeds.empty() ? 24 : seeds.size() == 1 ? 2 : 0));
    seeds.push_back(std::move(seed));
  }
  return seeds;
}

}  // namespace kvant::fuzz

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  const std::span file(reinterpret_cast<const std::byte*>(data), size);
  const auto tensors = kvant::node::ParseSafetensors(file, "fuzz");
  if (!tensors.ok()) return 0;
  unsigned sum = 0;
  for (const auto& [name, tensor] : *tensors) {
    for (const std::byte byte : tensor.bytes) sum += static_cast<unsigned>(byte);
    for (const int64_t length : tensor.shape) KV_CHECK(length >= 0);
  }
  return sum == 0 ? 0 : 0;
}
