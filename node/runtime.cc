#include "node/runtime.h"

#include <spdlog/spdlog.h>

#include <algorithm>
#include <filesystem>
#include <memory>
#include <thread>
#include <utility>

#include "base/bytes.h"
#include "kernels/implementation.h"
#include "node/beside_form.h"
#include "node/klt_form.h"
#include "node/requests.h"

namespace kvant::node {

Result<std::unique_ptr<EmbeddedShard>> EmbeddedShard::Create(uint64_t memory_bytes) {
  std::unique_ptr<EmbeddedShard> shard(new EmbeddedShard);
  shard->server_side_ = shard->hub_.MakeTransport();
  shard->node_side_ = shard->hub_.MakeTransport();
  KV_ASSIGN_OR_RETURN(const std::string address, shard->server_side_->Listen("loopback:shard"));
  ShardHostOptions host;
  host.memory_bytes = memory_bytes;
  KV_ASSIGN_OR_RETURN(shard->host_, ShardHost::Create(shard->server_side_.get(), host));
  KV_ASSIGN_OR_RETURN(shard->map_, ShardMap::Make(kStaticEpoch, {Shard{address}}));
  return shard;
}

namespace {

Result<StoredFormPtr> MakeForm(const NodeOptions& options, const Model& model,
                               const kernels::Codec& codec) {
  const AttendedPayload attended(codec, model.config());
  if (options.store != "klt") {
    const std::pair<bool, std::string_view> given[] = {{!options.recompute.empty(), "--recompute"},
                                                       {!options.also.empty(), "--also"},
                                                       {!options.cuts.empty(), "--cuts"},
                                                       {!options.pack.empty(), "--pack"}};
    for (const auto& [is_given, flag] : given) {
      if (!is_given) continue;
      return InvalidArgument(
          "{} is for blocks of a codec pack, not for --store {}; use --store klt", flag,
          options.store);
    }
    return StoredFormPtr(MakeStoredForm(options.store, attended));
  }
  KV_ASSIGN_OR_RETURN(std::shared_ptr<const KltPack> pack,
                      FindKltPack(options.pack, options.model, model));
  KV_ASSIGN_OR_RETURN(StoredFormPtr form, MakeKltForm(&model, std::move(pack), CutsOf(options),
                                                      options.recompute, attended));
  if (options.also.empty()) return form;
  if (options.also == options.store)
    return InvalidArgument("--also {} is what --store says; use plain or lossless", options.also);
  return MakeBesideForm(std::move(form), MakeStoredForm(options.also, attended), attended);
}

// A name that all classes have, or of a cut that the form has.
Result<Wire> ParseWireOrCut(std::string_view name, const StoredForm& form) {
  const auto& cuts = form.cut_names();
  const auto found = std::find(cuts.begin(), cuts.end(), name);
  if (found == cuts.end()) {
    const Result<Wire> wire = ParseWire(name);
    if (cuts.empty() || (wire.ok() && (*wire == Wire::kFull || *wire == Wire::kAuto))) return wire;
    return InvalidArgument("--wire {}: use full, auto, or one of the cuts that --cuts names: {}",
                           name, fmt::join(cuts, ", "));
  }
  return static_cast<Wire>(static_cast<int>(Wire::kCut1) + (found - cuts.begin()));
}

// Of flags alone, before a model is loaded.
Status CheckBudgetFlags(const NodeOptions& options) {
  if (!options.max_kl.has_value() || WireOf(options) == WireName(Wire::kAuto)) return OkStatus();
  return InvalidArgument(
      "--max-kl {} chooses what is read for each fetch, and --wire {} says what it is: give one of "
      "them (--wire auto goes with --max-kl)",
      *options.max_kl, options.wire);
}

}  // namespace

std::string_view CutsOf(const NodeOptions& options) {
  if (options.store != "klt") return {};
  return options.cuts.empty() ? "fine" : std::string_view(options.cuts);
}

std::string_view WireOf(const NodeOptions& options) {
  if (!options.wire.empty()) return options.wire;
  return WireName(options.max_kl.has_value() ? Wire::kAuto : Wire::kFull);
}

Result<std::unique_ptr<NodeRuntime>> NodeRuntime::Create(const NodeOptions& options) {
  std::unique_ptr<NodeRuntime> node(new NodeRuntime);
  node->options_ = options;
  KV_ASSIGN_OR_RETURN(const kernels::WeightForm form_of_weights, ParseWeightForm(options.weights));
  KV_ASSIGN_OR_RETURN(const kernels::Codec* codec, kernels::FindCodec(options.codec));
  KV_RETURN_IF_ERROR(CheckStoredForm(options.store, *codec));
  if (!options.also.empty()) KV_RETURN_IF_ERROR(CheckStoredForm(options.also, *codec));
  KV_RETURN_IF_ERROR(CheckBudgetFlags(options));
  KV_ASSIGN_OR_RETURN(node->domains_, Domains::Parse(options.domains));
  std::string secret;
  if (!options.secret_file.empty()) {
    KV_ASSIGN_OR_RETURN(secret, ReadFile(options.secret_file));
    if (secret.size() < 16) {
      return InvalidArgument("secret file '{}': holds {} bytes, at least 16 are needed",
                             options.secret_file, secret.size());
    }
  }
  KV_RETURN_IF_ERROR(kernels::ChooseImplementation());
  const int cores = static_cast<int>(std::max(1U, std::thread::hardware_concurrency()));
  node->pool_ =
      std::make_unique<kernels::ThreadPool>(options.threads > 0 ? options.threads : cores);
  KV_ASSIGN_OR_RETURN(node->model_, Model::Load(options.model, form_of_weights));
  KV_ASSIGN_OR_RETURN(StoredFormPtr form, MakeForm(options, *node->model_, *codec));
  KV_ASSIGN_OR_RETURN(node->wire_, ParseWireOrCut(WireOf(options), *form));
  node->block_class_ =
      std::make_unique<BlockClass>(node->model_.get(), codec, AsBytes(secret), std::move(form));
  node->cache_ = std::make_unique<LocalCache>(node->block_class_.get(), options.local_cache_bytes);
  PlannerOptions planning;
  planning.fetch_budget = std::chrono::duration_cast<Duration>(
      std::chrono::duration<double, std::milli>(options.fetch_budget_ms));
  planning.max_kl = options.max_kl;
  node->planner_ = std::make_unique<Planner>(planning);
  KV_RETURN_IF_ERROR(node->planner_->CheckBudget(node->block_class_->choices()));
  node->decoder_ = std::make_unique<Decoder>(node->model_.get(), node->pool_.get());
  return node;
}

NodeRuntime::~NodeRuntime() = default;

Status NodeRuntime::ConnectTier(Transport* transport, ShardMap map, Duration wait,
                                std::function<void()> beside) {
  TierLinkOptions link;
  link.arena_bytes = options_.tier_arena_bytes;
  link.pool = pool_.get();
  link.timeout =
      std::chrono::duration_cast<Duration>(std::chrono::duration<double>(options_.tier_timeout_s));
  KV_ASSIGN_OR_RETURN(tier_, TierLink::Create(transport, std::move(map), block_class_.get(),
                                              &clock(), planner_.get(), link));
  tier_->SetBeside(std::move(beside));
  const TimePoint deadline = clock().Now() + wait;
  const auto all_reachable = [&] {
    for (size_t shard = 0; shard < tier_->map().size(); ++shard) {
      if (!tier_->Reachable(shard)) return false;
    }
    return true;
  };
  while (!all_reachable() && clock().Now() < deadline) {
    if (!tier_->Poll()) tier_->Wait(std::chrono::milliseconds(1));
  }
  for (size_t shard = 0; shard < tier_->map().size(); ++shard) {
    if (tier_->Reachable(shard)) continue;
    spdlog::warn(
        "shard {} cannot be reached; what it holds is recomputed. Is kvantd running there?",
        tier_->map().shards()[shard].address);
  }
  return OkStatus();
}

void NodeRuntime::Start(PrefillPeer* peer) {
  supply_ = std::make_unique<BlockSupply>(block_class_.get(), cache_.get(), tier_.get(), peer,
                                          planner_.get(), decoder_.get(), &clock());
}

void NodeRuntime::Drain() {
  if (tier_ == nullptr) return;
  const TimePoint deadline =
      clock().Now() +
      std::chrono::duration_cast<Duration>(std::chrono::duration<double>(options_.tier_timeout_s));
  while (!tier_->idle() && clock().Now() < deadline) {
    if (!tier_->Poll()) tier_->Wait(std::chrono::milliseconds(1));
  }
  if (tier_->stats().put_failed != 0) {
    const Status& last = tier_->stats().put_failure;
    spdlog::warn(
        "{} blocks could not be stored in the tier; whoever needs them computes them.{} The last "
        "one: {}",
        tier_->stats().put_failed,
        last.code() == StatusCode::kResourceExhausted ? " Give the shards more memory." : "",
        last.message());
  }
}

SchedulerOptions NodeRuntime::MakeSchedulerOptions() const {
  SchedulerOptions options;
  options.max_batch = options_.max_batch;
  options.wire = wire_;
  return options;
}

}  // namespace kvant::node
