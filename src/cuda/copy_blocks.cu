// Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
//
// A thread block copies one KV block of one array, 16 bytes a thread and turn, or 2 where blocks
// are no multiple of that.
#include "launch.h"
#include "ops/copy_blocks.h"

namespace mrv1 {
namespace {

constexpr int kThreads = 256;

template <typename Piece>
__device__ void copy_pieces(const char* from, char* to, int64_t bytes) {
  const auto* source = reinterpret_cast<const Piece*>(from);
  auto* target = reinterpret_cast<Piece*>(to);
  const int64_t pieces = bytes / static_cast<int64_t>(sizeof(Piece));
  for (int64_t i = threadIdx.x; i < pieces; i += kThreads) target[i] = source[i];
}

__global__ void __launch_bounds__(kThreads)
    copy_blocks_kernel(const __grid_constant__ CopyBlocksParams params) {
  cuda::launch_next();
  cuda::wait_for_previous();
  const CacheArray array = params.arrays[blockIdx.y];
  const BlockCopy copy = params.copies[blockIdx.x];
  char* base = static_cast<char*>(array.base);
  const char* from = base + copy.source * array.block_bytes;
  char* to = base + copy.target * array.block_bytes;
  const auto address = reinterpret_cast<unsigned long long>(base);
  if (address % sizeof(uint4) == 0 && array.block_bytes % sizeof(uint4) == 0) {
    copy_pieces<uint4>(from, to, array.block_bytes);
  } else {
    copy_pieces<unsigned short>(from, to, array.block_bytes);  // elements have 2 or 4 bytes
  }
}

}  // namespace

void copy_blocks_cuda(const CopyBlocksParams& params, const StepContext& ctx) {
  if (params.count == 0 || params.num_arrays == 0) return;
  const dim3 grid(static_cast<unsigned>(params.count), static_cast<unsigned>(params.num_arrays));
  cuda::launch("copy_blocks", ctx, copy_blocks_kernel, grid, dim3(kThreads), 0, params);
}

}  // namespace mrv1
