#include "node/bpe.h"

#include <algorithm>
#include <array>
#include <bit>
#include <limits>
#include <queue>
#include <tuple>

#include "base/check.h"
#include "node/utf8.h"

namespace kvant::node {
namespace {

// Pieces so short, nearly all of them, are looked through for each merge, which needs no memory.
constexpr size_t kFewSymbols = 24;

// A token of the piece under work; the live ones form a list.
struct Symbol {
  int32_t id;
  int32_t previous;  // -1: none
  int32_t next;      // -1: none
  bool live;
};

struct Candidate {
  int32_t rank;
  int32_t left;  // index of the left symbol
  int32_t merged;
  bool operator>(const Candidate& other) const {
    return std::tie(rank, left) > std::tie(other.rank, other.left);
  }
};

uint64_t PairKey(int32_t left, int32_t right) {
  return (uint64_t{static_cast<uint32_t>(left)} << 32) | static_cast<uint32_t>(right);
}

}  // namespace

size_t PairTable::SlotOf(uint64_t pair) const {
  const size_t mask = slots_.size() - 1;
  // Fibonacci hashing (Knuth, TAOCP 6.4).
  size_t slot = static_cast<size_t>((pair * 0x9E3779B97F4A7C15U) >> 20) & mask;
  while (slots_[slot].pair != kEmpty && slots_[slot].pair != pair) slot = (slot + 1) & mask;
  return slot;
}

void PairTable::Reserve(size_t pairs) {
  const size_t wanted = std::bit_ceil(std::max<size_t>(16, pairs * 2));
  if (wanted <= slots_.size()) return;
  const std::vector<Slot> old = std::exchange(slots_, std::vector<Slot>(wanted));
  for (const Slot& slot : old) {
    if (slot.pair != kEmpty) slots_[SlotOf(slot.pair)] = slot;
  }
}

void PairTable::Set(int32_t left, int32_t right, Value value) {
  KV_DCHECK(left >= 0 && right >= 0);
  Reserve(size_ + 1);
  Slot& slot = slots_[SlotOf(PairKey(left, right))];
  if (slot.pair == kEmpty) ++size_;
  slot = {PairKey(left, right), value};
}

const PairTable::Value* PairTable::Find(int32_t left, int32_t right) const {
  if (slots_.empty()) return nullptr;
  const Slot& slot = slots_[SlotOf(PairKey(left, right))];
  return slot.pair == kEmpty ? nullptr : &slot.value;
}

void BpeMerges::Merge(std::span<const int32_t> piece, std::vector<int32_t>* ids) const {
  if (piece.empty()) return;
  KV_CHECK(piece.size() < size_t{1} << 31);
  if (piece.size() <= kFewSymbols) return MergeFew(piece, ids);
  const auto count = static_cast<int32_t>(piece.size());
  std::vector<Symbol> symbols;
  symbols.reserve(piece.size());
  for (int32_t i = 0; i < count; ++i) {
    symbols.push_back({piece[static_cast<size_t>(i)], i - 1, i + 1 < count ? i + 1 : -1, true});
  }

  std::vector<Candidate> first;
  for (int32_t i = 0; i + 1 < count; ++i) {
    const PairTable::Value* merge = merges_.Find(symbols[i].id, symbols[i + 1].id);
    if (merge != nullptr) first.push_back({merge->first, i, merge->second});
  }
  std::priority_queue<Candidate, std::vector<Candidate>, std::greater<>> queue(std::greater<>(),
                                                                               std::move(first));
  const auto consider = [&](int32_t left) {
    if (left < 0 || symbols[left].next < 0) return;
    const PairTable::Value* merge = merges_.Find(symbols[left].id, symbols[symbols[left].next].id);
    if (merge != nullptr) queue.push({merge->first, left, merge->second});
  };
  while (!queue.empty()) {
    const Candidate best = queue.top();
    queue.pop();
    Symbol& left = symbols[best.left];
    if (!left.live || left.next < 0) continue;
    Symbol& right = symbols[left.next];
    // A neighbour was merged since: the pair is another one, which has a candidate of its own.
    const PairTable::Value* merge = merges_.Find(left.id, right.id);
    if (merge == nullptr || merge->second != best.merged) continue;
    left.id = best.merged;
    right.live = false;
    left.next = right.next;
    if (left.next >= 0) symbols[left.next].previous = best.left;
    consider(left.previous);
    consider(best.left);
  }
  for (int32_t i = 0; i >= 0; i = symbols[i].next) ids->push_back(symbols[i].id);
}

void BpeMerges::MergeFew(std::span<const int32_t> piece, std::vector<int32_t>* ids) const {
  constexpr PairTable::Value kNone = {std::numeric_limits<int32_t>::max(), -1};
  std::array<int32_t, kFewSymbols> symbols;
  std::array<PairTable::Value, kFewSymbols> merges;  // of a symbol and the next one
  size_t count = piece.size();
  std::copy(piece.begin(), piece.end(), symbols.begin());
  const auto look = [&](size_t left) {
    const PairTable::Value* merge =
        left + 1 < count ? merges_.Find(symbols[left], symbols[left + 1]) : nullptr;
    merges[left] = merge == nullptr ? kNone : *merge;
  };
  for (size_t i = 0; i < count; ++i) look(i);
  while (true) {
    const auto best = std::min_element(
        merges.begin(), merges.begin() + static_cast<ptrdiff_t>(count),
        [](const PairTable::Value& a, const PairTable::Value& b) { return a.first < b.first; });
    if (best->second < 0) break;
    const auto left = static_cast<size_t>(best - merges.begin());
    symbols[left] = best->second;
    --count;
    std::copy(symbols.begin() + left + 2, symbols.begin() + count + 1, symbols.begin() + left + 1);
    std::copy(merges.begin() + left + 2, merges.begin() + count + 1, merges.begin() + left + 1);
    look(left);
    if (left > 0) look(left - 1);
  }
  ids->insert(ids->end(), symbols.begin(), symbols.begin() + static_cast<ptrdiff_t>(count));
}

BpeSymbols::BpeSymbols() {
  bytes_.fill(-1);
  ascii_.fill(-1);
}

void BpeSymbols::SetCharacter(char32_t character, int32_t id) {
  if (character < ascii_.size()) {
    ascii_[character] = id;
  } else {
    characters_[character] = id;
  }
}

int32_t BpeSymbols::FindCharacter(char32_t character) const {
  if (character < ascii_.size()) return ascii_[character];
  const auto found = characters_.find(character);
  return found == characters_.end() ? -1 : found->second;
}

void BpeSymbols::Of(std::string_view piece, std::vector<int32_t>* symbols) const {
  bool pending = false;  // an unknown that is not written yet (tokenizers, bpe/model.rs)
  const auto unknown = [&] {
    if (!unknown_.has_value()) return;
    if (pending && !unknown_->second) symbols->push_back(unknown_->first);
    pending = true;
  };
  const auto known = [&](int32_t id) {
    if (pending) symbols->push_back(unknown_->first);
    pending = false;
    symbols->push_back(id);
  };
  for (size_t at = 0; at < piece.size();) {
    if (byte_level_) {
      const int32_t id = bytes_[static_cast<uint8_t>(piece[at++])];
      id >= 0 ? known(id) : unknown();
      continue;
    }
    const Utf8Unit unit = Utf8At(piece, at);
    const std::string_view bytes = piece.substr(at, unit.bytes);
    at += unit.bytes;
    const int32_t id = FindCharacter(unit.code_point);
    if (id >= 0) {
      known(id);
      continue;
    }
    const auto has_token = [&](char byte) { return bytes_[static_cast<uint8_t>(byte)] >= 0; };
    if (std::all_of(bytes.begin(), bytes.end(), has_token)) {
      for (const char byte : bytes) symbols->push_back(bytes_[static_cast<uint8_t>(byte)]);
    } else {
      unknown();
    }
  }
  if (pending) symbols->push_back(unknown_->first);
}

}  // namespace kvant::node
