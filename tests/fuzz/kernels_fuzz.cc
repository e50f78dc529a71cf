// Kernels on any numbers, by every implementation: one answer from all of them, as near to double
// precision as they say.
#include "base/check.h"
#include "tests/fuzz/fuzz_input.h"
#include "tests/kernel_differential.h"

namespace kvant::fuzz {

using namespace kvant::kernels;

std::vector<Bytes> SeedInputs() {
  std::vector<Bytes> seeds;
  // The first byte is the kernel.
  const auto add = [&](DifferentialKernel kernel, std::span<const uint8_t> bytes) {
    Bytes& seed = seeds.emplace_back(1, static_cast<std::byte>(kernel));
    for (const uint8_t byte : bytes) seed.push_back(std::byte{byte});
  };
  for (int head_dim = 0; head_dim < static_cast<int>(std::size(kDifferentialHeadDims));
       ++head_dim) {
    for (int codec = 0; codec < static_cast<int>(Codecs().size()); ++codec) {
      const int group = 1 + (5 * head_dim + 3 * codec) % kMaxGroup;
      add(DifferentialKernel::kAttendTile, AttendTileCase(codec, head_dim, group));
    }
  }
  Random random(1);
  for (int kernel = 0; kernel < kDifferentialKernels; ++kernel) {
    for (uint8_t head_dim = 0; head_dim < std::size(kDifferentialHeadDims); ++head_dim) {
      std::vector<uint8_t> bytes(64);
      for (uint8_t& byte : bytes) byte = static_cast<uint8_t>(random.Below(256));
      // Where the head size stands, or a size of something else.
      bytes[kernel == static_cast<int>(DifferentialKernel::kAttendRaw) ? 0 : 1] = head_dim;
      add(static_cast<DifferentialKernel>(kernel), bytes);
    }
  }
  return seeds;
}

}  // namespace kvant::fuzz

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  using namespace kvant::kernels;
  if (size == 0) return 0;
  const auto kernel = static_cast<DifferentialKernel>(data[0] % kDifferentialKernels);
  const std::string difference = FindDifference(kernel, data + 1, size - 1);
  if (!difference.empty()) std::fprintf(stderr, "%s\n", difference.c_str());
  KV_CHECK(difference.empty());
  return 0;
}
