// Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
//
// Threads copy through the addresses that the device has for both sides. A KV block is cut into
// pieces for several thread blocks, so that many requests are under way on the bus at a time.
#include <algorithm>

#include "copy_bytes.cuh"
#include "launch.h"
#include "ops/swap_blocks.h"

namespace mrv1 {
namespace {

constexpr int kThreads = 256;
constexpr int64_t kPieceBytes = 16384;  // four vectors a thread
constexpr int64_t kMaxPieces = 1024;

__global__ void __launch_bounds__(kThreads)
    swap_blocks_kernel(const __grid_constant__ SwapBlocksParams params) {
  cuda::launch_next();
  cuda::wait_for_previous();
  const BlockCopy copy = params.copies[blockIdx.x];
  const char* from = static_cast<const char*>(params.source) + copy.source * params.source_stride;
  char* to = static_cast<char*>(params.target) + copy.target * params.target_stride;
  cuda::copy_bytes(from, to, params.bytes, int64_t{blockIdx.y} * kThreads + threadIdx.x,
                   int64_t{gridDim.y} * kThreads);
}

}  // namespace

void swap_blocks_cuda(const SwapBlocksParams& params, const StepContext& ctx) {
  if (params.count == 0 || params.bytes == 0) return;
  const int64_t pieces = std::min((params.bytes + kPieceBytes - 1) / kPieceBytes, kMaxPieces);
  const dim3 grid(static_cast<unsigned>(params.count), static_cast<unsigned>(pieces));
  cuda::launch("swap_blocks", ctx, swap_blocks_kernel, grid, dim3(kThreads), 0, params);
}

}  // namespace mrv1
