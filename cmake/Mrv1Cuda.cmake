# Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
#
# Decides whether the CUDA backend is built and with which toolkit.
#
#   MRV1_CUDA=AUTO    (default) on if nvcc and cublasLt.h are found
#   MRV1_CUDA=ON      on; an error says what is missing
#   MRV1_CUDA=OFF     off
#   MRV1_CUDA=WHEELS  on, with the toolkit of the pip wheels in Python's environment
#
# The environment variable of the same name is the default of the option.
# Sets MRV1_WITH_CUDA, MRV1_CUDA_REASON and MRV1_CUBLASLT_INCLUDE_DIR; enables the CUDA language.

if(DEFINED ENV{MRV1_CUDA} AND NOT "$ENV{MRV1_CUDA}" STREQUAL "")
  string(TOUPPER "$ENV{MRV1_CUDA}" mrv1_cuda_default)
else()
  set(mrv1_cuda_default AUTO)
endif()
set(MRV1_CUDA ${mrv1_cuda_default} CACHE STRING "CUDA backend: AUTO, ON, OFF or WHEELS")
set_property(CACHE MRV1_CUDA PROPERTY STRINGS AUTO ON OFF WHEELS)
string(TOUPPER "${MRV1_CUDA}" mrv1_cuda_mode)
if(NOT mrv1_cuda_mode MATCHES "^(AUTO|ON|OFF|WHEELS)$")
  message(FATAL_ERROR "MRV1_CUDA=${MRV1_CUDA}: allowed are AUTO, ON, OFF and WHEELS")
endif()

# Sets `out` to <site-packages>/nvidia/cu13 of Python's environment. It is asked of Python's
# importer because `nvidia` is a namespace package that may be spread over several directories.
function(mrv1_find_cuda_wheels out)
  if(NOT Python_EXECUTABLE)
    message(FATAL_ERROR "MRV1_CUDA=WHEELS: no Python interpreter, hence no wheels")
  endif()
  set(script [[
import importlib.util, os
spec = importlib.util.find_spec("nvidia")
for path in (spec.submodule_search_locations if spec else ()):
    root = os.path.join(path, "cu13")
    if os.path.exists(os.path.join(root, "bin", "nvcc")):
        print(root)
        break
]])
  execute_process(COMMAND ${Python_EXECUTABLE} -c "${script}" OUTPUT_VARIABLE root
                  OUTPUT_STRIP_TRAILING_WHITESPACE COMMAND_ERROR_IS_FATAL ANY)
  if(NOT root)
    message(FATAL_ERROR "MRV1_CUDA=WHEELS: ${Python_EXECUTABLE} has no nvidia/cu13/bin/nvcc. "
      "Set the environment variable MRV1_CUDA=WHEELS for pip, which then fetches the wheels, or "
      "install those that pyproject.toml lists for it.")
  endif()
  set(${out} "${root}" PARENT_SCOPE)
endfunction()

# Lays out `root` as an installed toolkit at `farm`, by links: the wheels have lib where nvcc looks
# for lib64, and lib*.so.N without the lib*.so that linkers and FindCUDAToolkit look for.
function(mrv1_link_toolkit root farm)
  file(REMOVE_RECURSE "${farm}")
  file(MAKE_DIRECTORY "${farm}/bin" "${farm}/lib")
  foreach(directory include nvvm)
    file(CREATE_LINK "${root}/${directory}" "${farm}/${directory}" SYMBOLIC)
  endforeach()
  foreach(directory bin lib)
    file(GLOB entries RELATIVE "${root}/${directory}" "${root}/${directory}/*")
    foreach(entry ${entries})
      file(CREATE_LINK "${root}/${directory}/${entry}" "${farm}/${directory}/${entry}" SYMBOLIC)
      if(entry MATCHES "^(lib.+\\.so)\\.[0-9]+$")
        file(CREATE_LINK "${entry}" "${farm}/lib/${CMAKE_MATCH_1}" SYMBOLIC)
      endif()
    endforeach()
  endforeach()
  file(CREATE_LINK lib "${farm}/lib64" SYMBOLIC)
endfunction()

# Sets MRV1_NVCC to the compiler that the user or the machine gives, or to a false value.
function(mrv1_find_nvcc)
  if(CMAKE_CUDA_COMPILER)
    set(MRV1_NVCC "${CMAKE_CUDA_COMPILER}" PARENT_SCOPE)
  elseif(DEFINED ENV{CUDACXX})
    set(MRV1_NVCC "$ENV{CUDACXX}" PARENT_SCOPE)
  else()
    find_program(MRV1_NVCC nvcc HINTS ENV CUDA_HOME ENV CUDA_PATH PATHS /usr/local/cuda
                 PATH_SUFFIXES bin)
  endif()
endfunction()

