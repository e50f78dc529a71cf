# What can be chosen, and the compiler flags that every target shares.
option(KV_TESTS "Build the tests" ON)
option(KV_FUZZ "Build the fuzzers (clang only)" OFF)
set(KV_MPI AUTO CACHE STRING "Open MPI transport: AUTO, ON or OFF")
set(KV_VERBS AUTO CACHE STRING "RDMA transport (libibverbs headers): AUTO, ON or OFF")
set(KV_SANITIZE "" CACHE STRING "Sanitizers, e.g. address,undefined or thread")
set_property(CACHE KV_MPI KV_VERBS PROPERTY STRINGS AUTO ON OFF)

if(NOT CMAKE_BUILD_TYPE)
  set(CMAKE_BUILD_TYPE Release)
endif()
set(CMAKE_CXX_FLAGS_RELEASE "-O2 -DNDEBUG")

find_program(CCACHE ccache)
if(CCACHE)
  set(CMAKE_CXX_COMPILER_LAUNCHER ${CCACHE})
endif()

add_library(kvant_options INTERFACE)
target_include_directories(kvant_options INTERFACE
  $<BUILD_INTERFACE:${CMAKE_SOURCE_DIR}> $<INSTALL_INTERFACE:${CMAKE_INSTALL_INCLUDEDIR}/kvant>)
target_compile_features(kvant_options INTERFACE cxx_std_20)
target_compile_options(kvant_options INTERFACE
  $<BUILD_INTERFACE:-Wall> $<BUILD_INTERFACE:-Wextra> $<BUILD_INTERFACE:-Wpedantic>
  $<BUILD_INTERFACE:-Wshadow> $<BUILD_INTERFACE:-Werror=return-type>)
if(KV_SANITIZE)
  target_compile_options(kvant_options INTERFACE
    $<BUILD_INTERFACE:-fsanitize=${KV_SANITIZE}> $<BUILD_INTERFACE:-fno-omit-frame-pointer>
    $<BUILD_INTERFACE:-fno-sanitize-recover=all>)
  target_link_options(kvant_options INTERFACE $<BUILD_INTERFACE:-fsanitize=${KV_SANITIZE}>)
endif()
if(KV_FUZZ)
  target_compile_options(kvant_options INTERFACE $<BUILD_INTERFACE:-fsanitize=fuzzer-no-link>)
endif()

# kvant_build_fast(<target>): a program of which only others' code takes time. With sanitizers half of what it
# takes to build a test is optimising what runs once.
function(kvant_build_fast target)
  if(KV_SANITIZE)
    target_compile_options(${target} PRIVATE -O0)
  endif()
endfunction()
