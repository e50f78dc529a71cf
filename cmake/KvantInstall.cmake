# `cmake --install` and find_package(kvant).
include(CMakePackageConfigHelpers)
