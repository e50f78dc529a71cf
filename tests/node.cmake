# Tests of node/, and the program that writes random models for them.
add_library(kvant_test_models support/random_model.cc)
target_link_libraries(kvant_test_models PUBLIC kvant_node)
add_executable(kvant-random-model support/random_model_main.cc)
target_link_libraries(kvant-random-model PRIVATE kvant_test_models CLI11::CLI11)

kvant_test(sampler_test LIBS kvant_node LABELS unit)
kvant_test(safetensors_test LIBS kvant_test_models LABELS unit fuzz)
kvant_test(tokenizer_test LIBS kvant_test_models LABELS unit golden)
kvant_test(model_test LIBS kvant_test_models LABELS unit)
kvant_test(decoder_test
  SOURCES support/reference_decoder.cc
  LIBS kvant_test_models
  LABELS unit property golden)