# Sets MRV1_CUBLASLT_INCLUDE_DIR to the directory of cublasLt.h, or to a false value. The toolkit's
# own root is asked of nvcc because the nvcc that is found may be a link or a script.
function(mrv1_find_cublaslt nvcc)
  execute_process(COMMAND ${nvcc} --dryrun -c -x cu /dev/null -o /dev/null
                  OUTPUT_QUIET ERROR_VARIABLE dryrun RESULT_VARIABLE status)
  set(hints "")
  if(status EQUAL 0 AND dryrun MATCHES "#\\$ TOP=([^\n]+)")
    string(STRIP "${CMAKE_MATCH_1}" top)
    list(APPEND hints "${top}/include" "${top}/targets/x86_64-linux/include"
         "${top}/targets/sbsa-linux/include")
  endif()
  find_path(MRV1_CUBLASLT_INCLUDE_DIR cublasLt.h HINTS ${hints} ENV CPLUS_INCLUDE_PATH
            DOC "Directory of cublasLt.h")
endfunction()

set(MRV1_WITH_CUDA OFF)
if(mrv1_cuda_mode STREQUAL "OFF")
  set(MRV1_CUDA_REASON "MRV1_CUDA=OFF")
elseif(mrv1_cuda_mode STREQUAL "WHEELS")
  set(MRV1_WITH_CUDA ON)
  mrv1_find_cuda_wheels(mrv1_wheel_root)
  set(mrv1_toolkit "${PROJECT_BINARY_DIR}/cuda-toolkit")
  # A configure run after the first keeps the links, whose times the built objects depend on.
  if(NOT MRV1_CUDA_WHEEL_ROOT STREQUAL mrv1_wheel_root OR NOT EXISTS "${mrv1_toolkit}/bin/nvcc")
    mrv1_link_toolkit("${mrv1_wheel_root}" "${mrv1_toolkit}")
    set(MRV1_CUDA_WHEEL_ROOT "${mrv1_wheel_root}" CACHE INTERNAL "")
  endif()
  if(NOT CMAKE_CUDA_COMPILER AND NOT DEFINED ENV{CUDACXX})
    set(CMAKE_CUDA_COMPILER "${mrv1_toolkit}/bin/nvcc")
  elseif(NOT CMAKE_CUDA_COMPILER STREQUAL "${mrv1_toolkit}/bin/nvcc")
    message(STATUS "mrv1: CMAKE_CUDA_COMPILER or CUDACXX is used instead of the nvcc of the wheels")
  endif()
  find_path(MRV1_CUBLASLT_INCLUDE_DIR cublasLt.h HINTS "${mrv1_toolkit}/include" REQUIRED
            NO_DEFAULT_PATH DOC "Directory of cublasLt.h")
  set(MRV1_CUDA_REASON "MRV1_CUDA=WHEELS, toolkit of the wheels in ${mrv1_wheel_root}")
else()
  mrv1_find_nvcc()
  if(MRV1_NVCC)
    mrv1_find_cublaslt("${MRV1_NVCC}")
  endif()
  if(MRV1_NVCC AND MRV1_CUBLASLT_INCLUDE_DIR)
    set(MRV1_WITH_CUDA ON)
    set(MRV1_CUDA_REASON "nvcc is ${MRV1_NVCC}, cublasLt.h is in ${MRV1_CUBLASLT_INCLUDE_DIR}")
    if(NOT CMAKE_CUDA_COMPILER)
      set(CMAKE_CUDA_COMPILER "${MRV1_NVCC}")
    endif()
  else()
    if(NOT MRV1_NVCC)
      set(MRV1_CUDA_REASON "no nvcc on PATH, in CUDACXX, CUDA_HOME or /usr/local/cuda")
    else()
      set(MRV1_CUDA_REASON "nvcc is ${MRV1_NVCC}, but its toolkit has no cublasLt.h")
    endif()
    if(mrv1_cuda_mode STREQUAL "ON")
      message(FATAL_ERROR "MRV1_CUDA=ON: ${MRV1_CUDA_REASON}. Give CMAKE_CUDA_COMPILER or "
        "MRV1_CUBLASLT_INCLUDE_DIR, or take the toolkit from pip wheels with MRV1_CUDA=WHEELS.")
    endif()
  endif()
endif()

if(MRV1_WITH_CUDA)
  # Hopper is built first class; sm_80 covers Ampere and Ada; PTX covers what comes later.
  if(NOT DEFINED CMAKE_CUDA_ARCHITECTURES AND NOT DEFINED ENV{CUDAARCHS})
    set(CMAKE_CUDA_ARCHITECTURES 80-real 90a-real 90-virtual)
  endif()
  enable_language(CUDA)
  find_package(CUDAToolkit REQUIRED)
  message(STATUS "mrv1: CUDA ON (${MRV1_CUDA_REASON}); architectures ${CMAKE_CUDA_ARCHITECTURES}")
else()
  message(STATUS "mrv1: CUDA OFF (${MRV1_CUDA_REASON})")
endif()
