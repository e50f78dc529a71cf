// Which stretches of a payload were asked for already.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <iterator>
#include <map>
#include <vector>

namespace kvant {

struct Interval {
  uint64_t begin = 0;
  uint64_t end = 0;  // past the last
  friend bool operator==(const Interval&, const Interval&) = default;
};

// A set of integers as disjoint intervals; neighbours that touch are merged. Single-owner value.
class IntervalSet {
 public:
  // Adds an interval and returns the pieces of it that were not in the set, in order. An empty
  // interval adds nothing.
  std::vector<Interval> Add(Interval added) {
    std::vector<Interval> fresh;
    if (added.begin >= added.end) return fresh;
    auto at = ends_.upper_bound(added.begin);
    if (at != ends_.begin() && std::prev(at)->second >= added.begin) --at;
    uint64_t covered = added.begin;
    Interval merged = added;
    while (at != ends_.end() && at->first <= added.end) {
      if (at->first > covered) fresh.push_back({covered, at->first});
      covered = std::max(covered, at->second);
      merged.begin = std::min(merged.begin, at->first);
      merged.end = std::max(merged.end, at->second);
      at = ends_.erase(at);
    }
    if (covered < added.end) fresh.push_back({covered, added.end});
    ends_[merged.begin] = merged.end;
    return fresh;
  }
  // Number of separate intervals.
  size_t pieces() const { return ends_.size(); }

 private:
  std::map<uint64_t, uint64_t> ends_;  // by begin
};

}  // namespace kvant
