#include "node/block_supply.h"

#include <spdlog/spdlog.h>

#include <algorithm>
#include <utility>

#include "node/block_arrival.h"

namespace kvant::node {
namespace {

using Place = SupplyJob::Place;

// When two prefill nodes compute one block, the second one hears that it is being written and
// announces it. It is sealed within the time that one block takes to travel.
constexpr uint8_t kAnnouncedFetches = 20;
constexpr Duration kFetchAgainAfter = std::chrono::milliseconds(10);

std::span<const int32_t> TokensOf(const SupplyJob& job, size_t block) {
  return std::span(job.need.tokens).subspan(block * kBlockTokens, kBlockTokens);
}

// A block while it is computed.
class ComputedBlock {
 public:
  // is_stored: somebody will ask for stored(), or for fewer cuts of the block.
  ComputedBlock(const BlockClass& block_class, const BlockKey& key, bool is_stored)
      : block_class_(block_class),
        is_stored_(is_stored || block_class.form().lossy()),
        block_(std::make_shared<CachedBlock>(block_class, key, block_class.FullCuts())),
        errors_(block_class.layout().rows().size()) {
    block_->computed = true;
  }

  // Layers come in order, as a LayerSink gets them.
  void Layer(int layer, const float* keys, const float* values) {
    const StoredForm& form = block_class_.form();
    if (is_stored_ && form.whole_at_any_cut()) {
      // What is stored is made of all layers.
      const auto copy = [](const kernels::SegmentShape& shape, const float* from) {
        return std::vector<float>(from, from + shape.tokens * shape.kv_heads * shape.head_dim);
      };
      exact_keys_.push_back(copy(block_class_.layout().shape().keys, keys));
      exact_values_.push_back(copy(block_class_.layout().shape().values, values));
    }
    if (form.lossy()) return;  // what is attended is made of what is stored
    block_class_.EncodeLayer(layer, keys, values, block_->bytes.data(), errors_.data());
    block_->MarkReady(layer);
  }
  // What enters a layer, [kBlockTokens][hidden]; before Layer of that.
  void Entering(int layer, const float* x) {
    const std::span<const StoredWay> ways = block_class_.form().ways();
    entering_.resize(ways.size());
    const auto hidden = static_cast<ptrdiff_t>(block_class_.model().config().hidden);
    for (size_t way = 0; way < ways.size(); ++way) {
      if (is_stored_ && layer > 0 && ways[way].recomputed == layer)
        entering_[way].assign(x, x + kBlockTokens * hidden);
    }
  }

  // After the last layer.
  void Finish(BlockToStore whole) {
    const StoredForm& form = block_class_.form();
    if (!is_stored_) return;
    whole.max_errors = errors_;
    whole.keys = exact_keys_;
    whole.values = exact_values_;
    whole.entering = entering_;
    form.Encode(whole, block_->bytes, &stored_);
    if (!form.whole_at_any_cut()) {
      block_->manifest = std::make_shared<const BlockManifest>(std::move(stored_.manifest));
      return;
    }
    block_->stored = StoredRows(std::move(stored_));
    block_->manifest = block_->stored.manifest();
    for (int layer = 0; layer < block_class_.layout().layers(); ++layer) block_->MarkReady(layer);
  }

  const CachedBlockPtr& block() const { return block_; }
  // REQUIRES: it is stored, and finished.
  std::span<const std::byte> stored() const {
    const StoredForm& form = block_class_.form();
    if (form.plain()) return block_->bytes;
    return form.whole_at_any_cut() ? block_->stored.bytes() : stored_.bytes;
  }

