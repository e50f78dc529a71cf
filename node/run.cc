#include "node/run.h"

#include <spdlog/spdlog.h>

#include <algorithm>
#include <cstdio>
#include <ctime>
#include <nlohmann/json.hpp>
#include <utility>

#include "cluster/membership.h"
#include "node/mpi_job.h"
#include "node/report.h"
#include "node/requests.h"
#include "node/tier_session.h"

namespace kvant::node {
namespace {

using Json = nlohmann::json;

constexpr Duration kConnectWait = std::chrono::seconds(2);

// Prints how far the run is, at most every second and at the end. Single-owner.
class ProgressLine {
 public:
  explicit ProgressLine(size_t requests) : requests_(requests), started_(SteadyClock().Now()) {}
  void Show(size_t answered, uint64_t generated) {
    const TimePoint now = SteadyClock().Now();
    if (answered < requests_ && now - last_ < std::chrono::seconds(1)) return;
    if (answered == shown_) return;
    last_ = now;
    shown_ = answered;
    const double seconds = Seconds(now - started_);
    std::fprintf(stderr, "  %3zu of %zu answered, %llu tokens generated, %.1f s\n", answered,
                 requests_, static_cast<unsigned long long>(generated), seconds);
  }

 private:
  size_t requests_;
  size_t shown_ = 0;
  TimePoint started_;
  TimePoint last_{};
};

std::string ModelName(const std::string& directory) {
  const std::string trimmed = directory.substr(0, directory.find_last_not_of('/') + 1);
  return trimmed.substr(trimmed.find_last_of('/') + 1);
}

// Puts answers into the order of the requests.
void OrderAnswers(std::span<const Request> requests, std::vector<Answer>* answers) {
  std::map<std::string_view, size_t> order;
  for (size_t i = 0; i < requests.size(); ++i) order[requests[i].custom_id] = i;
  std::sort(answers->begin(), answers->end(), [&](const Answer& a, const Answer& b) {
    return order.at(a.custom_id) < order.at(b.custom_id);
  });
}

void SetTeachers(const std::optional<std::vector<Answer>>& answers, Scheduler* scheduler) {
  if (!answers.has_value()) return;
  for (const Answer& answer : *answers) {
    if (!answer.tokens.empty()) scheduler->SetTeacher(answer.custom_id, answer.tokens);
  }
}

Result<std::optional<std::vector<Answer>>> ParseOptionalAnswers(const std::string& text,
                                                                const std::string& path) {
  if (path.empty()) return std::optional<std::vector<Answer>>();
  KV_ASSIGN_OR_RETURN(std::vector<Answer> answers, ParseAnswers(text, path));
  return std::optional(std::move(answers));
}

// An empty path gives an empty text.
Result<std::string> ReadOptionalFile(const std::string& path) {
  if (path.empty()) return std::string();
  return ReadFile(path);
}

Result<std::optional<std::vector<Answer>>> LoadAnswers(const std::string& path) {
  KV_ASSIGN_OR_RETURN(const std::string text, ReadOptionalFile(path));
  return ParseOptionalAnswers(text, path);
}

// The answers that those of the run are compared with, where given.
struct References {
  std::optional<std::vector<Answer>> same_codec;
  std::optional<std::vector<Answer>> raw;
};

// Everything about files that can go wrong before the work: a mistyped name then costs nothing.
Result<References> LoadReferences(const RunOptions& options) {
  KV_RETURN_IF_ERROR(CheckWritable(options.answers));
  KV_RETURN_IF_ERROR(CheckWritable(options.report));
  References references;
  KV_ASSIGN_OR_RETURN(references.same_codec, LoadAnswers(options.reference));
  KV_ASSIGN_OR_RETURN(references.raw, LoadAnswers(options.raw_reference));
  return references;
}

// Writes both files and prints the page. Returns the exit status.
Result<int> Conclude(const RunOptions& options, const RunSetup& setup,
                     std::span<const Request> requests, std::vector<Answer> answers,
                     std::span<const Json> ranks, References references) {
  OrderAnswers(requests, &answers);
  std::string lines;
  const int64_t created = std::time(nullptr);
  for (const Answer& answer : answers) lines += FormatAnswer(answer, setup.model, created) + "\n";
  if (!options.answers.empty()) KV_RETURN_IF_ERROR(WriteFile(options.answers, lines));
  Comparison comparison;
  comparison.answers = answers;
  comparison.reference = std::move(references.same_codec);
  comparison.raw_reference = std::move(references.raw);
  const Json report = MergeReport(setup, ranks, comparison);
  if (!options.report.empty()) {
    KV_RETURN_IF_ERROR(WriteFile(options.report, report.dump(2) + "\n"));
  }
  KV_ASSIGN_OR_RETURN(const std::string page, FormatReport(report, nullptr));
  std::fputs(page.c_str(), stdout);
  int failed = 0;
  for (const Answer& answer : answers) {
    if (answer.error.ok()) continue;
    ++failed;
    std::fprintf(stderr, "kvant: request '%s' failed: %s\n", answer.custom_id.c_str(),
                 answer.error.message().c_str());
  }
  return failed == 0 ? 0 : 1;
}

Result<int> RunAlone(const RunOptions& options) {
  KV_RETURN_IF_ERROR(MpiJob::CheckTransport(options.transport));
  KV_ASSIGN_OR_RETURN(const std::string text, ReadFile(options.requests));
  KV_ASSIGN_OR_RETURN(const std::vector<Request> requests, ParseRequests(text, options.requests));
  KV_ASSIGN_OR_RETURN(const auto teachers, LoadAnswers(options.teacher));
  KV_ASSIGN_OR_RETURN(References references, LoadReferences(options));
  KV_ASSIGN_OR_RETURN(
      const std::unique_ptr<TierSession> session,
      TierSession::Open(options.node, options.cache, options.no_cache, options.cache_memory_bytes));
  NodeRuntime& node = session->node();
  SchedulerOptions scheduling = node.MakeSchedulerOptions();
  // Without a cache there is nowhere to keep what was generated.
  scheduling.store_answers = !options.no_cache;
  Scheduler scheduler(&node.block_class(), &node.supply(), node.tier(), nullptr, &node.decoder(),
                      &node.clock(), &node.domains(), scheduling);
  SetTeachers(teachers, &scheduler);
  for (const Request& request : requests) scheduler.Submit(request);

  const TimePoint started = node.clock().Now();
  ProgressLine progress(requests.size());
  std::vector<Answer> answers;
  while (!scheduler.idle()) {
    if (!scheduler.Step() && node.tier() != nullptr) {
      node.tier()->Wait(std::chrono::microseconds(200));
    }
    for (Answer& answer : scheduler.TakeAnswers()) answers.push_back(std::move(answer));
    progress.Show(answers.size(), scheduler.stats().generated_tokens);
  }
  node.Drain();
  const RunSetup setup{ModelName(options.node.model),
                       options.node.weights,
                       options.node.codec,
                       options.node.store,
                       std::string(CutsOf(options.node)),
                       std::string(WireOf(options.node)),
                       options.node.max_kl,
                       std::string(session->transport_name()),
                       "decode=1",
                       node.block_class().Bf16BytesPerToken(),
                       Seconds(node.clock().Now() - started)};
  std::vector<Json> ranks = {NodeRankReport(0, Role::kDecode, "localhost", node, scheduler.stats(),
                                            session->counters(), {})};
  if (session->embedded() != nullptr) {
    // Not a rank of its own, but what it stores is part of the run.
    ranks.front()["store"] =
        CacheRankReport(0, "localhost", session->embedded()->stats(), {}, {}).at("store");
  }
  return Conclude(options, setup, requests, std::move(answers), ranks, std::move(references));
}

// One rank of an MPI job.
Result<int> RunRank(const RunOptions& options, MpiJob& job) {
  if (!options.cache.empty() || options.no_cache) {
    return InvalidArgument(
        "--cache and --no-cache are for one process; under mpirun the cache ranks are the cache");
  }
  KV_ASSIGN_OR_RETURN(const RolePlan plan, job.AgreeOnRoles(options.roles));
  const Role role = plan.RoleOf(job.rank());

  // One rank reads the file, so that it need not be on every host.
  KV_ASSIGN_OR_RETURN(const std::string text,
                      job.ShareResult([&] { return ReadFile(options.requests); }));
  KV_ASSIGN_OR_RETURN(const std::vector<Request> requests, ParseRequests(text, options.requests));
  KV_ASSIGN_OR_RETURN(const std::string teacher_text,
                      job.ShareResult([&] { return ReadOptionalFile(options.teacher); }));
  KV_ASSIGN_OR_RETURN(const auto teachers, ParseOptionalAnswers(teacher_text, options.teacher));
  Result<References> references = References();
  if (job.rank() == 0) references = LoadReferences(options);
  KV_RETURN_IF_ERROR(job.AgreeOn(references.status()));

  NodeOptions node_options = options.node;
  // Ranks share the cores.
  if (node_options.threads == 0) node_options.threads = 1;
  std::unique_ptr<NodeRuntime> node;
  std::unique_ptr<Scheduler> scheduler;
  Status status;
  if (role != Role::kCache) {
    Result<std::unique_ptr<NodeRuntime>> made = NodeRuntime::Create(node_options);
    status = made.status();
    if (made.ok()) node = *std::move(made);
  }
  KV_RETURN_IF_ERROR(job.AgreeOn(status));
  KV_RETURN_IF_ERROR(job.AgreeOn(job.Connect(options.transport, plan)));

  std::unique_ptr<ShardHost> shard;
  std::unique_ptr<PrefillRouter> router;
  if (role == Role::kCache) {
    ShardHostOptions host;
    host.memory_bytes = options.cache_memory_bytes;
    Result<std::unique_ptr<ShardHost>> made = ShardHost::Create(job.tier_transport(), host);
    status = made.status();
    if (made.ok()) shard = *std::move(made);
  }
  KV_RETURN_IF_ERROR(job.AgreeOn(status));
  if (node != nullptr) {
    if (plan.count(Role::kCache) > 0) {
      status = node->ConnectTier(job.tier_transport(), job.shards(), kConnectWait);
    }
    const bool asks = role == Role::kDecode && plan.count(Role::kPrefill) > 0;
    if (asks) {
      router = std::make_unique<PrefillRouter>(
          &job.nodes(), &node->clock(), plan.RanksOf(Role::kPrefill), std::chrono::seconds(30));
    }
    node->Start(router.get());
  }

  const TimePoint started = SteadyClock().Now();
  std::vector<Answer> answers;
  SchedulerStats stats;
  switch (role) {
    case Role::kCache:
      status = job.ServeShard(*shard);
      break;
    case Role::kPrefill:
      status = job.ServePrefill(*node);
      break;
    case Role::kDecode: {
      scheduler = std::make_unique<Scheduler>(&node->block_class(), &node->supply(), node->tier(),
                                              router.get(), &node->decoder(), &node->clock(),
                                              &node->domains(), node->MakeSchedulerOptions());
      SetTeachers(teachers, scheduler.get());
      const std::vector<Request> share = job.ShareOf(requests, plan);
      for (const Request& request : share) scheduler->Submit(request);
      ProgressLine progress(requests.size());
      status = job.RunDecode(
          *scheduler, *node, router.get(), &answers,
          [&](size_t answered, uint64_t generated) { progress.Show(answered, generated); });
      stats = scheduler->stats();
      break;
    }
  }
  KV_RETURN_IF_ERROR(job.AgreeOn(status));

  const LinkCounters tier = job.tier_transport()->counters();
  const LinkCounters nodes = job.node_transport()->counters();
  Json own = node != nullptr
                 ? NodeRankReport(job.rank(), role, job.host(), *node, stats, tier, nodes)
                 : CacheRankReport(job.rank(), job.host(), shard->stats(), tier, nodes);
  own["bf16_bytes_per_token"] = node != nullptr ? node->block_class().Bf16BytesPerToken() : 0;
  std::string lines;
  for (const Answer& answer : answers) lines += FormatAnswer(answer, "", 0) + "\n";
  const std::vector<std::string> reports = job.Gather(own.dump());
  const std::vector<std::string> gathered = job.Gather(lines);
  if (job.rank() != 0) return 0;

  RunSetup setup{ModelName(options.node.model),
                 options.node.weights,
                 options.node.codec,
                 options.node.store,
                 std::string(CutsOf(options.node)),
                 std::string(WireOf(options.node)),
                 options.node.max_kl,
                 std::string(job.transport_name()),
                 job.roles(),
                 0,
                 Seconds(SteadyClock().Now() - started)};
  std::vector<Json> ranks;
  for (const std::string& report : reports) {
    ranks.push_back(Json::parse(report));
    setup.bf16_bytes_per_token = std::max(setup.bf16_bytes_per_token,
                                          ranks.back().at("bf16_bytes_per_token").get<uint64_t>());
  }
  std::vector<Answer> all;
  for (const std::string& part : gathered) {
    KV_ASSIGN_OR_RETURN(std::vector<Answer> parsed, ParseAnswers(part, "answers of a rank"));
    for (Answer& answer : parsed) all.push_back(std::move(answer));
  }
  return Conclude(options, setup, requests, std::move(all), ranks, *std::move(references));
}

}  // namespace

Result<int> RunRequests(const RunOptions& options, int* argc, char*** argv) {
  if (!MpiSession::LaunchedByMpi()) {
    if (!options.roles.empty()) {
      return InvalidArgument(
          "--roles {} needs ranks: start it with mpirun, as in 'mpirun -np 4 kvant run --roles "
          "cache=2,prefill=1,decode=1 ...'",
          options.roles);
    }
    return RunAlone(options);
  }
  KV_ASSIGN_OR_RETURN(const std::unique_ptr<MpiJob> job, MpiJob::Create(argc, argv));
  const Result<int> result = RunRank(options, *job);
  // What went wrong is said once, by the first rank, and before any rank leaves: mpirun ends the
  // others as soon as one has failed.
  if (!result.ok() && job->rank() == 0) {
    std::fprintf(stderr, "kvant: %s\n", result.status().message().c_str());
    std::fflush(stderr);
  }
  job->Barrier();
  if (result.ok()) return result;
  return result.status().code() == StatusCode::kInvalidArgument ? 2 : 1;
}

}  // namespace kvant::node
