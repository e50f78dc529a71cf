kvant_test(codec_test LIBS kvant_kernels LABELS unit TIMEOUT 120)
kvant_test(rans_test LIBS kvant_kernels LABELS unit TIMEOUT 120)
kvant_test(lossless_test LIBS kvant_kernels LABELS unit TIMEOUT 120)
kvant_test(attention_test LIBS kvant_kernels LABELS unit TIMEOUT 120)
kvant_test(ordered_gemm_test LIBS kvant_kernels LABELS unit TIMEOUT 120)
kvant_test(linear_test LIBS kvant_kernels LABELS unit TIMEOUT 120)
kvant_test(weight_forms_test LIBS kvant_kernels LABELS unit property TIMEOUT 120)
kvant_test(vector_test LIBS kvant_kernels LABELS unit TIMEOUT 120)
kvant_test(kernel_bench_test LIBS kvant_kernels LABELS bench TIMEOUT 60)
kvant_test(format_golden_test LIBS kvant_kernels LABELS golden TIMEOUT 60)

# Debian's librapidcheck-dev has no CMake package.
find_path(RAPIDCHECK_INCLUDE rapidcheck.h REQUIRED)
find_library(RAPIDCHECK_LIBRARY rapidcheck REQUIRED)
kvant_test(kernel_property_test LIBS kvant_kernels ${RAPIDCHECK_LIBRARY} LABELS property TIMEOUT 300)
target_include_directories(kernel_property_test SYSTEM PRIVATE ${RAPIDCHECK_INCLUDE})

# Writes tests/golden/codec; run by hand when a format changes on purpose.
add_executable(make_codec_golden make_codec_golden.cc)
target_link_libraries(make_codec_golden PRIVATE kvant_kernels)

# The second decoder needs only Python's standard library; without Python it is left out.
find_package(Python3 COMPONENTS Interpreter QUIET)
if(Python3_FOUND)
  add_test(NAME format_decoder_test
    COMMAND ${Python3_EXECUTABLE} ${CMAKE_CURRENT_SOURCE_DIR}/format_decoder.py
            ${CMAKE_CURRENT_SOURCE_DIR}/golden/codec)
  set_tests_properties(format_decoder_test PROPERTIES TIMEOUT 60 LABELS golden)
endif()
