# cmake -DBUILD=<built tree> -DSOURCE=<source tree> -DSCRATCH=<folder> -P install_consumer.cmake:
# installs the build into SCRATCH, then configures, builds and runs tests/consumer against it.
file(REMOVE_RECURSE ${SCRATCH})
set(prefix ${SCRATCH}/prefix)

function(must_run what)
  execute_process(COMMAND ${ARGN} RESULT_VARIABLE result OUTPUT_VARIABLE output ERROR_VARIABLE output)
  if(NOT result EQUAL 0)
    message(FATAL_ERROR "${what} failed (${result}):\n${output}")
  endif()
endfunction()

must_run("installing (cmake/KvantInstall.cmake)" ${CMAKE_COMMAND} --install ${BUILD} --prefix ${prefix})
must_run("configuring the consumer (cmake/kvantConfig.cmake.in)" ${CMAKE_COMMAND}
  -S ${SOURCE}/tests/consumer -B ${SCRATCH}/build -G Ninja -DCMAKE_PREFIX_PATH=${prefix})
must_run("building the consumer" ${CMAKE_COMMAND} --build ${SCRATCH}/build)
must_run("running the consumer" ${SCRATCH}/build/consumer)
file(REMOVE_RECURSE ${SCRATCH})
