// Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace mrv1::cuda {

// The GPU's clock, in nanoseconds. Slow to read.
__device__ __forceinline__ uint64_t device_clock_ns() {
  uint64_t ns;
  asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(ns));
  return ns;
}

}  // namespace mrv1::cuda
