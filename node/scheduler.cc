#include "node/scheduler.h"

#include <spdlog/spdlog.h>

#include <algorithm>
#include <utility>

namespace kvant::node {

// One request from its prompt to its last token.
struct Scheduler::Sequence {
  enum class State : uint8_t { kSupplying, kReady, kDecoding, kFinished };

  Sequence(const BlockClass& block_class, const Request& asked)
      : request(asked),
        open(block_class.model().config()),
        text(&block_class.model().tokenizer()),
        stops(asked.stop) {}

  Request request;
  State state = State::kSupplying;
  std::vector<int32_t> tokens;  // prompt, then generated
  size_t prompt_tokens = 0;
  size_t generate_at_most = 0;
  SupplyJobPtr supply;
  std::vector<CachedBlockPtr> blocks;  // of the prompt, then private ones of what was generated
  OpenTile open;
  StreamDecoder text;
  StopMatcher stops;
  SamplingOptions sampling;
  const std::vector<int32_t>* teacher = nullptr;
  Answer answer;
  TimePoint admitted{};
  TimePoint first_token{};
};

// What a conversation's next turn continues.
struct Scheduler::Conversation {
  std::vector<int32_t> tokens;
  std::string text;  // behind the tokens: what a stop string cut out of the last token
  bool begun = false;
  bool busy = false;
  size_t turns_left = 0;
  Status broken;  // a turn failed, so that later ones cannot continue
};

Scheduler::Scheduler(const BlockClass* block_class, BlockSupply* supply, TierLink* tier,
                     PrefillPeer* peer, Decoder* decoder, const Clock* clock,
                     const Domains* domains, const SchedulerOptions& options)
    : block_class_(block_class),
      supply_(supply),
      tier_(tier),
      peer_(peer),
      decoder_(decoder),
      clock_(clock),
      domains_(domains),
      options_(options) {
  KV_CHECK(options.max_batch >= 1 && options.max_batch <= kMaxDecodeRows);
  arrival_.clock = clock;
  arrival_.timeout = options.arrival_timeout;
  const auto waiting = [this](const auto& wait) {
    const TimePoint began = clock_->Now();
    const bool progress = wait();
    waited_ += clock_->Now() - began;
    return progress;
  };
  arrival_.poll = [this, waiting] { return waiting([this] { return tier_->Poll(); }); };
  arrival_.wait = [this, waiting](Duration at_most) {
    waiting([&] {
      tier_->Wait(at_most);
      return false;
    });
  };
  logits_.resize(static_cast<size_t>(options.max_batch) *
                 static_cast<size_t>(block_class->model().config().vocab));
}

Scheduler::~Scheduler() = default;

namespace {
// A conversation belongs to its tenant.
std::pair<std::string, std::string> ConversationName(const Request& request) {
  return {request.tenant, request.conversation};
}
}  // namespace

void Scheduler::Submit(const Request& request) {
  auto sequence = std::make_unique<Sequence>(*block_class_, request);
  sequence->answer.custom_id = request.custom_id;
  sequence->answer.chat = request.chat;
  sequence->sampling = {request.temperature, request.top_p, request.seed};
  if (!request.conversation.empty()) ++conversations_[ConversationName(request)].turns_left;
  queued_.push_back(std::move(sequence));
}

void Scheduler::SetTeacher(const std::string& custom_id, std::vector<int32_t> tokens) {
  teachers_[custom_id] = std::move(tokens);
}

void Scheduler::SetListener(
    std::function<void(const std::string& custom_id, std::string_view text)> listener) {
  listener_ = std::move(listener);
}

size_t Scheduler::open_requests() const { return queued_.size() + active_.size(); }

bool Scheduler::idle() const { return open_requests() == 0 && background_.empty(); }

std::vector<Answer> Scheduler::TakeAnswers() { return std::exchange(answers_, {}); }

bool Scheduler::Step() {
  bool progress = tier_ != nullptr && tier_->Poll();
  Admit();
  progress |= AdvanceSupplies();
  progress |= ComputeTail();
  progress |= DecodeAll();
  std::erase_if(active_,
                [](const auto& sequence) { return sequence->state == Sequence::State::kFinished; });
  if (!progress) progress = RunBackground();
  return progress;
}

void Scheduler::Admit() {
  for (auto next = queued_.begin();
       next != queued_.end() && active_.size() < static_cast<size_t>(options_.max_batch);) {
    const Request& request = (*next)->request;
    Conversation* conversation =
        request.conversation.empty() ? nullptr : &conversations_[ConversationName(request)];
    if (conversation != nullptr && conversation->busy) {
      ++next;
      continue;
    }
    if (conversation != nullptr) conversation->busy = true;
    std::unique_ptr<Sequence> sequence = std::move(*next);
    next = queued_.erase(next);
    sequence->admitted = clock_->Now();
    const Status status = Prepare(sequence.get());
    if (!status.ok()) {
      FinishWithError(sequence.get(), status);
      continue;
    }
    active_.push_back(std::move(sequence));
  }
}

Status Scheduler::Prepare(Sequence* sequence) {
  const Request& request = sequence->request;
  const Model& model = block_class_->model();
  KV_RETURN_IF_ERROR(CheckSampling(sequence->sampling));
  std::string text = request.prompt;
  if (request.chat) {
    KV_ASSIGN_OR_RETURN(text, ApplyChatTemplate(model.chat_template(), request.messages));
  }
  bool begin = true;
  if (!request.conversation.empty()) {
    Conversation& conversation = conversations_[ConversationName(request)];
    if (!conversation.broken.ok()) return conversation.broken;
    sequence->tokens = conversation.tokens;
    if (request.prompt_tokens.empty()) text.insert(0, conversation.text);
    begin = !conversation.begun;
  }
  if (request.prompt_tokens.empty()) {
    // A chat template writes its own special tokens.
    KV_ASSIGN_OR_RETURN(const std::vector<int32_t> encoded,
                        model.tokenizer().Encode(text, begin && !request.chat));
    sequence->tokens.insert(sequence->tokens.end(), encoded.begin(), encoded.end());
  } else {
    for (const int32_t token : request.prompt_tokens) {
      if (token >= model.config().vocab) {
        return InvalidArgument("token {} is outside the vocabulary of {} tokens", token,
                               model.config().vocab);
      }
      sequence->tokens.push_back(token);
    }
  }
  const size_t context = static_cast<size_t>(model.config().max_positions);
  if (sequence->tokens.empty()) {
    return InvalidArgument("the prompt is empty");
  }
  if (sequence->tokens.size() >= context) {
    return InvalidArgument(
        "the prompt has {} tokens, and the model's context of {} must hold one more;"
        " shorten the prompt",
        sequence->tokens.size(), context);
  }
  sequence->prompt_tokens = sequence->tokens.size();
  sequence->generate_at_most =
      std::min(static_cast<size_t>(request.max_tokens), context - sequence->prompt_tokens);
  const auto teacher = teachers_.find(request.custom_id);
  if (teacher != teachers_.end()) {
    KV_RETURN_IF_ERROR(CheckTeacher(*sequence, teacher->second));
    sequence->teacher = &teacher->second;
  }

  SupplyNeed need;
  need.tokens = sequence->tokens;
  need.blocks = (sequence->tokens.size() - 1) / kBlockTokens;
  need.tenant = request.tenant;
  need.domain = domains_->DomainOf(request.tenant);
  need.wire = options_.wire;
  sequence->supply = supply_->Start(std::move(need));
  return OkStatus();
}

Status Scheduler::CheckTeacher(const Sequence& sequence, std::span<const int32_t> teacher) const {
  const ModelConfig& config = block_class_->model().config();
  const size_t room = static_cast<size_t>(config.max_positions) - sequence.prompt_tokens;
  const bool known = std::all_of(teacher.begin(), teacher.end(),
                                 [&](int32_t token) { return token >= 0 && token < config.vocab; });
  if (!teacher.empty() && teacher.size() <= room && known) return OkStatus();
  return InvalidArgument(
      "request '{}': the teacher's answer must have 1 to {} tokens below {}; it has {}. Is it of "
      "another model?",
      sequence.request.custom_id, room, config.vocab, teacher.size());
}

bool Scheduler::AdvanceSupplies() {
  bool computed = false;
  for (const auto& sequence : active_) {
    if (sequence->state != Sequence::State::kSupplying) continue;
    switch (supply_->Advance(sequence->supply)) {
      case BlockSupply::Progress::kWaiting:
        break;
      case BlockSupply::Progress::kReady:
        sequence->state = Sequence::State::kReady;
        break;
      case BlockSupply::Progress::kCompute: {
        // One block a round, so that those who decode wait for one block at most.
        if (computed) break;
        computed = true;
        const Status status = supply_->ComputeNext(sequence->supply);
        if (!status.ok()) FinishWithError(sequence.get(), status);
        break;
      }
    }
  }
  return computed;
}

bool Scheduler::ComputeTail() {
  const auto ready = std::find_if(active_.begin(), active_.end(), [](const auto& sequence) {
    return sequence->state == Sequence::State::kReady;
  });
  if (ready == active_.end()) return false;
  Sequence* sequence = ready->get();
  const size_t begin = sequence->supply->blocks.size() * kBlockTokens;
  BlockPast past(*block_class_, sequence->supply->blocks, sequence->supply->read_cuts,
                 tier_ != nullptr ? &arrival_ : nullptr);
  PrefillBlock tail;
  tail.tokens = std::span(sequence->tokens).subspan(begin);
  tail.position = static_cast<int>(begin);
  tail.past = &past;
  const TimePoint began = clock_->Now();
  waited_ = {};
  const Status status = decoder_->PrefillTail(tail, &sequence->open, logits_.data());
  if (!status.ok()) {
    // A block did not arrive. The supply finds out which one and computes it.
    sequence->state = Sequence::State::kSupplying;
    return true;
  }
  SupplyJob& supply = *sequence->supply;
  supply_->SawPrefill(tail.position, tail.tokens.size(), clock_->Now() - began - waited_);
  sequence->blocks = supply.blocks;
  const size_t hits = supply.local_hits + supply.tier_hits;
  sequence->answer.prompt_tokens = static_cast<int>(sequence->prompt_tokens);
  sequence->answer.cached_tokens = static_cast<int>(hits * kBlockTokens);
  sequence->answer.tier_tokens = static_cast<int>(supply.tier_found * kBlockTokens);
  const size_t fetched = supply.tier_hits - std::min(supply.tier_hits, supply.recomputed);
  sequence->answer.fetched_tokens = static_cast<int>(fetched * kBlockTokens);
  stats_.prompt_tokens += sequence->prompt_tokens;
  stats_.cached_tokens += hits * kBlockTokens;
  stats_.local_hit_tokens += supply.local_hits * kBlockTokens;
  stats_.tier_hit_tokens += supply.tier_hits * kBlockTokens;
  stats_.recomputed_tokens += supply.recomputed * kBlockTokens;
  stats_.tail_tokens += tail.tokens.size();
  sequence->state = Sequence::State::kDecoding;
  sequence->first_token = clock_->Now();
  sequence->answer.ttft = sequence->first_token - sequence->admitted;
  TakeToken(sequence,
            std::span(logits_).first(static_cast<size_t>(block_class_->model().config().vocab)));
  return true;
}

bool Scheduler::DecodeAll() {
  std::vector<Sequence*> decoding;
  for (const auto& sequence : active_) {
    if (sequence->state == Sequence::State::kDecoding) decoding.push_back(sequence.get());
  }
  if (decoding.empty()) return false;
  std::deque<BlockPast> pasts;
  std::vector<DecodeRow> rows;
  for (Sequence* sequence : decoding) {
    if (sequence->open.full()) SealOpenTile(sequence);
    DecodeRow row;
    row.token = sequence->tokens.back();
    row.position = static_cast<int>(sequence->tokens.size()) - 1;
    row.past =
        &pasts.emplace_back(*block_class_, sequence->blocks, sequence->supply->read_cuts, nullptr);
    row.open = &sequence->open;
    rows.push_back(std::move(row));
  }
  decoder_->DecodeStep(rows, logits_.data());
  const size_t vocab = static_cast<size_t>(block_class_->model().config().vocab);
  for (size_t i = 0; i < rows.size(); ++i) {
    // All blocks arrived before the first token, so there is nothing left that could fail.
    KV_CHECK(rows[i].status.ok());
    TakeToken(decoding[i], std::span(logits_).subspan(i * vocab, vocab));
  }
  return true;
}

void Scheduler::SealOpenTile(Sequence* sequence) {
  auto block = std::make_shared<CachedBlock>(*block_class_, BlockKey{}, block_class_->FullCuts());
  for (int layer = 0; layer < block_class_->layout().layers(); ++layer) {
    block_class_->EncodeLayer(layer, sequence->open.keys(layer), sequence->open.values(layer),
                              block->bytes.data(), nullptr);
    block->MarkReady(layer);
  }
  sequence->blocks.push_back(std::move(block));
  sequence->open.Clear();
}

void Scheduler::TakeToken(Sequence* sequence, std::span<const float> logits) {
  const size_t step = sequence->answer.tokens.size();
  int32_t token = Sample(logits, sequence->sampling, step);
  if (sequence->teacher != nullptr) {
    ++stats_.teacher_tokens;
    if (token == (*sequence->teacher)[step]) ++stats_.teacher_agreed;
    token = (*sequence->teacher)[step];
  } else if (block_class_->model().config().IsEos(token)) {
    Finish(sequence, FinishReason::kStop);
    return;
  }
  sequence->tokens.push_back(token);
  sequence->answer.tokens.push_back(token);
  ++stats_.generated_tokens;
  const std::string certain = sequence->stops.Push(sequence->text.Push(token));
  sequence->answer.text += certain;
  if (listener_ && !certain.empty()) listener_(sequence->request.custom_id, certain);
  const bool last = sequence->teacher != nullptr ? step + 1 == sequence->teacher->size()
                                                 : step + 1 == sequence->generate_at_most;
  if (sequence->teacher == nullptr && sequence->stops.stopped()) {
    Finish(sequence, FinishReason::kStop);
  } else if (last) {
    Finish(sequence, FinishReason::kLength);
  }
}

void Scheduler::Finish(Sequence* sequence, FinishReason reason) {
  if (!sequence->stops.stopped()) {
    std::string rest = sequence->stops.Push(sequence->text.Finish());
    if (!sequence->stops.stopped()) rest += sequence->stops.Finish();
    sequence->answer.text += rest;
    if (listener_ && !rest.empty()) listener_(sequence->request.custom_id, rest);
  }
  const size_t generated = sequence->answer.tokens.size();
  if (generated > 1) {
    sequence->answer.tpot = (clock_->Now() - sequence->first_token) / (generated - 1);
  }
  sequence->answer.finish = reason;
  CloseConversation(sequence);
  answers_.push_back(sequence->answer);
  sequence->state = Sequence::State::kFinished;
}

void Scheduler::FinishWithError(Sequence* sequence, const Status& status) {
  sequence->answer.error = status;
  sequence->answer.finish = FinishReason::kError;
  if (!sequence->request.conversation.empty()) {
    Conversation& conversation = conversations_[ConversationName(sequence->request)];
    conversation.busy = false;
    --conversation.turns_left;
    if (conversation.broken.ok()) {
      conversation.broken = InvalidArgument(
          "conversation '{}' ended when its request '{}' failed: {}",
          sequence->request.conversation, sequence->request.custom_id, status.message());
    }
  }
  answers_.push_back(sequence->answer);
  sequence->state = Sequence::State::kFinished;
}

void Scheduler::CloseConversation(Sequence* sequence) {
  bool goes_on = options_.store_all_answers && HereInFull(*sequence);
  if (!sequence->request.conversation.empty()) {
    Conversation& conversation = conversations_[ConversationName(sequence->request)];
    conversation.begun = true;
    conversation.busy = false;
    --conversation.turns_left;
    goes_on = goes_on || conversation.turns_left > 0;
    // The next turn continues the text that was answered: tokens that lie inside it whole, then
    // what a stop string left of the next one.
    const std::span<const int32_t> generated = sequence->answer.tokens;
    size_t kept = generated.size();
    std::string_view answered = sequence->answer.text;
    if (sequence->stops.stopped()) {
      kept = 0;
      size_t bytes = 0;
      while (kept < generated.size()) {
        const size_t next =
            bytes + block_class_->model().tokenizer().TokenBytes(generated[kept]).size();
        if (next > answered.size()) break;
        bytes = next;
        ++kept;
      }
      answered.remove_prefix(bytes);
    } else {
      answered = {};
    }
    conversation.tokens.assign(
        sequence->tokens.begin(),
        sequence->tokens.begin() + static_cast<ptrdiff_t>(sequence->prompt_tokens + kept));
    conversation.text = std::string(answered);
    sequence->tokens = conversation.tokens;
  }
  if (goes_on && options_.store_answers) StoreAnswer(*sequence);
}

bool Scheduler::HereInFull(const Sequence& sequence) const {
  const auto& blocks = sequence.supply->blocks;
  return std::all_of(blocks.begin(), blocks.end(), [&](const CachedBlockPtr& block) {
    return block->portion.cuts.Covers(block_class_->FullCuts());
  });
}

void Scheduler::StoreAnswer(const Sequence& sequence) {
  const size_t stored = sequence.supply->blocks.size();
  SupplyNeed need;
  need.tokens = sequence.tokens;
  need.blocks = sequence.tokens.size() / kBlockTokens;
  need.tenant = sequence.request.tenant;
  need.domain = domains_->DomainOf(need.tenant);
  if (need.blocks <= stored) return;
  if (peer_ == nullptr) {
    background_.push_back(supply_->Start(std::move(need)));
    return;
  }
  std::vector<size_t> missing;
  for (size_t i = stored; i < need.blocks; ++i) missing.push_back(i);
  const std::vector<BlockKey> keys =
      block_class_->Keys(std::span(need.tokens).first(need.blocks * kBlockTokens), need.domain);
  peer_->Ask(need.tokens, keys, need.tenant, missing, {});
}

bool Scheduler::RunBackground() {
  if (background_.empty()) return false;
  const SupplyJobPtr job = background_.front();
  switch (supply_->Advance(job)) {
    case BlockSupply::Progress::kWaiting:
      return false;
    case BlockSupply::Progress::kReady:
      break;
    case BlockSupply::Progress::kCompute:
      if (supply_->ComputeNext(job).ok()) return true;
      break;
  }
  background_.erase(background_.begin());
  return true;
}

}  // namespace kvant::node
