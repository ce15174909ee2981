# Read by every CMake run of the Horovod build (CMAKE_TOOLCHAIN_FILE, exported by the Makefile).
set(CMAKE_PROJECT_INCLUDE "${CMAKE_CURRENT_LIST_DIR}/cxx17_after_project.cmake")
