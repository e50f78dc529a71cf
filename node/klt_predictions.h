// What tokens alone predict of groups, kept for the tokens that were met last: a text says few
// different ones.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <mutex>
#include <span>
#include <unordered_map>
#include <vector>

#include "node/klt_pack.h"

namespace kvant::node {

class KltCoder;

// What a node spends on them: a whole vocabulary of a small model, some thousand tokens of others.
inline constexpr uint64_t kKltKeptBytes = uint64_t{64} << 20;

// Of one pack's transform that recomputes nothing. Thread-safe.
class KltPredictions {
 public:
  // A token's, of one group: [width].
  using Row = std::shared_ptr<const std::vector<float>>;

  // limit_bytes: about what is kept at most, of all groups together.
  KltPredictions(const KltTransform& transform, uint64_t limit_bytes);

  // A group's rows, [tokens]: bit for bit what KltCoder::Begun makes of their embeddings.
  // coder: any of the pack whose transform recomputes nothing.
  void Get(const KltCoder& coder, size_t group, std::span<const int32_t> tokens,
           std::vector<Row>* rows);

 private:
  struct Entry {
    int32_t token = 0;
    bool used = false;  // since the hand passed by
    Row row;
  };
  struct Group {
    size_t width = 0;
    size_t capacity = 0;
    std::unordered_map<int32_t, size_t> places;  // of tokens in entries
    std::vector<Entry> entries;
    size_t hand = 0;  // of the clock that finds what was not used (Corbató 1968)
  };
  static void Insert(Group* group, int32_t token, Row row);

  std::mutex mutex_;  // of the groups' entries, never held while anything is computed
  std::vector<Group> groups_;
};

}  // namespace kvant::node
