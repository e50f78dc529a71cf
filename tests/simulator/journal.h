// What happened in a simulation: a hash over all of it, the last entries in readable form, and the
// first violation.
#pragma once

#include <cstddef>
#include <cstdint>
#include <deque>
#include <span>
#include <string>

#include "base/clock.h"

namespace kvant::sim {

// Single-owner. Invariant: equal seeds give equal sequences of entries, and so equal hashes.
class Journal {
 public:
  // keep: entries kept for the report of a violation. print: every entry goes to stdout at once.
  Journal(size_t keep, bool print) : keep_(keep), print_(print) {}

  // site: a format with up to three numbers ({}), a literal; it is the name of the place, too.
  void Note(TimePoint at, const char* site, uint64_t a = 0, uint64_t b = 0, uint64_t c = 0);
  // Records what broke a promise; only the first is kept.
  void Fail(TimePoint at, std::string what);

  bool failed() const { return !violation_.empty(); }
  const std::string& violation() const { return violation_; }
  uint64_t hash() const { return hash_; }
  uint64_t entries() const { return entries_; }
  // The last entries, one a line.
  std::string Schedule() const;

 private:
  struct Entry {
    TimePoint at;
    const char* site;
    uint64_t a, b, c;
  };
  static std::string Format(const Entry& entry);

  size_t keep_;
  bool print_;
  uint64_t hash_ = 0;
  uint64_t entries_ = 0;
  std::deque<Entry> last_;
  std::string violation_;
};

// 64 bits of the content, for entries.
uint64_t Fingerprint(std::span<const std::byte> bytes);

}  // namespace kvant::sim
