// Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cuda_runtime.h>

#include <string_view>

#include "check.h"

namespace mrv1::cuda {

// Makes `ordinal` current for a scope. `where` names the caller in errors.
class CurrentDevice {
 public:
  CurrentDevice(int ordinal, std::string_view where) : ordinal_(ordinal) {
    check_cuda(cudaGetDevice(&previous_), where, "cudaGetDevice");
    // Also where the number is right already: a thread's first call has no context yet, and
    // queries such as cudaPointerGetAttributes do not make one.
    check_cuda(cudaSetDevice(ordinal_), where, "cudaSetDevice");
  }
  ~CurrentDevice() {
    if (previous_ != ordinal_) cudaSetDevice(previous_);
  }
  CurrentDevice(const CurrentDevice&) = delete;
  CurrentDevice& operator=(const CurrentDevice&) = delete;

 private:
  int ordinal_;
  int previous_ = 0;
};

}  // namespace mrv1::cuda
