#include "tests/simulator/simulation.h"

#include <fmt/format.h>

#include <cmath>
#include <functional>
#include <memory>
#include <vector>

#include "base/bytes.h"
#include "base/check.h"
#include "base/random.h"
#include "tests/simulator/sim_client.h"
#include "tests/simulator/sim_shard.h"

namespace kvant::sim {
namespace {

using std::chrono::microseconds;
using std::chrono::milliseconds;
using std::chrono::seconds;

// Uniform in the logarithm: small and large are met equally often.
uint64_t LogUniform(Random* random, uint64_t least, uint64_t most) {
  const double low = std::log(static_cast<double>(least));
  const double high = std::log(static_cast<double>(most));
  return static_cast<uint64_t>(std::exp(low + random->Unit() * (high - low)));
}

double MaybeOften(Random* random, double chance, double most) {
  const double probability = most * std::pow(10.0, -2 * random->Unit());
  return random->Chance(chance) ? probability : 0;
}

NetworkShape DrawNetwork(Random* random) {
  NetworkShape shape;
  shape.latency_least = microseconds(LogUniform(random, 5, 100));
  shape.latency_most = shape.latency_least * static_cast<int64_t>(LogUniform(random, 1, 40));
  shape.bytes_per_second = static_cast<double>(LogUniform(random, 10'000'000, 10'000'000'000));
  shape.slow_landing = random->Chance(0.5);
  static constexpr size_t kOutstanding[] = {1, 2, 8, 64};
  shape.max_outstanding = kOutstanding[random->Below(4)];
  shape.detection = milliseconds(LogUniform(random, 20, 1000));
  return shape;
}

NetworkFaults DrawFaults(Random* random) {
  NetworkFaults faults;
  faults.drop_message = MaybeOften(random, 0.3, 0.2);
  faults.delay_message = MaybeOften(random, 0.3, 0.3);
  faults.duplicate_message = MaybeOften(random, 0.3, 0.2);
  faults.corrupt_message = MaybeOften(random, 0.3, 0.1);
  faults.corrupt_payload = MaybeOften(random, 0.4, 0.2);
  faults.drop_write = MaybeOften(random, 0.2, 0.1);
  faults.drop_written = MaybeOften(random, 0.2, 0.1);
  faults.fail_transfer = MaybeOften(random, 0.3, 0.2);
  faults.cut = MaybeOften(random, 0.2, 0.01);
  faults.refuse_send = MaybeOften(random, 0.3, 0.3);
  faults.refuse_submit = MaybeOften(random, 0.3, 0.5);
  faults.refuse_expose = MaybeOften(random, 0.2, 0.1);
  faults.delay_at_most = microseconds(LogUniform(random, 100, 300'000));
  return faults;
}

// The whole of one run. Single-owner.
class Simulation {
 public:
  explicit Simulation(const SimOptions& options)
      : options_(options),
        journal_(options.keep, options.trace),
        random_(Random(options.seed).Fork(2)),
        world_(DrawPlan(options.seed, options.server_faults), MakeMap(),
               Random(options.seed).Fork(3).Next(), &journal_) {}

  SimResult Run() {
    StartAll();
    RunUntil(seconds(60), [this] { return world_.closing; });
    world_.closing = true;
    EndFaults();
    Require(world_.plan.deadline_most + seconds(5), "an operation never ended",
            [this] { return AllIdle(); });
    RunUntil(std::max<Duration>(world_.plan.longest_pin, seconds(2)), [] { return false; });
    Probe();
    Leave();
    return Report();
  }

 private:
  ShardMap MakeMap() const {
    const Plan plan = DrawPlan(options_.seed, options_.server_faults);
    std::vector<Shard> shards;
    for (size_t i = 0; i < plan.shards; ++i) shards.push_back({fmt::format("sim:shard{}", i)});
    return *ShardMap::Make(kStaticEpoch, std::move(shards));
  }

  bool Done() const { return journal_.failed() || steps_ >= options_.most_steps; }

  // Runs until `reached`, a violation, or for this long at most. True if reached.
  bool RunUntil(Duration at_most, const std::function<bool()>& reached) {
    const TimePoint end = world_.now() + at_most;
    while (!Done() && !reached()) {
      if (world_.now() >= end || !world_.network.Step()) return false;
      ++steps_;
    }
    return !Done();
  }
  void Require(Duration at_most, const char* violation, const std::function<bool()>& reached) {
    if (!RunUntil(at_most, reached) && !Done()) world_.Fail(violation);
  }

  void StartAll() {
    const Plan& plan = world_.plan;
    for (size_t domain = 0; domain < plan.domains; ++domain) {
      KeyChainOptions options;
      options.domain = DeriveDomainSecret(AsBytes("secret of the simulated cluster"),
                                          fmt::format("domain {}", domain));
      options.layout.block_tokens = plan.oracle.block_tokens;
      options.layout.layer_end = plan.oracle.max_layers;
      options.layout.head_end = 1;
      options.layout.state_kinds = {0, 1};
      options.numerics_class = "simulated";
      world_.chains.emplace_back(options);
    }
    for (size_t i = 0; i < plan.shards; ++i) {
      world_.shards.push_back(std::make_unique<SimShard>(&world_, i, i));
      world_.shards.back()->Start();
    }
    for (size_t i = 0; i < plan.clients; ++i) {
      clients_.push_back(std::make_unique<SimClient>(&world_, i, plan.shards + i, random_.Next()));
      clients_.back()->Start();
    }
    world_.network.SetFaults(plan.faults);
    if (plan.nemesis_every > Duration::zero()) StrikeLater();
  }

  void StrikeLater() {
    const auto mean = static_cast<uint64_t>(world_.plan.nemesis_every.count());
    world_.network.After(Duration(1 + random_.Below(2 * mean)), [this] {
      if (world_.closing) return;
      Strike();
      StrikeLater();
    });
  }

  void Strike() {
    const Plan& plan = world_.plan;
    SimShard& shard = *world_.shards[random_.Below(plan.shards)];
    SimClient& client = *clients_[random_.Below(plan.clients)];
    const TimePoint now = world_.now();
    const auto a_while = [this](uint64_t most_ms) {
      return Duration(microseconds(LogUniform(&random_, 100, 1000 * most_ms)));
    };
    switch (random_.Below(7)) {
      case 0:
        if (!plan.crash_shards || !shard.alive()) break;
        shard.Crash();
        ++world_.outcomes.crashes;
        world_.network.After(a_while(1000), [&shard] {
          if (!shard.alive()) shard.Start();
        });
        break;
      case 1:
        if (!plan.crash_clients || !client.alive()) break;
        client.Crash();
        ++world_.outcomes.crashes;
        world_.network.After(a_while(500), [&client] {
          if (!client.alive()) client.Start();
        });
        break;
      case 2:
        if (plan.partitions) {
          world_.network.Partition(shard.node(), client.node(), now + a_while(3000));
        }
        break;
      case 3:
        if (plan.cuts) world_.network.CutBetween(shard.node(), client.node());
        break;
      case 4:
        if (!plan.stalls) break;
        if (random_.Chance(0.5)) {
          shard.Stall(now + a_while(1000));
        } else {
          client.Stall(now + a_while(1000));
        }
        break;
      case 5:
        if (!plan.leaps) break;
        journal_.Note(now, "the clock leaps");
        world_.network.Leap(a_while(90'000));
        break;
      default:
        if (plan.rot && shard.alive() && shard.Rot(random_.Next())) ++world_.outcomes.rotten;
    }
  }

  void EndFaults() {
    journal_.Note(world_.now(), "the faults end");
    world_.network.SetFaults({});
    world_.network.HealAll();
    for (const auto& shard : world_.shards) {
      shard->Stall({});
      if (!shard->alive()) shard->Start();
    }
    for (const auto& client : clients_) {
      client->Stall({});
      if (!client->alive()) client->Start();
    }
  }

  bool AllIdle() const {
    for (const auto& client : clients_) {
      if (!client->idle()) return false;
    }
    return true;
  }

  void Probe() {
    for (size_t shard = 0; shard < world_.shards.size(); ++shard) {
      SimClient& client = *clients_[random_.Below(clients_.size())];
      journal_.Note(world_.now(), "a fresh block for shard {}", shard);
      client.BeginProbe(shard);
      Require(seconds(20), "all faults ended, and a fresh put and fetch still fail",
              [&client] { return !client.probing(); });
    }
    Require(seconds(10), "an operation never ended", [this] { return AllIdle(); });
  }

  void Leave() {
    if (Done()) return;
    for (const auto& client : clients_) client->Crash();
    RunUntil(world_.plan.network.detection + seconds(1), [] { return false; });
    world_.network.Leap(kMaxLease + seconds(1));
    RunUntil(milliseconds(200), [] { return false; });
    if (Done()) return;
    for (const auto& shard : world_.shards) {
      shard->CheckEmpty();
      journal_.Note(world_.now(), "shard {} ends, {} blocks sealed, {} evicted", shard->node(),
                    shard->stats().store.sealed, shard->stats().store.evicted);
    }
  }

  SimResult Report() {
    if (steps_ >= options_.most_steps && options_.most_steps == SimOptions{}.most_steps) {
      world_.Fail("the simulation does not come to an end");
    }
    SimResult result;
    result.seed = options_.seed;
    result.hash = journal_.hash();
    result.steps = steps_;
    result.simulated_seconds = Seconds(world_.now().time_since_epoch());
    result.outcomes = world_.outcomes;
    result.faults = world_.network.tally();
    result.violation = journal_.violation();
    if (journal_.failed()) result.schedule = journal_.Schedule();
    return result;
  }

  SimOptions options_;
  Journal journal_;
  Random random_;
  World world_;
  std::vector<std::unique_ptr<SimClient>> clients_;
  uint64_t steps_ = 0;
};

}  // namespace

Plan DrawPlan(uint64_t seed, const ServerFaults& faults) {
  Random random = Random(seed).Fork(1);
  Plan plan;
  plan.server_faults = faults;
  plan.shards = 1 + random.Below(4);
  plan.clients = 1 + random.Below(4);
  plan.tenants = 1 + random.Below(3);
  plan.domains = 1 + random.Below(plan.tenants);
  plan.prompts = LogUniform(&random, 2, 64);
  plan.chain_blocks = LogUniform(&random, 2, 24);
  plan.oracle.max_layers = static_cast<uint32_t>(1 + random.Below(5));
  plan.oracle.max_row_bytes = static_cast<uint32_t>(LogUniform(&random, 32, 1024));
  plan.shard_arena_bytes = LogUniform(&random, 96 << 10, 1 << 20);
  plan.shard_max_blocks = static_cast<uint32_t>(LogUniform(&random, 16, 512));
  plan.shard_max_pins = random.Chance(0.1) ? 16 : 8192;
  plan.user_pin_bytes = plan.shard_arena_bytes / 4;
  plan.client_arena_bytes = LogUniform(&random, 128 << 10, 2 << 20);
  plan.operations = LogUniform(&random, 40, 400);
  plan.pace = 0.3 * std::pow(10.0, -1.5 * random.Unit());
  plan.longest_pin = milliseconds(LogUniform(&random, 50, 3000));
  plan.torn = random.Chance(0.7) ? 0.05 : 0;
  plan.abandoned = random.Chance(0.5) ? 0.05 : 0;
  plan.cancelled = random.Chance(0.5) ? 0.02 : 0;
  plan.network = DrawNetwork(&random);
  plan.strict = random.Chance(0.15);
  if (plan.strict) {
    plan.deadline_least = seconds(4);
    plan.deadline_most = seconds(8);
    plan.network.bytes_per_second = 1e9;
    plan.network.latency_most = std::min<Duration>(plan.network.latency_most, milliseconds(1));
    return plan;
  }
  plan.deadline_least = milliseconds(LogUniform(&random, 2, 200));
  plan.deadline_most = plan.deadline_least + milliseconds(LogUniform(&random, 20, 3000));
  plan.faults = DrawFaults(&random);
  plan.nemesis_every = milliseconds(LogUniform(&random, 5, 300));
  plan.crash_shards = random.Chance(0.5);
  plan.crash_clients = random.Chance(0.5);
  plan.partitions = random.Chance(0.4);
  plan.cuts = random.Chance(0.4);
  plan.stalls = random.Chance(0.4);
  plan.leaps = random.Chance(0.25);
  plan.rot = random.Chance(0.4);
  return plan;
}

SimResult RunSimulation(const SimOptions& options) { return Simulation(options).Run(); }

}  // namespace kvant::sim
