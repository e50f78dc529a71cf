#include "tests/simulator/journal.h"

#include <fmt/format.h>
#include <xxhash.h>

#include <cstdio>
#include <cstring>

namespace kvant::sim {

uint64_t Fingerprint(std::span<const std::byte> bytes) {
  return XXH3_64bits(bytes.data(), bytes.size());
}

std::string Journal::Format(const Entry& entry) {
  const double seconds = Seconds(entry.at.time_since_epoch());
  return fmt::format("{:12.6f} s  {}\n", seconds,
                     fmt::format(fmt::runtime(entry.site), entry.a, entry.b, entry.c));
}

void Journal::Note(TimePoint at, const char* site, uint64_t a, uint64_t b, uint64_t c) {
  const uint64_t numbers[] = {hash_, static_cast<uint64_t>(at.time_since_epoch().count()),
                              a,     b,
                              c,     XXH3_64bits(site, std::strlen(site))};
  hash_ = XXH3_64bits(numbers, sizeof(numbers));
  ++entries_;
  const Entry entry{at, site, a, b, c};
  if (print_) std::fputs(Format(entry).c_str(), stdout);
  last_.push_back(entry);
  if (last_.size() > keep_) last_.pop_front();
}

void Journal::Fail(TimePoint at, std::string what) {
  if (failed()) return;
  violation_ = std::move(what);
  Note(at, "VIOLATION");
}

std::string Journal::Schedule() const {
  std::string text;
  for (const Entry& entry : last_) text += Format(entry);
  return text;
}

}  // namespace kvant::sim
