# Tests of node/, and the program that writes random models for them.
add_library(kvant_test_models support/random_klt_pack.cc support/random_model.cc)
target_link_libraries(kvant_test_models PUBLIC kvant_node)
add_executable(kvant-random-model support/random_model_main.cc)
target_link_libraries(kvant-random-model PRIVATE kvant_test_models CLI11::CLI11)
kvant_build_fast(kvant-random-model)

kvant_test(sampler_test LIBS kvant_node LABELS unit)
kvant_test(safetensors_test LIBS kvant_test_models LABELS unit fuzz)
kvant_test(ggml_blocks_test LIBS kvant_node LABELS unit golden)
kvant_test(gguf_test LIBS kvant_node LABELS unit fuzz golden)
kvant_test(gguf_logits_test LIBS kvant_node LABELS golden)
kvant_test(bpe_test LIBS kvant_node LABELS unit property)
kvant_test(tokenizer_test LIBS kvant_test_models LABELS unit golden)
kvant_test(chat_template_test LIBS kvant_node LABELS unit golden)
kvant_test(tokenizer_kinds_test LIBS kvant_node LABELS unit golden)
kvant_test(model_test LIBS kvant_test_models LABELS unit)
kvant_test(decoder_test
  SOURCES support/reference_decoder.cc
  LIBS kvant_test_models
  LABELS unit property)
kvant_test(data_path_allocations_test LIBS kvant_test_models LABELS unit)
kvant_test(model_golden_test LIBS kvant_test_models LABELS golden)
kvant_test(logits_command_test LIBS kvant_test_models LABELS unit golden)
kvant_test(make_checkpoint_test LIBS kvant_test_models LABELS unit)
kvant_test(eval_text_test LIBS kvant_test_models LABELS unit)
kvant_test(eval_measure_test LIBS kvant_test_models LABELS unit)
kvant_test(eval_report_test LIBS kvant_test_models LABELS unit)
kvant_test(eval_set_test LIBS kvant_test_models LABELS unit)
# Debian's librapidcheck-dev has no CMake package.
find_path(RAPIDCHECK_INCLUDE rapidcheck.h REQUIRED)
find_library(RAPIDCHECK_LIBRARY rapidcheck REQUIRED)
kvant_test(state_coder_test LIBS kvant_test_models ${RAPIDCHECK_LIBRARY} LABELS unit property)
target_include_directories(state_coder_test SYSTEM PRIVATE ${RAPIDCHECK_INCLUDE})

# A node and what it is asked, for tests of the whole path.
add_library(kvant_test_nodes
  support/node_world.cc support/planes_form.cc support/random_requests.cc
  support/watched_shard.cc)
target_link_libraries(kvant_test_nodes PUBLIC kvant_test_models GTest::gtest)

kvant_test(scheduler_test LIBS kvant_test_nodes LABELS unit property TIMEOUT 1200 SHARDS 4)
kvant_test(calibrate_test LIBS kvant_test_nodes LABELS unit TIMEOUT 600)
kvant_test(klt_test LIBS kvant_test_models LABELS unit fuzz)
kvant_test(klt_golden_test LIBS kvant_test_models LABELS golden)
# The same bits from sums that are taken one by one.
add_test(NAME klt_golden_scalar_test COMMAND klt_golden_test)
set_tests_properties(klt_golden_scalar_test PROPERTIES
  ENVIRONMENT KVANT_ISA=scalar TIMEOUT 60 LABELS golden)
kvant_test(klt_importance_test LIBS kvant_test_models LABELS unit)
kvant_test(klt_exact_test LIBS kvant_node LABELS unit property fuzz)
kvant_test(klt_levels_test LIBS kvant_node LABELS unit)
kvant_test(klt_pack_test LIBS kvant_test_models LABELS unit)
kvant_test(klt_predictions_test LIBS kvant_test_models LABELS unit)
kvant_test(klt_form_test LIBS kvant_test_nodes LABELS unit fuzz)
kvant_test(requests_test LIBS kvant_test_nodes LABELS unit fuzz)
kvant_test(planner_test LIBS kvant_test_nodes LABELS unit)
kvant_test(local_cache_test LIBS kvant_test_nodes LABELS unit property)
kvant_test(report_test LIBS kvant_test_nodes LABELS unit)
kvant_test(weights_option_test LIBS kvant_test_nodes LABELS unit property TIMEOUT 300)
kvant_test(stored_form_test LIBS kvant_test_nodes LABELS unit fuzz)
kvant_test(block_decoding_test LIBS kvant_test_nodes LABELS unit)
kvant_test(block_supply_test LIBS kvant_test_nodes LABELS unit)
kvant_test(beside_form_test LIBS kvant_test_nodes LABELS unit)
kvant_test(first_layers_test LIBS kvant_test_nodes LABELS unit)
kvant_test(prefill_role_test LIBS kvant_test_nodes LABELS unit fuzz)

# Writes tests/golden/klt; run by hand when the format changes on purpose.
add_executable(make_klt_golden make_klt_golden.cc)
target_link_libraries(make_klt_golden PRIVATE kvant_test_models)
# The second decoder, as in kernels.cmake.
if(Python3_FOUND)
  add_test(NAME klt_decoder_test
    COMMAND ${Python3_EXECUTABLE} ${CMAKE_CURRENT_SOURCE_DIR}/klt_decoder.py
            ${CMAKE_CURRENT_SOURCE_DIR}/golden/klt)
  set_tests_properties(klt_decoder_test PROPERTIES TIMEOUT 60 LABELS golden)
endif()
