// Runs a fuzz target without libFuzzer: every file of its corpus, then inputs mutated from them.
//   NAME_replay CORPUS_DIR [--mutations N] [--seed S]
//   NAME_replay FILE...                       (repeats findings)
//   NAME_replay --write-seeds CORPUS_DIR
#include <fmt/format.h>
#include <unistd.h>

#include <chrono>
#include <csignal>
#include <cstdint>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <string>
#include <vector>

#include "base/random.h"
#include "tests/fuzz/fuzz_input.h"

namespace kvant::fuzz {
namespace {

namespace fs = std::filesystem;

constexpr size_t kMaxInput = 1 << 16;
constexpr const char* kFinding = "fuzz-finding";  // where an input that ends the process is left

const Bytes* current = nullptr;

// Leaves the input behind before the process dies of it.
extern "C" void OnDeath(int signal) {
  if (FILE* file = std::fopen(kFinding, "wb"); file != nullptr && current != nullptr) {
    std::fwrite(current->data(), 1, current->size(), file);
    std::fclose(file);
    static constexpr char kText[] = "the input is in ./fuzz-finding\n";
    (void)!write(STDERR_FILENO, kText, sizeof(kText) - 1);
  }
  std::signal(signal, SIG_DFL);
  std::raise(signal);
}

Bytes ReadInput(const fs::path& path) {
  std::ifstream in(path, std::ios::binary);
  const std::string text{std::istreambuf_iterator<char>(in), {}};
  return ToBytes(text);
}

void RunOne(const Bytes& input) {
  current = &input;
  // A copy of its own, so that a sanitizer sees the first byte read past the end.
  const auto copy = std::make_unique<uint8_t[]>(input.size());
  std::memcpy(copy.get(), input.data(), input.size());
  LLVMFuzzerTestOneInput(copy.get(), input.size());
}

void MutateOnce(Random* random, const std::vector<Bytes>& corpus, Bytes* input) {
  static constexpr uint64_t kInteresting[] = {0,
                                              1,
                                              0x7f,
                                              0x80,
                                              0xff,
                                              0x7fff,
                                              0xffff,
                                              0x7fffffff,
                                              0x80000000,
                                              0xffffffff,
                                              0x7fffffffffffffff,
                                              0xffffffffffffffff};
  const size_t at = input->empty() ? 0 : random->Below(input->size());
  const auto place = input->begin() + static_cast<ptrdiff_t>(at);
  const size_t length =
      input->empty() ? 0 : 1 + random->Below(std::min<size_t>(input->size() - at, 64));
  switch (random->Below(7)) {
    case 0:
      if (!input->empty()) *place ^= static_cast<std::byte>(1 << random->Below(8));
      break;
    case 1:
      if (!input->empty()) *place = static_cast<std::byte>(random->Next());
      break;
    case 2:
      input->insert(place, static_cast<std::byte>(random->Next()));
      break;
    case 3:
      input->erase(place, place + static_cast<ptrdiff_t>(length));
      break;
    case 4: {
      const Bytes chunk(place, place + static_cast<ptrdiff_t>(length));
      const size_t to = input->empty() ? 0 : random->Below(input->size());
      input->insert(input->begin() + static_cast<ptrdiff_t>(to), chunk.begin(), chunk.end());
      break;
    }
    case 5: {
      const uint64_t value = kInteresting[random->Below(std::size(kInteresting))];
      const size_t width = size_t{1} << random->Below(4);
      if (at + width <= input->size()) std::memcpy(input->data() + at, &value, width);
      break;
    }
    default: {
      const Bytes& other = corpus[random->Below(corpus.size())];
      const size_t from = other.empty() ? 0 : random->Below(other.size());
      input->resize(at);
      input->insert(input->end(), other.begin() + static_cast<ptrdiff_t>(from), other.end());
    }
  }
  if (input->size() > kMaxInput) input->resize(kMaxInput);
}

int WriteSeeds(const fs::path& directory) {
  fs::create_directories(directory);
  size_t number = 0;
  for (const Bytes& seed : SeedInputs()) {
    std::ofstream out(directory / fmt::format("seed-{:02}", number++), std::ios::binary);
    out.write(reinterpret_cast<const char*>(seed.data()),
              static_cast<std::streamsize>(seed.size()));
  }
  return 0;
}

int Run(const std::vector<std::string>& arguments) {
  std::vector<fs::path> files;
  uint64_t mutations = 0;
  uint64_t seed = 1;
  for (size_t i = 0; i < arguments.size(); ++i) {
    const bool valued = i + 1 < arguments.size();
    if (arguments[i] == "--write-seeds" && valued) return WriteSeeds(arguments[i + 1]);
    if (arguments[i] == "--mutations" && valued) {
      mutations = std::strtoull(arguments[++i].c_str(), nullptr, 10);
    } else if (arguments[i] == "--seed" && valued) {
      seed = std::strtoull(arguments[++i].c_str(), nullptr, 10);
    } else if (fs::is_directory(arguments[i])) {
      for (const auto& entry : fs::directory_iterator(arguments[i])) files.push_back(entry.path());
    } else if (fs::is_regular_file(arguments[i])) {
      files.emplace_back(arguments[i]);
    } else {
      fmt::print(stderr, "no file or directory, or an option without its value: {}\n",
                 arguments[i]);
      return 2;
    }
  }
  std::sort(files.begin(), files.end());
  if (files.empty()) {
    fmt::print(stderr, "the corpus is empty: make it with --write-seeds\n");
    return 2;
  }
  std::signal(SIGABRT, OnDeath);
  std::signal(SIGSEGV, OnDeath);
  std::signal(SIGFPE, OnDeath);
  std::vector<Bytes> corpus;
  for (const fs::path& file : files) {
    corpus.push_back(ReadInput(file));
    RunOne(corpus.back());
  }
  Random random(seed);
  const auto started = std::chrono::steady_clock::now();
  for (uint64_t i = 0; i < mutations; ++i) {
    Bytes input = corpus[random.Below(corpus.size())];
    for (uint64_t times = 1 + random.Below(8); times > 0; --times) {
      MutateOnce(&random, corpus, &input);
    }
    RunOne(input);
  }
  const std::chrono::duration<double> took = std::chrono::steady_clock::now() - started;
  fmt::print("{} files, {} mutated inputs from seed {}, {:.1f} s\n", corpus.size(), mutations, seed,
             took.count());
  return 0;
}

}  // namespace
}  // namespace kvant::fuzz

int main(int argc, char** argv) { return kvant::fuzz::Run({argv + 1, argv + argc}); }
