// Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
//
// A thread block copies what one KV block has in one array.
#include "copy_bytes.cuh"
#include "launch.h"
#include "ops/copy_blocks.h"

namespace mrv1 {
namespace {

constexpr int kThreads = 256;
constexpr int32_t kMaxArrays = 65535;  // of a launch, by the limit of a grid

__global__ void __launch_bounds__(kThreads)
    copy_blocks_kernel(const __grid_constant__ CopyBlocksParams params) {
  cuda::launch_next();
  cuda::wait_for_previous();
  const CacheArray array = params.arrays[blockIdx.y];
  const BlockCopy copy = params.copies[blockIdx.x];
  char* base = static_cast<char*>(array.base);
  cuda::copy_bytes(base + copy.source * array.stride, base + copy.target * array.stride,
                   array.bytes, threadIdx.x, kThreads);
}

}  // namespace

void copy_blocks_cuda(const CopyBlocksParams& params, const StepContext& ctx) {
  if (params.count == 0) return;
  for (int32_t first = 0; first < params.num_arrays; first += kMaxArrays) {
    CopyBlocksParams part = params;
    part.arrays = params.arrays + first;
    part.num_arrays =
        params.num_arrays - first < kMaxArrays ? params.num_arrays - first : kMaxArrays;
    const dim3 grid(static_cast<unsigned>(part.count), static_cast<unsigned>(part.num_arrays));
    cuda::launch("copy_blocks", ctx, copy_blocks_kernel, grid, dim3(kThreads), 0, part);
  }
}

}  // namespace mrv1
