#include "tests/support/node_world.h"

#include <gtest/gtest.h>
#include <spdlog/spdlog.h>

#include <algorithm>
#include <map>
#include <ostream>
#include <utility>

#include "kernels/blas.h"
#include "tests/support/random_klt_pack.h"
#include "tests/support/random_model.h"

namespace kvant::support {
namespace {

constexpr Duration kAnswerAll = std::chrono::seconds(120);

std::filesystem::path MakeModel(const std::string& name, const node::ModelConfig& config) {
  static const TemporaryDirectory directory;
  RandomModelOptions options;
  options.config = config;
  options.config.max_positions = kTinyContext;
  const std::filesystem::path model = directory.path() / name;
  KV_CHECK(WriteRandomModel(model, options).ok());
  return model;
}

node::ModelConfig AllSlidingConfig() {
  node::ModelConfig config = TinyConfig();
  config.architecture = node::Architecture::kMistral;
  config.sliding_window = kTinyWindow;
  config.sliding.assign(static_cast<size_t>(config.layers), true);
  return config;
}

}  // namespace

const std::filesystem::path& TinyModel() {
  static const std::filesystem::path path = MakeModel("tiny", TinyConfig());
  return path;
}

const std::filesystem::path& SlidingModel() {
  static const std::filesystem::path path = MakeModel("sliding", TinySlidingConfig());
  return path;
}

const std::filesystem::path& AllSlidingModel() {
  static const std::filesystem::path path = MakeModel("all-sliding", AllSlidingConfig());
  return path;
}

const std::filesystem::path& KltPackOf(const std::filesystem::path& model) {
  static const TemporaryDirectory directory;
  static std::map<std::filesystem::path, std::filesystem::path> packs;
  std::filesystem::path& file = packs[model];
  if (!file.empty()) return file;
  file = directory.path() / (model.filename().string() + ".klt");
  KV_CHECK(kernels::LoadBlas().ok());
  const Result<std::unique_ptr<node::Model>> of = node::Model::Load(model);
  KV_CHECK(of.ok());
  Random random(1);
  node::KltPack pack = RandomKltPack(**of, &random);
  KV_CHECK(node::SaveKltPack(file, **of, &pack).ok());
  return file;
}

NodeWorld::NodeWorld(const NodeWorldOptions& options) : options_(options) {
  spdlog::set_level(spdlog::level::err);
  if (options_.node.model.empty()) options_.node.model = TinyModel();
  if (options_.shard_bytes == 0) options_.node.local_cache_bytes = 0;
  Result<std::unique_ptr<node::NodeRuntime>> node = node::NodeRuntime::Create(options_.node);
  KV_CHECK(node.ok());
  node_ = *std::move(node);
  if (options_.shard_bytes != 0) {
    const auto make = [this](uint64_t end) -> std::unique_ptr<Transport> {
      std::unique_ptr<Transport> plain = hub_.MakeTransport();
      if (!options_.faults.has_value()) return plain;
      FaultOptions faults = *options_.faults;
      faults.seed = faults.seed * 2 + end;
      std::unique_ptr<FaultyTransport> faulty = MakeFaultyTransport(std::move(plain), faults);
      faulty_.push_back(faulty.get());
      return faulty;
    };
    shard_side_ = make(0);
    node_side_ = make(1);
    Result<std::string> address = shard_side_->Listen("loopback:shard");
    KV_CHECK(address.ok());
    ShardHostOptions host;
    host.memory_bytes = options_.shard_bytes;
    Result<std::unique_ptr<ShardHost>> shard = ShardHost::Create(shard_side_.get(), host);
    if (!shard.ok()) ADD_FAILURE() << shard.status().ToString();
    shard_ = *std::move(shard);
    Result<ShardMap> map = ShardMap::Make(kStaticEpoch, {Shard{*address}});
    KV_CHECK(map.ok());
    const Status status =
        node_->ConnectTier(node_side_.get(), *std::move(map), std::chrono::seconds(2),
                           [this] { shard_->Turn(SteadyClock().Now()); });
    KV_CHECK(status.ok());
  }
  node_->Start(nullptr);
}

std::vector<node::Answer> NodeWorld::Answer(const std::vector<node::Request>& requests) {
  node::SchedulerOptions scheduling = node_->MakeSchedulerOptions();
  scheduling.store_all_answers = options_.store_all_answers;
  node::Scheduler scheduler(&node_->block_class(), &node_->supply(), node_->tier(), nullptr,
                            &node_->decoder(), &node_->clock(), &node_->domains(), scheduling);
  std::map<std::string, size_t> order;
  for (const node::Request& request : requests) {
    order[request.custom_id] = order.size();
    scheduler.Submit(request);
  }
  std::vector<node::Answer> answers;
  const TimePoint deadline = SteadyClock().Now() + kAnswerAll;
  while (!scheduler.idle()) {
    if (SteadyClock().Now() >= deadline) {
      ADD_FAILURE() << scheduler.open_requests() << " requests were not answered";
      break;
    }
    // Averages weigh an eighth, so a hundred of them leave nothing else.
    for (int i = 0; options_.always_fetch && i < 100; ++i) {
      node_->planner().SawPrefill(1, std::chrono::hours(1));
    }
    if (!scheduler.Step() && node_->tier() != nullptr) {
      node_->tier()->Wait(std::chrono::microseconds(50));
    }
    for (node::Answer& answer : scheduler.TakeAnswers()) answers.push_back(std::move(answer));
  }
  node_->Drain();
  std::sort(answers.begin(), answers.end(), [&](const node::Answer& a, const node::Answer& b) {
    return order.at(a.custom_id) < order.at(b.custom_id);
  });
  stats_ = scheduler.stats();
  return answers;
}

FaultCounts NodeWorld::fault_counts() const {
  FaultCounts sum;
  for (const FaultyTransport* faulty : faulty_) {
    const FaultCounts& counts = faulty->counts();
    sum.dropped += counts.dropped;
    sum.delayed += counts.delayed;
    sum.duplicated += counts.duplicated;
    sum.corrupted += counts.corrupted;
    sum.cut += counts.cut;
    sum.refused += counts.refused;
    sum.failed_transfers += counts.failed_transfers;
  }
  return sum;
}

void PrintTo(const AnswerText& answer, std::ostream* out) {
  *out << answer.custom_id << ": " << answer.tokens.size() << " tokens, text '" << answer.text
       << "', error '" << answer.error << "', finish " << static_cast<int>(answer.finish);
}

std::vector<AnswerText> TextsOf(const std::vector<node::Answer>& answers) {
  std::vector<AnswerText> texts;
  for (const node::Answer& answer : answers) {
    texts.push_back(
        {answer.custom_id, answer.text, answer.tokens, answer.finish, answer.error.ToString()});
  }
  return texts;
}

}  // namespace kvant::support
