# Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
#
# Decides whether FlashInfer's attention kernels are compiled in, and where their headers are.
#
#   MRV1_FLASHINFER=AUTO  (default) on in a CUDA build if the headers can be had
#   MRV1_FLASHINFER=ON    on; an error says what is missing
#   MRV1_FLASHINFER=OFF   off
#   MRV1_FLASHINFER_DIR   a directory with include/flashinfer and the headers of CUTLASS and CCCL
#                         that go with it: a source tree, or the data directory of an installed
#                         package. Empty: pip downloads the pinned wheel, whose headers are used.
#
# The environment variables of the same names are the defaults. Only headers are taken: they need
# neither the wheel's dependencies nor its Python code. Sets MRV1_WITH_FLASHINFER. To be included
# after Mrv1Cuda.cmake. mrv1_add_flashinfer() then adds the kernels to a target.

set(mrv1_flashinfer_wheel flashinfer_python-0.7.2.post1-py3-none-any.whl)
set(mrv1_flashinfer_requirement "flashinfer-python==0.7.2.post1 \
--hash=sha256:bfdc18b9e1e4d8d0730fe4343dc0e284cd0c160086de80f99888bc4867922d49")

foreach(name MRV1_FLASHINFER MRV1_FLASHINFER_DIR)
  if(DEFINED ENV{${name}} AND NOT "$ENV{${name}}" STREQUAL "")
    set(${name}_default "$ENV{${name}}")
  endif()
endforeach()
if(NOT DEFINED MRV1_FLASHINFER_default)
  set(MRV1_FLASHINFER_default AUTO)
endif()
set(MRV1_FLASHINFER ${MRV1_FLASHINFER_default} CACHE STRING "FlashInfer's kernels: AUTO, ON or OFF")
set_property(CACHE MRV1_FLASHINFER PROPERTY STRINGS AUTO ON OFF)
set(MRV1_FLASHINFER_DIR "${MRV1_FLASHINFER_DIR_default}" CACHE PATH
    "Directory with FlashInfer's headers; empty: they are downloaded")
string(TOUPPER "${MRV1_FLASHINFER}" mrv1_flashinfer_mode)
if(NOT mrv1_flashinfer_mode MATCHES "^(AUTO|ON|OFF)$")
  message(FATAL_ERROR "MRV1_FLASHINFER=${MRV1_FLASHINFER}: allowed are AUTO, ON and OFF")
endif()

# Downloads the wheel and unpacks its headers to `directory`. Sets `problem` to what went wrong, or
# to nothing.
function(mrv1_fetch_flashinfer directory problem)
  set(${problem} "" PARENT_SCOPE)
  # The stamp is written last: what was cut off half way is done again.
  set(stamp "${directory}/${mrv1_flashinfer_wheel}.unpacked")
  if(EXISTS "${stamp}")
    return()
  endif()
  if(NOT Python_EXECUTABLE)
    set(${problem} "there is no Python to download its headers with" PARENT_SCOPE)
    return()
  endif()
  file(REMOVE_RECURSE "${directory}")
  file(WRITE "${directory}/requirements.txt" "${mrv1_flashinfer_requirement}\n")
  message(STATUS "mrv1: downloading the headers of FlashInfer (62 MB)")
  execute_process(
    COMMAND ${Python_EXECUTABLE} -m pip download --quiet --no-deps --only-binary=:all:
            --require-hashes --disable-pip-version-check --dest "${directory}"
            --requirement "${directory}/requirements.txt"
    RESULT_VARIABLE status OUTPUT_VARIABLE output ERROR_VARIABLE output)
  if(NOT status EQUAL 0)
    string(STRIP "${output}" output)
    set(${problem} "pip could not download its headers: ${output}" PARENT_SCOPE)
    return()
  endif()
  file(ARCHIVE_EXTRACT INPUT "${directory}/${mrv1_flashinfer_wheel}" DESTINATION "${directory}"
       PATTERNS "flashinfer/data/include/flashinfer/*" "flashinfer/data/cutlass/include/*"
                "flashinfer/data/cccl/libcudacxx/include/*" "flashinfer/data/cccl/cub/cub/*"
                "flashinfer/data/cccl/thrust/thrust/*" "*.dist-info/licenses/LICENSE")
  file(REMOVE "${directory}/${mrv1_flashinfer_wheel}")
  file(TOUCH "${stamp}")
