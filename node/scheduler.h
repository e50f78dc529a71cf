// Continuous batching: many sequences at once, each from its prompt's blocks to its last token.
//
// A sequence of n prompt tokens attends the whole blocks of tokens [0, floor((n - 1) / 64) * 64) as
// they are stored. The 1 to 64 tokens behind them are computed here in one prefill, stay raw in the
// open tile, and give the first token's logits; so no tail block is ever moved.
#pragma once

#include <cstdint>
#include <deque>
#include <filesystem>
#include <functional>
#include <map>
#include <memory>
#include <string>
#include <unordered_map>
#include <vector>

#include "base/clock.h"
#include "node/block_past.h"
#include "node/block_supply.h"
#include "node/decoder.h"
#include "node/requests.h"
#include "node/sampler.h"
#include "node/tokenizer.h"

namespace kvant::node {

struct SchedulerOptions {
  int max_batch = 8;  // sequences under way at once, 1..kMaxDecodeRows
  Wire wire = Wire::kFull;
  Duration arrival_timeout = std::chrono::seconds(10);
  // Put what was generated into the store when a turn ends and the conversation goes on.
  bool store_answers = true;
  // The same after every answer, whether or not a turn follows, if that takes nothing from the
  // tier: if what stands before is here at the full cut.
  bool store_all_answers = false;
};

struct SchedulerStats {
  uint64_t prompt_tokens = 0;
  uint64_t cached_tokens = 0;  // of the prompts, found in the node or in the tier
  uint64_t local_hit_tokens = 0;
  uint64_t tier_hit_tokens = 0;
  uint64_t generated_tokens = 0;
  uint64_t recomputed_tokens = 0;  // that were to be had, but failed on the way
  uint64_t tail_tokens = 0;        // computed here behind the last whole block
  uint64_t teacher_tokens = 0;     // compared with a teacher's
  uint64_t teacher_agreed = 0;
};

// Single-owner; borrows all pointers.
class Scheduler {
 public:
  // tier, peer: nullptr where there is none.
  Scheduler(const BlockClass* block_class, BlockSupply* supply, TierLink* tier, PrefillPeer* peer,
            Decoder* decoder, const Clock* clock, const Domains* domains,
            const SchedulerOptions& options);
  ~Scheduler();

  // Queues requests; turns of one conversation run in the order given.
  void Submit(const Request& request);
  // Feed these tokens instead of what is chosen, and count where the choice is the same.
  void SetTeacher(const std::string& custom_id, std::vector<int32_t> tokens);
  // Sees each piece of text as soon as it is certain. Optional.
  void SetListener(
      std::function<void(const std::string& custom_id, std::string_view text)> listener);

  // One round: admits, supplies, computes at most one block, one tail and one decode step.
  // False: nothing could be done but wait for the network.
  bool Step();
  // Requests that have no answer yet.
  size_t open_requests() const;
  // Answered, and everything that was to be stored behind them is computed.
  bool idle() const;
  std::vector<Answer> TakeAnswers();
  const SchedulerStats& stats() const { return stats_; }

 private:
  struct Sequence;
  struct Conversation;
  void Admit();
  Status Prepare(Sequence* sequence);
  // That its tokens can follow the prompt. kInvalidArgument otherwise.
  Status CheckTeacher(const Sequence& sequence, std::span<const int32_t> teacher) const;
  bool AdvanceSupplies();
  bool ComputeTail();
  bool DecodeAll();
  void TakeToken(Sequence* sequence, std::span<const float> logits);
  void Finish(Sequence* sequence, FinishReason reason);
  void FinishWithError(Sequence* sequence, const Status& status);
  void CloseConversation(Sequence* sequence);
  // Whether a sequence's blocks are here at the full cut, as blocks are computed over.
  bool HereInFull(const Sequence& sequence) const;
  void StoreAnswer(const Sequence& sequence);
  void SealOpenTile(Sequence* sequence);
  bool RunBackground();

  const BlockClass* block_class_;
  BlockSupply* supply_;
  TierLink* tier_;
  PrefillPeer* peer_;
  Decoder* decoder_;
  const Clock* clock_;
  const Domains* domains_;
  SchedulerOptions options_;
  ArrivalWait arrival_;
  Duration waited_{};  // in arrival_, of the tail under way
  SchedulerStats stats_;
  std::deque<std::unique_ptr<Sequence>> queued_;
  std::vector<std::unique_ptr<Sequence>> active_;
  std::map<std::pair<std::string, std::string>, Conversation> conversations_;  // by tenant, name
  std::unordered_map<std::string, std::vector<int32_t>> teachers_;
  std::vector<SupplyJobPtr> background_;
  std::vector<Answer> answers_;
  std::vector<float> logits_;
  std::function<void(const std::string&, std::string_view)> listener_;
};

}  // namespace kvant::node
