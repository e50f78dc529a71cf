#include "node/klt_predictions.h"

#include <algorithm>
#include <utility>

#include "node/klt.h"

namespace kvant::node {

KltPredictions::KltPredictions(const KltTransform& transform, uint64_t limit_bytes) {
  size_t all = 0;
  for (const KltBasis& basis : transform.bases) all += static_cast<size_t>(basis.width);
  for (const KltBasis& basis : transform.bases) {
    Group& group = groups_.emplace_back();
    group.width = static_cast<size_t>(basis.width);
    group.capacity = std::max<size_t>(1, limit_bytes / (sizeof(float) * all));
  }
}

void KltPredictions::Insert(Group* group, int32_t token, Row row) {
  // Another thread may have been faster.
  if (group->places.contains(token)) return;
  if (group->entries.size() < group->capacity) {
    group->places[token] = group->entries.size();
    group->entries.push_back({token, false, std::move(row)});
    return;
  }
  while (std::exchange(group->entries[group->hand].used, false))
    group->hand = (group->hand + 1) % group->entries.size();
  Entry& entry = group->entries[group->hand];
  group->places.erase(entry.token);
  group->places[token] = group->hand;
  entry = {token, false, std::move(row)};
  group->hand = (group->hand + 1) % group->entries.size();
}

void KltPredictions::Get(const KltCoder& coder, size_t group, std::span<const int32_t> tokens,
                         std::vector<Row>* rows) {
  Group& of = groups_[group];
  std::vector<Row>& found = *rows;
  found.assign(tokens.size(), nullptr);
  std::vector<int32_t> missing;
  {
    const std::lock_guard lock(mutex_);
    for (size_t i = 0; i < tokens.size(); ++i) {
      const auto place = of.places.find(tokens[i]);
      if (place == of.places.end()) {
        if (std::find(missing.begin(), missing.end(), tokens[i]) == missing.end())
          missing.push_back(tokens[i]);
        continue;
      }
      Entry& entry = of.entries[place->second];
      entry.used = true;
      found[i] = entry.row;
    }
  }
  if (missing.empty()) return;
  std::vector<float> made(missing.size() * of.width);
  coder.Begun(group, KltCoder::Normalized(coder.Embeddings(missing), coder.pack().hidden),
              made.data());
  std::vector<Row> made_rows;
  for (auto at = made.begin(); at != made.end(); at += static_cast<ptrdiff_t>(of.width)) {
    made_rows.push_back(
        std::make_shared<const std::vector<float>>(at, at + static_cast<ptrdiff_t>(of.width)));
  }
  for (size_t i = 0; i < tokens.size(); ++i) {
    if (found[i] != nullptr) continue;
    const auto at = std::find(missing.begin(), missing.end(), tokens[i]) - missing.begin();
    found[i] = made_rows[static_cast<size_t>(at)];
  }
  const std::lock_guard lock(mutex_);
  for (size_t i = 0; i < missing.size(); ++i) Insert(&of, missing[i], std::move(made_rows[i]));
}

}  // namespace kvant::node
