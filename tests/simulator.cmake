# The simulator: production code of the cache service on a simulated clock and network.
add_library(kvant_simulator STATIC
  simulator/journal.cc
  simulator/oracle.cc
  simulator/sim_network.cc
  simulator/sim_transport.cc
  simulator/sim_shard.cc
  simulator/sim_client.cc
  simulator/sim_client_checks.cc
  simulator/simulation.cc
  simulator/world.cc)
target_link_libraries(kvant_simulator PUBLIC kvant_cache_service kvant_cluster kvant_transport
  kvant_base PkgConfig::XXHASH fmt::fmt)

add_executable(kvant-sim simulator/kvant_sim.cc)
target_link_libraries(kvant-sim PRIVATE kvant_simulator CLI11::CLI11)

kvant_test(simulator_test LIBS kvant_simulator LABELS sim TIMEOUT 300)

# Garbage against the real program.
kvant_test(kvantd_hostile_test LIBS kvant_cache_service PkgConfig::ZMQ LABELS fuzz TIMEOUT 180)
target_compile_definitions(kvantd_hostile_test PRIVATE KVANTD="$<TARGET_FILE:kvantd>")
add_dependencies(kvantd_hostile_test kvantd)
