# Tests that run the programs as a user does.
add_library(kvant_test_programs support/program.cc)
target_link_libraries(kvant_test_programs PUBLIC kvant_test_nodes)

# kvant_program_test(<name> TIMEOUT seconds LABELS ...): one that starts kvant, kvantd or mpirun.
function(kvant_program_test name)
  kvant_test(${name} LIBS kvant_test_programs ${ARGN})
  add_dependencies(${name} kvant kvantd)
  target_compile_definitions(${name} PRIVATE
    KVANT_PATH="$<TARGET_FILE:kvant>"
    KVANTD_PATH="$<TARGET_FILE:kvantd>"
    MPIEXEC_PATH="${MPIEXEC_EXECUTABLE}")
  set_tests_properties(${name} PROPERTIES RUN_SERIAL ON)
endfunction()

kvant_program_test(cli_errors_test LABELS unit TIMEOUT 300)
kvant_program_test(generate_program_test LABELS unit TIMEOUT 600)
kvant_program_test(instruction_sets_test LABELS unit property TIMEOUT 600)
if(KV_HAVE_MPI)
  kvant_program_test(mpi_program_test LABELS mpi TIMEOUT 600)
endif()

# The real model is asked for by path: scripts/check --real-model.
set(KV_REAL_MODEL "" CACHE FILEPATH "GGUF file of Gemma 3 270M that real_model_test runs on")
if(KV_REAL_MODEL)
  kvant_program_test(real_model_test LABELS real-model golden TIMEOUT 1800)
  target_compile_definitions(real_model_test PRIVATE REAL_MODEL_PATH="${KV_REAL_MODEL}")
endif()
