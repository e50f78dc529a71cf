// rANS tables and streams that nobody vouches for, by every implementation: the same answer from
// all of them, and what a table says can be encoded comes back.
#include "base/check.h"
#include "tests/fuzz/fuzz_input.h"
#include "tests/lossless_fixtures.h"

namespace kvant::fuzz {

using namespace kvant::kernels;

std::vector<Bytes> SeedInputs() {
  std::vector<Bytes> seeds;
  Random random(1);
  struct Stream {
    size_t symbols;
    int alphabet;
    int tables;
  };
  for (const auto& [count, alphabet, tables] :
       {Stream{300, 16, 1}, Stream{500, 256, 1}, Stream{200, 30, 3}, Stream{20, 2, 2}}) {
    const RansCase made = MakeRansCase(count, alphabet, tables, &random);
    Bytes seed = {static_cast<std::byte>(tables - 1), static_cast<std::byte>(count),
                  static_cast<std::byte>(count >> 8)};
    for (const RansTable& table : made.tables) table.AppendTo(&seed);
    const auto choice = std::as_bytes(std::span(made.table_of_symbol));
    seed.insert(seed.end(), choice.begin(), choice.end());
    const Bytes stream = EncodeRans(ActiveImplementation(), made);
    seed.insert(seed.end(), stream.begin(), stream.end());
    seeds.push_back(std::move(seed));
  }
  return seeds;
}

}  // namespace kvant::fuzz

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  using namespace kvant::fuzz;
  using namespace kvant::kernels;
  FuzzInput input(data, size);
  const size_t tables = 1 + input.Take<uint8_t>() % 8;
  const size_t count = input.Take<uint16_t>() % 4096;
  RansCase found;
  auto left = input.Rest();
  for (size_t t = 0; t < tables; ++t) {
    const kvant::Result<RansTable> table = RansTable::Parse(&left);
    if (!table.ok()) return 0;
    found.tables.push_back(*table);
  }
  if (tables > 1) {
    const auto choice = left.first(std::min(count, left.size()));
    left = left.subspan(choice.size());
    found.table_of_symbol.resize(count);
    for (size_t i = 0; i < choice.size(); ++i) {
      found.table_of_symbol[i] = static_cast<uint8_t>(std::to_integer<size_t>(choice[i]) % tables);
    }
  }
  RansDecodeTables decode;
  decode.Assign(found.tables);
  // A buffer of its own, so that a sanitizer sees a read behind it.
  const Bytes stream(left.begin(), left.end());
  // A stream may be refused before a symbol of it is decoded: those that stand there until then
  // have a frequency, too.
  std::vector<uint8_t> first(count);
  for (size_t i = 0; i < count; ++i) {
    const RansTable& table = found.tables[tables > 1 ? found.table_of_symbol[i] : 0];
    while (table.frequency(first[i]) == 0) ++first[i];
  }
  found.symbols = first;
  const kvant::Status expected =
      RansDecode(*Implementations().back(), decode, found.choice(), stream, found.symbols);
  for (const Implementation* implementation : Implementations()) {
    if (!implementation->runs_here()) continue;
    std::vector<uint8_t> symbols = first;
    KV_CHECK(RansDecode(*implementation, decode, found.choice(), stream, symbols) == expected);
    KV_CHECK(symbols == found.symbols);
    std::vector<uint16_t> not_zero(count + 32);
    not_zero.resize(implementation->not_zero(symbols.data(), count, not_zero.data()));
    size_t next = 0;
    for (size_t i = 0; i < count; ++i) {
      if (symbols[i] != 0) KV_CHECK(next < not_zero.size() && not_zero[next++] == i);
    }
    KV_CHECK(next == not_zero.size());
    // Whatever was decoded has a frequency; a good stream is the only one of its symbols.
    const Bytes again = EncodeRans(*implementation, found);
    KV_CHECK(RansDecode(*implementation, decode, found.choice(), again, symbols).ok());
    KV_CHECK(symbols == found.symbols);
    if (expected.ok()) KV_CHECK(again == stream);
  }
  return 0;
}
