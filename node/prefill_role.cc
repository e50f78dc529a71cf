#include "node/prefill_role.h"

#include <spdlog/spdlog.h>

#include <algorithm>
#include <utility>

#include "node/node.pb.h"

namespace kvant::node {
namespace {

// A rank may have so many more jobs than the idlest one before jobs that begin like its own go
// elsewhere: two are what it computes and what it prepares meanwhile.
constexpr size_t kAffinitySlack = 2;

}  // namespace

struct PrefillRouter::Job {
  int rank = 0;
  std::vector<size_t> open;  // blocks without a reply
  BlockDone done;
  TimePoint last_progress{};
};

PrefillRouter::PrefillRouter(NodeLink* link, const Clock* clock, std::vector<int> ranks,
                             Duration patience)
    : link_(link), clock_(clock), ranks_(std::move(ranks)), patience_(patience) {
  KV_CHECK(!ranks_.empty());
}

PrefillRouter::~PrefillRouter() = default;

int PrefillRouter::ChooseRank(const BlockKey& first) const {
  std::map<int, size_t> busy;
  for (const int rank : ranks_) busy[rank] = 0;
  for (const auto& [id, job] : jobs_) ++busy[job->rank];
  const int home = ranks_[first.Prefix64() % ranks_.size()];
  const auto idlest = std::min_element(
      busy.begin(), busy.end(), [](const auto& a, const auto& b) { return a.second < b.second; });
  return busy[home] > idlest->second + kAffinitySlack ? idlest->first : home;
}

void PrefillRouter::Ask(std::span<const int32_t> tokens, std::span<const BlockKey> keys,
                        const std::string& tenant, std::span<const size_t> missing,
                        BlockDone done) {
  KV_CHECK(!missing.empty() && !keys.empty());
  const uint64_t id = next_job_++;
  const int rank = ChooseRank(keys.front());
  wire::Message message;
  message.set_version(kNodeProtocolVersion);
  wire::PrefillAsk& ask = *message.mutable_prefill_ask();
  ask.set_job(id);
  ask.set_tenant(tenant);
  // Tokens behind the last block asked for do not matter to it.
  const size_t covered = std::min(tokens.size(), (missing.back() + 1) * kBlockTokens);
  for (const int32_t token : tokens.first(covered)) ask.add_tokens(static_cast<uint32_t>(token));
  for (const size_t block : missing) ask.add_missing(static_cast<uint32_t>(block));
  ask.set_reply(static_cast<bool>(done));
  const Status status = link_->Send(rank, message);
  if (!done) return;
  auto job = std::make_unique<Job>();
  job->rank = rank;
  job->open.assign(missing.begin(), missing.end());
  job->done = std::move(done);
  job->last_progress = clock_->Now();
  jobs_[id] = std::move(job);
  if (!status.ok()) FailJob(id, status);
}

void PrefillRouter::FailJob(uint64_t id, const Status& status) {
  const auto found = jobs_.find(id);
  const std::unique_ptr<Job> job = std::move(found->second);
  jobs_.erase(found);
  for (const size_t block : job->open) job->done(block, status);
}

void PrefillRouter::OnMessage(int rank, const wire::Message* message) {
  if (message == nullptr) {
    std::vector<uint64_t> lost;
    for (const auto& [id, job] : jobs_) {
      if (job->rank == rank) lost.push_back(id);
    }
    for (const uint64_t id : lost) FailJob(id, Unavailable("prefill rank {} is gone", rank));
    std::erase(ranks_, rank);
    // With nobody left, later asks fail at once and the blocks are computed where they are needed.
    if (ranks_.empty()) ranks_.push_back(rank);
    return;
  }
  if (!message->has_prefill_block()) return;
  const wire::PrefillBlock& reply = message->prefill_block();
  const auto found = jobs_.find(reply.job());
  if (found == jobs_.end() || found->second->rank != rank) return;
  Job& job = *found->second;
  const auto block = std::find(job.open.begin(), job.open.end(), reply.block());
  if (block == job.open.end()) return;
  job.open.erase(block);
  job.last_progress = clock_->Now();
  const BlockDone done = job.done;
  if (job.open.empty()) jobs_.erase(found);
  const auto code = static_cast<StatusCode>(reply.code());
  done(reply.block(), code == StatusCode::kOk ? OkStatus() : Status(code, reply.message()));
}

void PrefillRouter::Tick() {
  const TimePoint now = clock_->Now();
  std::vector<uint64_t> late;
  for (const auto& [id, job] : jobs_) {
    if (now - job->last_progress > patience_) late.push_back(id);
  }
  for (const uint64_t id : late) {
    FailJob(id, MakeStatus(StatusCode::kDeadlineExceeded, "no block within {:.0f} s",
                           Seconds(patience_)));
  }
}

PrefillServer::PrefillServer(NodeLink* link, BlockSupply* supply, const Domains* domains,
                             const ModelConfig* config)
    : link_(link), supply_(supply), domains_(domains), config_(config) {}

void PrefillServer::Reply(int rank, uint64_t job, size_t block, const Status& status) {
  wire::Message message;
  message.set_version(kNodeProtocolVersion);
  wire::PrefillBlock& reply = *message.mutable_prefill_block();
  reply.set_job(job);
  reply.set_block(static_cast<uint32_t>(block));
  reply.set_code(static_cast<uint32_t>(status.code()));
  reply.set_message(status.message());
  const Status sent = link_->Send(rank, message);
  if (!sent.ok()) spdlog::warn("rank {} does not learn of its block: {}", rank, sent.message());
}

void PrefillServer::OnMessage(int rank, const wire::Message& message) {
  if (!message.has_prefill_ask()) return;
  const wire::PrefillAsk& ask = message.prefill_ask();
  SupplyNeed need;
  need.publish.assign(ask.missing().begin(), ask.missing().end());
  bool sane = !need.publish.empty() && std::is_sorted(need.publish.begin(), need.publish.end()) &&
              std::adjacent_find(need.publish.begin(), need.publish.end()) == need.publish.end() &&
              static_cast<size_t>(ask.tokens_size()) <= kMaxPrefillTokens &&
              ask.tokens_size() <= config_->max_positions &&
              (need.publish.back() + 1) * kBlockTokens <= static_cast<size_t>(ask.tokens_size());
  for (const uint32_t token : ask.tokens()) {
    sane = sane && token < static_cast<uint32_t>(config_->vocab);
    need.tokens.push_back(static_cast<int32_t>(token));
  }
  if (!sane) {
    for (const size_t block : need.publish) {
      Reply(rank, ask.job(), block, InvalidArgument("the job's tokens or blocks cannot be"));
    }
    return;
  }
  need.blocks = need.publish.back() + 1;
  need.tenant = ask.tenant();
  need.domain = domains_->DomainOf(need.tenant);
  need.published = [](size_t, const Status&) {};
  if (ask.reply()) {
    need.published = [this, rank, job = ask.job()](size_t block, const Status& status) {
      Reply(rank, job, block, status);
    };
  }
  const auto behind = ask.reply() ? std::find_if(jobs_.begin(), jobs_.end(),
                                                 [](const Job& job) { return !job.awaited; })
                                  : jobs_.end();
  jobs_.insert(behind, Job{supply_->Start(std::move(need)), ask.reply()});
}

bool PrefillServer::Step() {
  for (auto job = jobs_.begin(); job != jobs_.end();) {
    switch (supply_->Advance(job->supply)) {
      case BlockSupply::Progress::kWaiting:
        ++job;
        break;
      case BlockSupply::Progress::kReady:
        job = jobs_.erase(job);
        break;
      case BlockSupply::Progress::kCompute: {
        const Status status = supply_->ComputeNext(job->supply);
        if (status.ok()) return true;
        spdlog::error("prefill failed: {}", status.ToString());
        for (size_t i = 0; i < job->supply->place.size(); ++i) {
          if (job->supply->place[i] == SupplyJob::Place::kCompute) {
            job->supply->need.published(i, status);
          }
        }
        jobs_.erase(job);
        return true;
      }
    }
  }
  return false;
}

}  // namespace kvant::node
