# Tests of transport/.
kvant_test(transport_conformance_test SOURCES transport_suite.cc transport_peer.cc
  LIBS kvant_transport LABELS conformance TIMEOUT 120)
kvant_test(transport_tcp_test SOURCES transport_peer.cc
  LIBS kvant_transport PkgConfig::ZMQ LABELS unit TIMEOUT 120)
kvant_test(transport_shm_test SOURCES transport_peer.cc
  LIBS kvant_transport LABELS unit TIMEOUT 120)
kvant_test(transport_faulty_test SOURCES transport_peer.cc LIBS kvant_transport LABELS unit TIMEOUT 60)
kvant_test(transport_bench_test LIBS kvant_transport LABELS bench TIMEOUT 60)

# Debian's librapidcheck-dev has no CMake package.
find_path(RAPIDCHECK_INCLUDE rapidcheck.h REQUIRED)
find_library(RAPIDCHECK_LIBRARY rapidcheck REQUIRED)
kvant_test(arena_test LIBS kvant_transport ${RAPIDCHECK_LIBRARY} LABELS unit property TIMEOUT 60)
target_include_directories(arena_test SYSTEM PRIVATE ${RAPIDCHECK_INCLUDE})

if(KV_HAVE_VERBS)
  kvant_test(verbs_wire_test LIBS kvant_transport LABELS unit TIMEOUT 60)
  # Needs an RDMA device, which the machine that scripts/verbs-vm starts has.
  add_executable(transport_verbs_test transport_verbs_test.cc transport_suite.cc transport_peer.cc)
  target_link_libraries(transport_verbs_test PRIVATE kvant_transport GTest::gtest GTest::gtest_main)
  kvant_build_fast(transport_verbs_test)
  if(NOT KV_SANITIZE)
    add_test(NAME verbs_vm COMMAND ${CMAKE_SOURCE_DIR}/scripts/verbs-vm --short --no-build
      --build-dir ${CMAKE_BINARY_DIR})
    set_tests_properties(verbs_vm PROPERTIES TIMEOUT 700 LABELS vm RUN_SERIAL TRUE)
  endif()
endif()

if(KV_HAVE_MPI)
  # Two ranks, on however many cores; has a main() of its own.
  set(transport_mpi_sources transport_mpi_test.cc transport_suite.cc transport_peer.cc)
  list(TRANSFORM transport_mpi_sources
    PREPEND ${CMAKE_CURRENT_LIST_DIR}/ OUTPUT_VARIABLE transport_mpi_sources)
  add_executable(transport_mpi_test ${transport_mpi_sources})
  target_link_libraries(transport_mpi_test PRIVATE kvant_transport GTest::gtest)
  add_test(NAME transport_mpi_test
    COMMAND ${MPIEXEC_EXECUTABLE} -np 2 --oversubscribe --allow-run-as-root
    $<TARGET_FILE:transport_mpi_test>)
  set_tests_properties(transport_mpi_test PROPERTIES TIMEOUT 120 LABELS "conformance;mpi")
endif()