endfunction()

# Sets MRV1_CCCL_VERSION to the version of CCCL under one of the directories, or to 0.
function(mrv1_cccl_version)
  set(MRV1_CCCL_VERSION 0 PARENT_SCOPE)
  find_file(header cuda/std/__cccl/version.h PATHS ${ARGN} NO_DEFAULT_PATH NO_CACHE)
  if(header)
    file(STRINGS "${header}" line REGEX "^#[ \t]*define[ \t]+CCCL_VERSION[ \t]+[0-9]+")
    if(line MATCHES "CCCL_VERSION[ \t]+([0-9]+)")
      set(MRV1_CCCL_VERSION ${CMAKE_MATCH_1} PARENT_SCOPE)
    endif()
  endif()
endfunction()

# Sets MRV1_FLASHINFER_INCLUDE_DIRS and MRV1_CUTLASS_INCLUDE_DIR from what is under `root`, or sets
# `problem` to what is missing.
function(mrv1_find_flashinfer_headers root problem)
  set(${problem} "" PARENT_SCOPE)
  set(places "${root}" "${root}/3rdparty")
  list(TRANSFORM places APPEND /cutlass/include OUTPUT_VARIABLE cutlass_places)
  list(TRANSFORM places APPEND /cccl OUTPUT_VARIABLE cccl_places)
  find_path(flashinfer flashinfer/attention/hopper/prefill_sm90.cuh PATHS "${root}/include"
            NO_DEFAULT_PATH NO_CACHE)
  find_path(cutlass cutlass/cutlass.h PATHS ${cutlass_places} NO_DEFAULT_PATH NO_CACHE)
  find_path(cccl libcudacxx/include/cuda/std/__cccl/version.h PATHS ${cccl_places}
            NO_DEFAULT_PATH NO_CACHE)
  if(NOT flashinfer OR NOT cutlass)
    set(${problem} "${root} has no include/flashinfer or no cutlass/include" PARENT_SCOPE)
    return()
  endif()
  # FlashInfer needs CCCL 3.5; CUDA 13.0 has 3.0.
  set(directories "")
  mrv1_cccl_version(${CMAKE_CUDA_TOOLKIT_INCLUDE_DIRECTORIES})
  if(MRV1_CCCL_VERSION LESS 3005000)
    if(NOT cccl)
      set(${problem} "the toolkit's CCCL is ${MRV1_CCCL_VERSION}, needed is 3005000, and ${root} \
has none" PARENT_SCOPE)
      return()
    endif()
    list(APPEND directories "${cccl}/libcudacxx/include" "${cccl}/cub" "${cccl}/thrust")
  endif()
  set(MRV1_FLASHINFER_INCLUDE_DIRS ${directories} "${flashinfer}" PARENT_SCOPE)
  set(MRV1_CUTLASS_INCLUDE_DIR "${cutlass}" PARENT_SCOPE)
endfunction()

set(MRV1_WITH_FLASHINFER OFF)
if(NOT MRV1_WITH_CUDA OR mrv1_flashinfer_mode STREQUAL "OFF")
  set(mrv1_flashinfer_problem "MRV1_FLASHINFER=${mrv1_flashinfer_mode}")
  if(NOT MRV1_WITH_CUDA)
    set(mrv1_flashinfer_problem "the build is without CUDA")
  endif()
else()
  if(MRV1_FLASHINFER_DIR)
    set(mrv1_flashinfer_root "${MRV1_FLASHINFER_DIR}")
    set(mrv1_flashinfer_problem "")
  else()
    set(mrv1_flashinfer_root "${PROJECT_BINARY_DIR}/flashinfer/flashinfer/data")
    mrv1_fetch_flashinfer("${PROJECT_BINARY_DIR}/flashinfer" mrv1_flashinfer_problem)
  endif()
  if(NOT mrv1_flashinfer_problem)
    mrv1_find_flashinfer_headers("${mrv1_flashinfer_root}" mrv1_flashinfer_problem)
  endif()
  if(NOT mrv1_flashinfer_problem)
    set(MRV1_WITH_FLASHINFER ON)
  endif()