 private:
  const BlockClass& block_class_;
  bool is_stored_;
  CachedBlockPtr block_;
  StoredBlock stored_;
  std::vector<float> errors_;
  std::vector<std::vector<float>> exact_keys_;    // [layers], of a form that is whole at any cut
  std::vector<std::vector<float>> exact_values_;  // [layers]
  std::vector<std::vector<float>> entering_;      // [way]
};

}  // namespace

SupplyJobPtr BlockSupply::Start(SupplyNeed need) {
  auto job = std::make_shared<SupplyJob>();
  KV_CHECK(need.blocks * kBlockTokens <= need.tokens.size());
  job->keys =
      block_class_->Keys(std::span(need.tokens).first(need.blocks * kBlockTokens), need.domain);
  job->blocks.resize(need.blocks);
  job->place.assign(need.blocks, Place::kUnknown);
  job->patience.assign(need.blocks, 0);
  job->scope.assign(need.blocks, Scope::kGlobal);
  const std::span<const ReadChoice> choices = block_class_->choices();
  job->read_cuts = need.wire == Wire::kAuto ? choices[planner_->Coarsest(choices)].cuts
                                            : block_class_->CutsOf(need.wire);
  job->need = std::move(need);
  FindNeeds(job.get());
  return job;
}

Portion BlockSupply::NeedOf(const SupplyJob& job, size_t block) const {
  return job.NeedOf(block, *block_class_, job.read_cuts);
}

void BlockSupply::FindNeeds(SupplyJob* job) const {
  // Whoever comes next behind a block sees more of it than those further on. Behind the last one
  // comes the tail.
  size_t next = job->place.size();
  for (size_t i = job->place.size(); i-- > 0;) {
    job->scope[i] = std::max(job->scope[i], block_class_->ScopeAttended(i, next * kBlockTokens));
    if (job->place[i] != Place::kCompute) continue;
    job->full_before = std::max(job->full_before, i);
    next = i;
  }
}

bool BlockSupply::TakeIfHere(SupplyJob* job, size_t block) {
  const Portion need = NeedOf(*job, block);
  CachedBlockPtr here = Serving(*job, block, cache_->Find(job->keys[block], need), need);
  if (here == nullptr) return false;
  job->blocks[block] = std::move(here);
  job->place[block] = Place::kHere;
  return true;
}

bool BlockSupply::Serves(const SupplyJob& job, const Portion& held, const Portion& need) const {
  if (block_class_->Serves(held, need)) return true;
  if (job.need.wire != Wire::kAuto) return false;
  const bool enough = held.cuts.way == need.cuts.way ? held.Covers(need) : held.scope >= need.scope;
  return enough && planner_->MayRead(block_class_->choices()[block_class_->ChoiceOf(held.cuts)]);
}

CachedBlockPtr BlockSupply::Serving(const SupplyJob& job, size_t block, const CachedBlockPtr& held,
                                    const Portion& need) const {
  if (held == nullptr || Serves(job, held->portion, need)) return held;
  if (!held->portion.Covers(need) || !held->complete()) return nullptr;
  return ReadLess(*block_class_, *held, need, TokensOf(job, block),
                  static_cast<int>(block) * kBlockTokens);
}

void BlockSupply::TakeLocal(SupplyJob* job) {
  job->took_local = true;
  for (size_t i = 0; i < job->keys.size(); ++i) {
    if (TakeIfHere(job, i)) ++job->local_hits;
  }
  stats_.local_hit_blocks += job->local_hits;
}

void BlockSupply::LookUp(const SupplyJobPtr& job) {
  // What the node has needs no asking; runs are placed by their first block, so the chain is cut
  // where a run begins.
  size_t first = 0;
  while (first < job->place.size() && job->place[first] == Place::kHere) ++first;
  first = first / kRunBlocks * kRunBlocks;
  job->looking_up = true;
  tier_->Lookup(std::span(job->keys).subspan(first), [weak = std::weak_ptr(job), first](
                                                         const std::vector<LookupBlock>& found) {
    const SupplyJobPtr waiting = weak.lock();
    if (waiting == nullptr) return;
    waiting->looking_up = false;
    waiting->found.assign(waiting->keys.size(), LookupBlock{});
    std::copy(found.begin(), found.end(), waiting->found.begin() + static_cast<ptrdiff_t>(first));
  });
}

void BlockSupply::PlanSources(const SupplyJobPtr& job) {
  job->planned = true;
  std::vector<size_t> in_tier;
  std::vector<size_t> missing;
  size_t unread = 0;
  for (size_t i = 0; i < job->keys.size(); ++i) {
    if (job->place[i] == Place::kHere) continue;
    const bool there = !job->found.empty() && block_class_->MayBe(job->found[i]);
    if (!there && !job->found.empty() && job->found[i].state == LookupState::kPresent) ++unread;
    (there ? in_tier : missing).push_back(i);
  }
  if (unread > 0) tier_->SawUnread(unread);
  const auto silent = std::count_if(job->found.begin(), job->found.end(), [](const auto& block) {
    return block.state == LookupState::kUnreachable;
  });
  if (silent != 0) {
    spdlog::warn("{} of {} blocks are recomputed: their shards cannot be reached", silent,
                 job->keys.size());
  }

  const bool ask = peer_ != nullptr && !missing.empty();
  for (const size_t i : missing) job->place[i] = ask ? Place::kPeer : Place::kCompute;
  FindNeeds(job.get());
  if (ask) AskPeer(job, missing);

  std::vector<size_t> to_come = in_tier;
  if (ask) to_come.insert(to_come.end(), missing.begin(), missing.end());
  if (job->need.wire == Wire::kAuto && !to_come.empty()) ChooseRead(job.get(), to_come);
  if (in_tier.empty()) return;
  job->tier_found = in_tier.size();
  PlanQuestion question;
  question.fetch = WorkOf(*job, in_tier, job->read_cuts);
  question.choice = block_class_->ChoiceOf(job->read_cuts);
  question.compute_tokens = in_tier.size() * kBlockTokens;
  for (const size_t i : in_tier) {
    question.compute_work +=
        block_class_->PrefillWork(static_cast<int>(i) * kBlockTokens, kBlockTokens);
  }
  question.also_fetch = AlsoFetch(*job, in_tier);
  job->plan = planner_->Decide(question);
  job->plan_started = clock_->Now();
  job->plan_open = true;
  spdlog::info(
      "plan: {} {} blocks; forecast {:.2f} ms to fetch {} bytes (cut {}), {:.2f} ms to compute {}"
      " tokens",
      job->plan.fetch ? "fetch" : "compute", in_tier.size(), Milliseconds(job->plan.fetch_forecast),
      question.fetch.bytes, block_class_->choices()[question.choice].name,
      Milliseconds(job->plan.compute_forecast), question.compute_tokens);
  for (const size_t i : in_tier) {
    job->place[i] = job->plan.fetch ? Place::kTier : Place::kCompute;
  }
  if (!job->plan.fetch) {
    // What is computed has all cuts, and is read so unless something here would have to follow.
    const Cuts full = block_class_->FullCuts();
    FindNeeds(job.get());
    if (job->need.wire == Wire::kAuto && WorkOf(*job, {}, full).bytes == 0) job->read_cuts = full;
    return;
  }
  job->tier_hits = in_tier.size();
  stats_.tier_hit_blocks += in_tier.size();
}

void BlockSupply::AskPeer(const SupplyJobPtr& job, std::span<const size_t> missing) {
  stats_.asked_blocks += missing.size();
  peer_->Ask(job->need.tokens, job->keys, job->need.tenant, missing,
             [weak = std::weak_ptr(job)](size_t block, const Status& status) {
               const SupplyJobPtr waiting = weak.lock();
               if (waiting == nullptr || waiting->place[block] != Place::kPeer) return;
               waiting->place[block] = status.ok() ? Place::kTier : Place::kCompute;
               waiting->patience[block] = kAnnouncedFetches;
               if (status.ok()) return;
               ++waiting->recomputed;
               spdlog::warn("block {} is computed here: the prefill node said {}",
                            waiting->keys[block].ShortHex(), status.ToString());
             });
}

void BlockSupply::DropFailed(SupplyJob* job) {
  for (size_t i = 0; i < job->blocks.size(); ++i) {
    const CachedBlockPtr& block = job->blocks[i];
    if (block == nullptr || block->failed.ok()) continue;
    if (block->absent && job->patience[i] > 0) {
      --job->patience[i];
      job->fetch_again_at = clock_->Now() + kFetchAgainAfter;
      job->blocks[i] = nullptr;
      job->place[i] = Place::kTier;
      continue;
    }
    // The link has said once what is missing to read such blocks.
    const bool unread = block->failed.code() == StatusCode::kUnsupported;
    spdlog::log(unread ? spdlog::level::info : spdlog::level::warn,
                "block {} (tokens {} to {}) is recomputed: {}", block->key.ShortHex(),
                i * kBlockTokens, (i + 1) * kBlockTokens, block->failed.ToString());
    const bool late = block->failed.code() == StatusCode::kDeadlineExceeded;
    job->blocks[i] = nullptr;
    job->place[i] = Place::kCompute;
    ++job->recomputed;
    if (late) GiveUpShard(job, tier_->map().Owner(RunOf(job->keys, i)));
  }
}

void BlockSupply::GiveUpShard(SupplyJob* job, size_t shard) {
  size_t given_up = 0;
  for (size_t i = 0; i < job->place.size(); ++i) {
    if (job->place[i] != Place::kTier || tier_->map().Owner(RunOf(job->keys, i)) != shard) continue;
    job->place[i] = Place::kCompute;
    ++given_up;
  }
  job->recomputed += given_up;
  if (given_up == 0) return;
  spdlog::warn("{} more blocks are recomputed: their shard {} was late", given_up,
               tier_->map().shards()[shard].address);
}

void BlockSupply::RaiseNeeds(SupplyJob* job) {
  FindNeeds(job);
  // What is here stays in the job until the rest of it has come. Also what was found in memory
  // before the planner chose to read more than it holds.
  for (size_t i = 0; i < job->blocks.size(); ++i) {
    if (job->place[i] != Place::kHere) continue;
    const Portion need = NeedOf(*job, i);
    if (Serves(*job, job->blocks[i]->portion, need)) continue;
    if (CachedBlockPtr less = Serving(*job, i, job->blocks[i], need)) {
      job->blocks[i] = std::move(less);
      continue;
    }
    job->place[i] = tier_ != nullptr ? Place::kTier : Place::kCompute;
  }
}

CachedBlockPtr BlockSupply::HeldOf(const SupplyJob& job, size_t block) const {
  CachedBlockPtr held = cache_->Newest(job.keys[block]);
  return held != nullptr ? held : job.blocks[block];
}

CutEnds BlockSupply::EndsOf(const SupplyJob& job, size_t block) const {
  // A lookup that did not find the block says nothing of the one that is there now.
  const bool said = !job.found.empty() && block_class_->MayBe(job.found[block]);
  return said ? job.found[block].cut_ends : CutEnds();
}

uint64_t BlockSupply::StoredBytes(const BlockManifest* known, const CutEnds& ends,
                                  const Portion* held, const Portion& need) const {
  uint64_t bytes = 0;
  for (const Selection& selection : block_class_->Missing(held, need)) {
    bytes += known != nullptr ? SelectedBytes(*known, selection)
                              : block_class_->LikelyBytes(selection, ends);
  }
  return bytes;
}

void BlockSupply::AddWork(const SupplyJob& job, size_t block, const CachedBlock* held,
                          const Portion& need, FetchWork* work) const {
  if (held != nullptr && held->portion.Covers(need)) return;
  CutEnds ends = EndsOf(job, block);
  // Blocks of one class are about as long.
  if (ends.back() == 0) ends = last_ends_;
  work->bytes += StoredBytes(held != nullptr ? held->manifest.get() : nullptr, ends,
                             held != nullptr ? &held->portion : nullptr, need);
  const std::vector<bool> layers = block_class_->form().LayersOf(need);
  work->pieces += static_cast<size_t>(std::count(layers.begin(), layers.end(), true));
  work->decode_tokens[block_class_->DecodeDepth(need.cuts)] +=
      block_class_->TokensOfLayers(block_class_->DecodedLayers(need));
  // First layers are computed from the sequence's beginning on.
  const int recomputed = block_class_->form().WayOf(need.cuts).recomputed;
  if (recomputed == 0) return;
  double recompute = 0;
  for (size_t i = 0; i <= block; ++i)
    recompute +=
        block_class_->PrefillWork(static_cast<int>(i) * kBlockTokens, kBlockTokens, recomputed);
  work->recompute_work = std::max(work->recompute_work, recompute);
}

FetchWork BlockSupply::WorkOf(const SupplyJob& job, std::span<const size_t> blocks,
                              const Cuts& read) const {
  FetchWork work;
  for (const size_t i : blocks) {
    AddWork(job, i, HeldOf(job, i).get(), job.NeedOf(i, *block_class_, read), &work);
  }
  for (size_t i = 0; i < job.place.size(); ++i) {
    if (job.place[i] != Place::kHere) continue;
    AddWork(job, i, job.blocks[i].get(), job.NeedOf(i, *block_class_, read), &work);
  }
  return work;
}

FetchWork BlockSupply::AlsoFetch(const SupplyJob& job, std::span<const size_t> computed) const {
  FetchWork work;
  size_t next = computed.size();
  for (size_t i = computed.back(); i-- > 0;) {
    while (next > 0 && computed[next - 1] > i) --next;
    if (job.place[i] != Place::kHere) continue;
    const Portion need(block_class_->FullCuts(),
                       block_class_->ScopeAttended(i, computed[next] * kBlockTokens));
    AddWork(job, i, job.blocks[i].get(), need, &work);
  }
  return work;
}

void BlockSupply::ChooseRead(SupplyJob* job, std::span<const size_t> blocks) const {
  const std::span<const ReadChoice> choices = block_class_->choices();
  std::vector<FetchWork> work;
  for (const ReadChoice& choice : choices) work.push_back(WorkOf(*job, blocks, choice.cuts));
  job->read_cuts = choices[planner_->Choose(choices, work)].cuts;
}

void BlockSupply::StartFetches(const SupplyJobPtr& job) {
  if (clock_->Now() < job->fetch_again_at) return;
  std::vector<size_t> wanted;
  for (size_t i = 0; i < job->place.size(); ++i) {
    if (job->place[i] == Place::kTier && !TakeIfHere(job.get(), i)) wanted.push_back(i);
  }
  std::vector<size_t> indices;
  std::vector<BlockFetch> blocks;
  uint64_t bytes = 0;
  for (const size_t i : wanted) {
    const Portion need = NeedOf(*job, i);
    const CachedBlockPtr held = HeldOf(*job, i);
    // What is on its way is built upon once it is here, rather than moved twice.
    if (held != nullptr && held->failed.ok() && !held->complete()) continue;
    CachedBlockPtr block = held != nullptr && held->failed.ok()
                               ? std::make_shared<CachedBlock>(*block_class_, *held, need)
                               : std::make_shared<CachedBlock>(*block_class_, job->keys[i], need);
    BlockFetch fetch{std::move(block), RunOf(job->keys, i), EndsOf(*job, i), TokensOf(*job, i),
                     static_cast<int>(i) * kBlockTokens};
    const uint64_t missing = tier_->MissingBytes(fetch);
    if (missing == 0 && !fetch.block->complete()) {
      // A lossy block is here whose fewer cuts can't be read: no better one is to be had.
      job->place[i] = Place::kCompute;
      ++job->recomputed;
      continue;
    }
    if (missing == 0) {
      // Every layer slides, and none of its tokens is attended any more.
      CountSliding(*fetch.block, fetch.ends);
      job->blocks[i] = std::move(fetch.block);
      job->place[i] = Place::kHere;
      continue;
    }
    if (!tier_->FetchTakes(blocks.size() + 1, bytes + missing)) {
      if (!StartFetch(job, indices, blocks)) return;  // the next Advance tries again
      indices.clear();
      blocks.clear();
      bytes = 0;
    }
    indices.push_back(i);
    blocks.push_back(std::move(fetch));
    bytes += missing;
  }
  if (!blocks.empty()) static_cast<void>(StartFetch(job, indices, blocks));
}

bool BlockSupply::StartFetch(const SupplyJobPtr& job, std::span<const size_t> indices,
                             const std::vector<BlockFetch>& blocks) {
  // Not held: the link stops to decode what nobody has any more.
  std::vector<std::pair<std::weak_ptr<CachedBlock>, CutEnds>> counted;
  for (const BlockFetch& fetch : blocks) counted.emplace_back(fetch.block, fetch.ends);
  const bool started =
      tier_->Fetch(blocks, [weak = std::weak_ptr(job), counted = std::move(counted), this] {
        for (const auto& [fetched, ends] : counted) {
          const CachedBlockPtr block = fetched.lock();
          if (block == nullptr || !block->complete()) continue;
          CountSliding(*block, ends);
          last_ends_ = block->manifest->EndsOfCuts();
        }
        const SupplyJobPtr waiting = weak.lock();
        if (waiting == nullptr) return;
        --waiting->fetches;
        // Others may be waiting for a buffer.
        const bool more = std::find(waiting->place.begin(), waiting->place.end(), Place::kTier) !=
                          waiting->place.end();
        if (waiting->fetches == 0 && !more && waiting->plan.fetch) ClosePlan(waiting.get());
      });
  if (!started) return false;
  ++job->fetches;
  for (size_t k = 0; k < indices.size(); ++k) {
    job->blocks[indices[k]] = blocks[k].block;
    job->place[indices[k]] = Place::kHere;
    cache_->Insert(blocks[k].block);
    WantFirstLayers(job.get(), indices[k]);
  }
  return true;
}

void BlockSupply::WantFirstLayers(SupplyJob* job, size_t block) {
  const CachedBlockPtr& fetched = job->blocks[block];
  if (!fetched->needs_entering) return;
  const int recomputed = block_class_->form().WayOf(fetched->portion.cuts).recomputed;
  // The read cuts of a job are chosen once.
  if (job->first_layers == nullptr) {
    const size_t tokens = job->keys.size() * kBlockTokens;
    job->first_layers = std::make_unique<FirstLayers>(block_class_, recomputed,
                                                      std::span(job->need.tokens).first(tokens));
  }
  KV_CHECK(job->first_layers->recomputed() == recomputed);
  job->first_layers->Want(block, fetched);
  tier_->EnteringKnown();
}

Status BlockSupply::ComputeFirstLayers(SupplyJob* job) {
  FirstLayers& first = *job->first_layers;
  const int position = static_cast<int>(first.computed()) * kBlockTokens;
  const TimePoint started = clock_->Now();
  KV_ASSIGN_OR_RETURN(const bool gave, first.Next(decoder_, [this] { tier_->Poll(); }));
  if (gave) tier_->EnteringKnown();
  planner_->SawPrefill(block_class_->PrefillWork(position, kBlockTokens, first.recomputed()),
                       clock_->Now() - started);
  ++stats_.first_layers_blocks;
  return OkStatus();
}

void BlockSupply::CountSliding(const CachedBlock& block, const CutEnds& ends) {
  const auto sliding_bytes = [&](const Cuts& cuts) {
    const Portion global(cuts, Scope::kGlobal);
    return StoredBytes(block.manifest.get(), ends, nullptr, cuts) -
           StoredBytes(block.manifest.get(), ends, nullptr, global);
  };
  const uint64_t before = block.copied ? sliding_bytes(block.copied->cuts) : 0;
  if (block.portion.scope == Scope::kGlobal) {
    stats_.sliding_bytes_skipped += sliding_bytes(block.portion.cuts) - before;
  } else if (block.copied && block.copied->scope == Scope::kGlobal) {
    stats_.sliding_bytes_fetched_later += before;
  }
}

void BlockSupply::ClosePlan(SupplyJob* job) {
  if (!job->plan_open) return;
  job->plan_open = false;
  const Duration took = clock_->Now() - job->plan_started;
  spdlog::info("plan: {} took {:.2f} ms; forecast {:.2f} ms", job->plan.fetch ? "fetch" : "compute",
               Milliseconds(took), Milliseconds(job->plan.forecast()));
  planner_->SawOutcome(job->plan, took);
}

BlockSupply::Progress BlockSupply::Advance(const SupplyJobPtr& job) {
  if (!job->took_local) {
    TakeLocal(job.get());
    for (const size_t i : job->need.publish) {
      if (job->place[i] == Place::kHere) PublishFromMemory(job, i);
    }
    const bool all = job->local_hits == job->keys.size();
    job->planned = all;
    if (!all && tier_ != nullptr) LookUp(job);
  }
  if (job->looking_up) return Progress::kWaiting;
  if (!job->planned) {
    PlanSources(job);
    for (const size_t i : job->need.publish) {
      // Somebody published it since it was missed.
      if (job->place[i] == Place::kTier) job->need.published(i, OkStatus());
    }
  }
  DropFailed(job.get());
  RaiseNeeds(job.get());
  if (tier_ != nullptr) StartFetches(job);
  if (job->first_layers != nullptr && job->first_layers->pending()) return Progress::kCompute;

  for (size_t i = 0; i < job->place.size(); ++i) {
    if (job->place[i] == Place::kCompute) {
      if (!TakeIfHere(job.get(), i)) return Progress::kCompute;
      // Computed meanwhile for another sequence; whoever computed it published it.
      if (std::binary_search(job->need.publish.begin(), job->need.publish.end(), i)) {
        job->need.published(i, OkStatus());
      }
    }
    if (job->place[i] != Place::kHere) return Progress::kWaiting;
    // What is to be computed behind it needs it complete; and another sequence that computes its
    // first layers must have its turns.
    const CachedBlock& block = *job->blocks[i];
    if (i < job->full_before && !block.complete()) return Progress::kWaiting;
    if (block.awaits_entering()) return Progress::kWaiting;
  }
  if (block_class_->form().whole_at_any_cut()) {
    // Nothing is computed over them any more: what was read in full for that is read as asked.
    job->full_before = 0;
    RaiseNeeds(job.get());
  }
  return Progress::kReady;
}

TierLink::PutId BlockSupply::BeginPut(const SupplyJob& job, size_t block, uint64_t stored_bytes) {
  return tier_->BeginPut(job.keys[block], block == 0 ? BlockKey{} : job.keys[block - 1],
                         RunOf(job.keys, block), stored_bytes);
}

void BlockSupply::PutWhole(const SupplyJobPtr& job, size_t block, const BlockManifest& manifest,
                           std::span<const std::byte> stored) {
  const TierLink::PutId put = BeginPut(*job, block, stored.size());
  if (put != 0) tier_->PutAll(put, stored);
  Seal(job, block, put, manifest);
}

BlockToStore BlockSupply::ToStore(const SupplyJob& job, size_t block) {
  BlockToStore made;
  made.key = job.keys[block];
  made.tokens = TokensOf(job, block);
  made.position = static_cast<int>(block) * kBlockTokens;
  return made;
}

void BlockSupply::Seal(const SupplyJobPtr& job, size_t block, TierLink::PutId put,
                       const BlockManifest& manifest) {
  const bool asked = std::binary_search(job->need.publish.begin(), job->need.publish.end(), block);
  TierLink::PutDone done = [](const Status&) {};
  if (asked) {
    done = [published = job->need.published, block](const Status& status) {
      published(block, status);
    };
  }
  if (put == 0) {
    done(MakeStatus(StatusCode::kResourceExhausted, "no buffer is free to publish block {}",
                    job->keys[block].ShortHex()));
    return;
  }
  tier_->SealPut(put, manifest, std::move(done));
}

void BlockSupply::PublishFromMemory(const SupplyJobPtr& job, size_t block) {
  const StoredForm& form = block_class_->form();
  CachedBlock& here = *job->blocks[block];
  if (!here.computed) {
    // It was fetched from the tier, so it is there.
    job->need.published(block, OkStatus());
    return;
  }
  if (form.plain() || form.whole_at_any_cut()) {
    PutWhole(job, block, *here.manifest, form.plain() ? here.bytes : here.stored.bytes());
    return;
  }
  std::vector<float> errors;
  for (const ManifestRow& row : here.manifest->rows) errors.push_back(row.declared_error);
  BlockToStore again = ToStore(*job, block);
  again.max_errors = errors;
  StoredBlock stored;
  form.Encode(again, here.bytes, &stored);
  PutWhole(job, block, stored.manifest, stored.bytes);
}

Status BlockSupply::ComputeNext(const SupplyJobPtr& job) {
  if (job->first_layers != nullptr && job->first_layers->pending())
    return ComputeFirstLayers(job.get());
  const size_t index = static_cast<size_t>(
      std::find(job->place.begin(), job->place.end(), Place::kCompute) - job->place.begin());
  KV_CHECK(index < job->place.size());
  const TimePoint started = clock_->Now();
  // Fewer cuts are read from what is stored, also where there is no tier.
  const bool reads_stored =
      block_class_->form().whole_at_any_cut() && job->need.wire != Wire::kFull;
  ComputedBlock made(*block_class_, job->keys[index], tier_ != nullptr || reads_stored);
  // Only a plain block's size is known before all of it is. And a put has a deadline from its
  // beginning on: where computing might take most of it, what is computed is put at once
  // afterwards.
  const bool streams =
      tier_ != nullptr && block_class_->form().plain() && computing_ < tier_->timeout() / 4;
  const TierLink::PutId put =
      streams ? BeginPut(*job, index, block_class_->payload_bytes()) : TierLink::PutId{0};

  const LayerSink sink = [&](int layer, const float* keys, const float* values) {
    made.Layer(layer, keys, values);
    // The shard reads this layer, or the block before this one, while the next layer is computed.
    if (put != 0) tier_->PutLayer(put, layer, made.block()->bytes);
    if (tier_ != nullptr) tier_->Poll();
    return OkStatus();
  };
  BlockPast past(*block_class_, std::span(job->blocks).first(index), block_class_->FullCuts(),
                 nullptr);
  PrefillBlock prefill;
  prefill.tokens = TokensOf(*job, index);
  prefill.position = static_cast<int>(index) * kBlockTokens;
  prefill.past = &past;
  const EnteringSink entering = [&](int layer, const float* x) { made.Entering(layer, x); };
  if (block_class_->form().ways().size() > 1) prefill.entering = &entering;
  const Status status = decoder_->Prefill(prefill, sink, nullptr);
  if (!status.ok()) {
    if (put != 0) tier_->CancelPut(put);
    return status;
  }
  const TimePoint computed = clock_->Now();
  made.Finish(ToStore(*job, index));
  computing_ = clock_->Now() - started;
  planner_->SawPrefill(block_class_->PrefillWork(prefill.position, kBlockTokens),
                       computed - started);
  planner_->SawEncode(kBlockTokens, started + computing_ - computed);
  const CachedBlockPtr& block = made.block();
  if (streams) {
    Seal(job, index, put, *block->manifest);
  } else if (tier_ != nullptr) {
    PutWhole(job, index, *block->manifest, made.stored());
  }
  cache_->Insert(block);
  job->blocks[index] = block;
  job->place[index] = Place::kHere;
  ++stats_.computed_blocks;
  if (!job->plan.fetch &&
      std::find(job->place.begin(), job->place.end(), Place::kCompute) == job->place.end()) {
    ClosePlan(job.get());
  }
  return OkStatus();
}

}  // namespace kvant::node
