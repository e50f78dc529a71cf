# `cmake --install`: the programs, the libraries with their headers, and a package, so that another
# project can say find_package(kvant) and link kvant::cache_service or any other folder's library.
include(CMakePackageConfigHelpers)

set(kvant_folders base transport cluster cache_service kernels node)
set(kvant_package_dir ${CMAKE_INSTALL_LIBDIR}/cmake/kvant)

# Whatever the folders define is installed: a library that another one links must be exported too.
set(kvant_exported kvant_options)
set(kvant_programs "")
foreach(folder IN LISTS kvant_folders)
  get_property(targets DIRECTORY ${CMAKE_SOURCE_DIR}/${folder} PROPERTY BUILDSYSTEM_TARGETS)
  foreach(target IN LISTS targets)
    get_target_property(type ${target} TYPE)
    if(type STREQUAL "EXECUTABLE")
      list(APPEND kvant_programs ${target})
    elseif(type MATCHES "_LIBRARY$")
      list(APPEND kvant_exported ${target})
    endif()
  endforeach()
  install(DIRECTORY ${CMAKE_SOURCE_DIR}/${folder} ${CMAKE_BINARY_DIR}/${folder}
    DESTINATION ${CMAKE_INSTALL_INCLUDEDIR}/kvant
    FILES_MATCHING PATTERN "*.h" PATTERN "CMakeFiles" EXCLUDE)
endforeach()

foreach(target IN LISTS kvant_exported)
  string(REPLACE "kvant_" "" name ${target})
  set_target_properties(${target} PROPERTIES EXPORT_NAME ${name})
endforeach()
install(TARGETS ${kvant_exported} EXPORT kvant_targets
  ARCHIVE DESTINATION ${CMAKE_INSTALL_LIBDIR}/kvant
  LIBRARY DESTINATION ${CMAKE_INSTALL_LIBDIR}/kvant
  OBJECTS DESTINATION ${CMAKE_INSTALL_LIBDIR}/kvant)
if(kvant_programs)
  install(TARGETS ${kvant_programs} RUNTIME DESTINATION ${CMAKE_INSTALL_BINDIR})
endif()
install(EXPORT kvant_targets NAMESPACE kvant:: DESTINATION ${kvant_package_dir})

configure_package_config_file(
  ${CMAKE_CURRENT_LIST_DIR}/kvantConfig.cmake.in ${CMAKE_BINARY_DIR}/kvantConfig.cmake
  INSTALL_DESTINATION ${kvant_package_dir})
write_basic_package_version_file(
  ${CMAKE_BINARY_DIR}/kvantConfigVersion.cmake COMPATIBILITY SameMinorVersion)
install(FILES ${CMAKE_BINARY_DIR}/kvantConfig.cmake ${CMAKE_BINARY_DIR}/kvantConfigVersion.cmake
  DESTINATION ${kvant_package_dir})
install(FILES ${CMAKE_SOURCE_DIR}/LICENSE DESTINATION ${CMAKE_INSTALL_DOCDIR})