endif()
if(MRV1_WITH_FLASHINFER)
  message(STATUS "mrv1: FlashInfer ON (headers in ${mrv1_flashinfer_root})")
elseif(mrv1_flashinfer_mode STREQUAL "ON")
  message(FATAL_ERROR "MRV1_FLASHINFER=ON: ${mrv1_flashinfer_problem}. Give a directory with the "
    "headers in MRV1_FLASHINFER_DIR.")
else()
  message(STATUS "mrv1: FlashInfer OFF (${mrv1_flashinfer_problem})")
endif()

# Adds FlashInfer's kernels to `target`.
function(mrv1_add_flashinfer target)
  file(GLOB fa2_sources CONFIGURE_DEPENDS ${PROJECT_SOURCE_DIR}/src/cuda/flashinfer_fa2_*.cu)
  file(GLOB sm90_sources CONFIGURE_DEPENDS ${PROJECT_SOURCE_DIR}/src/cuda/sm90_flashinfer_*.cu)
  # The FA3 kernels exist for sm_90a only.
  set(sm90_architectures ${CMAKE_CUDA_ARCHITECTURES})
  list(FILTER sm90_architectures INCLUDE REGEX "^90a(-real)?$")
  mrv1_flashinfer_objects(${target} mrv1_flashinfer_fa2 "${CMAKE_CUDA_ARCHITECTURES}"
                          ${fa2_sources})
  if(sm90_architectures)
    mrv1_flashinfer_objects(${target} mrv1_flashinfer_sm90 90a-real ${sm90_sources})
    # As FlashInfer's own builds do; it is worth 3 % of the kernels' time.
    target_compile_options(mrv1_flashinfer_sm90 PRIVATE -use_fast_math)
    set_property(SOURCE ${PROJECT_SOURCE_DIR}/src/cuda/flashinfer_attention.cu
                 APPEND PROPERTY COMPILE_DEFINITIONS MRV1_FLASHINFER_SM90)
  endif()
  # CUTLASS's block-scaled products exist for sm_100a only.
  set(sm100_architectures ${CMAKE_CUDA_ARCHITECTURES})
  list(FILTER sm100_architectures INCLUDE REGEX "^100a(-real)?$")
  if(sm100_architectures)
    mrv1_flashinfer_objects(${target} mrv1_sm100_fp4_gemm 100a-real
                            ${PROJECT_SOURCE_DIR}/src/cuda/sm100_fp4_gemm.cu)
    # It needs all of CUTLASS's builders, which FlashInfer's kernels do without.
    get_target_property(directories mrv1_sm100_fp4_gemm INCLUDE_DIRECTORIES)
    list(FILTER directories EXCLUDE REGEX "/flashinfer_shims$")
    set_target_properties(mrv1_sm100_fp4_gemm PROPERTIES INCLUDE_DIRECTORIES "${directories}")
    set_property(SOURCE ${PROJECT_SOURCE_DIR}/src/cuda/fp4_gemm.cu
                 APPEND PROPERTY COMPILE_DEFINITIONS MRV1_SM100_FP4_GEMM)
  endif()
endfunction()

# Compiles sources for `architectures` with FlashInfer's headers, as a part of `target`.
function(mrv1_flashinfer_objects target name architectures)
  add_library(${name} OBJECT ${ARGN})
  set_target_properties(${name} PROPERTIES CUDA_ARCHITECTURES "${architectures}"
                        CUDA_STANDARD 20 CUDA_STANDARD_REQUIRED ON CUDA_RUNTIME_LIBRARY Static)
  # Not all are system directories: CCCL has to be found before the toolkit's, our own header before
  # CUTLASS's.
  target_include_directories(${name} PRIVATE
    ${PROJECT_SOURCE_DIR}/src/cpp ${PROJECT_SOURCE_DIR}/src/cuda
    ${PROJECT_SOURCE_DIR}/src/cuda/flashinfer_shims ${MRV1_FLASHINFER_INCLUDE_DIRS})
  target_include_directories(${name} SYSTEM PRIVATE ${MRV1_CUTLASS_INCLUDE_DIR})
  target_compile_options(${name} PRIVATE --expt-relaxed-constexpr)
  target_sources(${target} PRIVATE $<TARGET_OBJECTS:${name}>)
endfunction()
