# What the sanitizers must know about libraries that are not ours; included after all tests are registered.
#
# Open MPI keeps some megabyte until the process ends, in modules that it has unloaded by then, so no
# suppression by name fits. Leaks are looked for in every test but those with real ranks.
if(KV_SANITIZE MATCHES "address")
  get_property(names DIRECTORY PROPERTY TESTS)
  foreach(name IN LISTS names)
    get_test_property(${name} LABELS labels)
    if("mpi" IN_LIST labels)
      set_property(TEST ${name} APPEND PROPERTY ENVIRONMENT "ASAN_OPTIONS=detect_leaks=0")
    endif()
  endforeach()
endif()
