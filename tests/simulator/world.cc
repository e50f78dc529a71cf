#include "tests/simulator/world.h"

#include <utility>

#include "tests/simulator/sim_shard.h"

namespace kvant::sim {

Outcomes& Outcomes::operator+=(const Outcomes& more) {
  operations += more.operations;
  layers += more.layers;
  stored += more.stored;
  refused += more.refused;
  data_loss += more.data_loss;
  failed += more.failed;
  rotten += more.rotten;
  crashes += more.crashes;
  return *this;
}

World::World(const Plan& the_plan, ShardMap the_map, uint64_t network_seed, Journal* the_journal)
    : plan(the_plan),
      map(std::move(the_map)),
      journal(*the_journal),
      network(network_seed, plan.network, the_journal),
      oracle(plan.oracle) {}

World::~World() = default;

}  // namespace kvant::sim
