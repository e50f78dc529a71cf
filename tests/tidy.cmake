# Rules about the tree itself: tidy_test reads it, headers_alone compiles each header on its own, and
# install_consumer builds a program against what `cmake --install` puts down.
kvant_test(tidy_test LIBS kvant_base LABELS tidy TIMEOUT 120)

# The format differs between clang-format's versions, so only the one that wrote it judges it.
find_program(CLANG_FORMAT_14 clang-format-14)
if(CLANG_FORMAT_14)
  target_compile_definitions(tidy_test PRIVATE KVANT_CLANG_FORMAT="${CLANG_FORMAT_14}")
else()
  message(STATUS "clang-format-14 was not found: tidy_test does not check the format")
endif()

set(folders base transport cluster cache_service kernels node)
list(TRANSFORM folders REPLACE "(.+)" "${CMAKE_SOURCE_DIR}/\\1/*.h" OUTPUT_VARIABLE patterns)
file(GLOB_RECURSE headers RELATIVE ${CMAKE_SOURCE_DIR} CONFIGURE_DEPENDS ${patterns})
if(NOT KV_HAVE_MPI)
  list(FILTER headers EXCLUDE REGEX "transport/mpi_.*")
endif()
if(NOT KV_HAVE_VERBS)
  list(FILTER headers EXCLUDE REGEX "transport/verbs_.*")
endif()
set(units "")
foreach(header IN LISTS headers)
  string(MAKE_C_IDENTIFIER ${header} unit)
  set(unit ${CMAKE_CURRENT_BINARY_DIR}/headers_alone/${unit}.cc)
  # Twice, so that a missing guard is found too.
  file(CONFIGURE OUTPUT ${unit} CONTENT "#include \"${header}\"\n#include \"${header}\"\n")
  list(APPEND units ${unit})
endforeach()
add_library(headers_alone OBJECT EXCLUDE_FROM_ALL ${units})
target_link_libraries(headers_alone PRIVATE kvant_options)
foreach(folder IN LISTS folders)
  if(TARGET kvant_${folder})
    target_link_libraries(headers_alone PRIVATE kvant_${folder})
  endif()
endforeach()
if(KV_HAVE_MPI)
  target_link_libraries(headers_alone PRIVATE MPI::MPI_C)
  target_compile_definitions(headers_alone PRIVATE OMPI_SKIP_MPICXX MPICH_SKIP_MPICXX)
endif()
target_compile_options(headers_alone PRIVATE -O0)
add_test(NAME headers_alone
  COMMAND ${CMAKE_COMMAND} --build ${CMAKE_BINARY_DIR} --target headers_alone)
set_tests_properties(headers_alone PROPERTIES LABELS tidy TIMEOUT 600)

# The sanitizers' flags are not exported, so a consumer links an unsanitized build only.
if(NOT KV_SANITIZE)
  add_test(NAME install_consumer
    COMMAND ${CMAKE_COMMAND} -DBUILD=${CMAKE_BINARY_DIR} -DSOURCE=${CMAKE_SOURCE_DIR}
      -DSCRATCH=${CMAKE_CURRENT_BINARY_DIR}/install_consumer
      -P ${CMAKE_CURRENT_SOURCE_DIR}/install_consumer.cmake)
  set_tests_properties(install_consumer PROPERTIES LABELS tidy TIMEOUT 300)
endif()

# The committed examples are what their generator writes.
find_package(Python3 COMPONENTS Interpreter)
if(Python3_FOUND)
  add_test(NAME examples_generated
    COMMAND ${Python3_EXECUTABLE} ${CMAKE_SOURCE_DIR}/scripts/make-requests --check)
  set_tests_properties(examples_generated PROPERTIES LABELS tidy TIMEOUT 60)
  add_test(NAME texts_test
    COMMAND ${Python3_EXECUTABLE} ${CMAKE_CURRENT_SOURCE_DIR}/texts_test.py ${CMAKE_SOURCE_DIR}/scripts/texts)
  set_tests_properties(texts_test PROPERTIES LABELS unit TIMEOUT 60)
endif()
