// Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
#include "core/device.h"
#include "core/error.h"
#include "ops/linear_options.h"

namespace mrv1::cuda {

bool is_built() { return false; }

bool is_available() { return false; }

// The build says why: cmake/Mrv1Cuda.cmake.
std::string describe() { return "built without CUDA: " MRV1_NO_CUDA_REASON; }

std::unique_ptr<Device> make_device(int, void*) { fail(ErrorKind::kDevice, "cuda", describe()); }

std::string describe_cublaslt(const std::vector<std::string>&) {
  fail(ErrorKind::kDevice, "cuBLASLt", describe());
}

}  // namespace mrv1::cuda
