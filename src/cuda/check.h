// Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cuda_runtime.h>

#include <source_location>
#include <string_view>

#include "core/error.h"
#include "state/step_context.h"

namespace mrv1::cuda {

// Throws kDevice, naming the op, the call and the line, unless the call succeeded.
inline void check_cuda(cudaError_t status, std::string_view op, std::string_view call,
                       const std::source_location& where = std::source_location::current()) {
  if (status == cudaSuccess) [[likely]] {
    return;
  }
  cudaGetLastError();  // an error that is not sticky must not be blamed on a later launch
  std::string_view file = where.file_name();
  file.remove_prefix(file.rfind('/') + 1);  // npos + 1 is 0
  fail(ErrorKind::kDevice, op, call, " failed: ", cudaGetErrorName(status), " (",
       cudaGetErrorString(status), ") at ", file, ":", where.line());
}

// To be called right after a launch. Errors inside the kernel come later, from a call that waits.
inline void check_launch(std::string_view op,
                         const std::source_location& where = std::source_location::current()) {
  check_cuda(cudaGetLastError(), op, "kernel launch", where);
}

inline cudaStream_t stream_of(const StepContext& ctx) {
  return static_cast<cudaStream_t>(ctx.stream);
}

}  // namespace mrv1::cuda
