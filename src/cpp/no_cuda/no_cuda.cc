// Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
#include "core/device.h"
#include "core/error.h"
#include "dist/communicator.h"
#include "ops/linear_options.h"

namespace mrv1::cuda {

bool is_built() { return false; }

bool is_available() { return false; }

// The build says why: cmake/Mrv1Cuda.cmake.
std::string describe() { return "built without CUDA: " MRV1_NO_CUDA_REASON; }

std::unique_ptr<Device> make_device(int, void*) { fail(ErrorKind::kDevice, "cuda", describe()); }

std::vector<std::unique_ptr<Communicator>> make_group(std::span<const std::shared_ptr<Device>>,
                                                      const GroupOptions&) {
  fail(ErrorKind::kDevice, "cuda", describe());
}

int64_t group_bytes(int, const GroupOptions&) { return 0; }

std::string describe_cublaslt(const std::vector<std::string>&) {
  fail(ErrorKind::kDevice, "cuBLASLt", describe());
}

}  // namespace mrv1::cuda
