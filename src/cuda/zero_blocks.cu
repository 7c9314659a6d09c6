// Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
//
// A thread block zeroes what one KV block has in one array.
#include "launch.h"
#include "ops/zero_blocks.h"

namespace mrv1 {
namespace {

constexpr int kThreads = 256;
constexpr int32_t kMaxArrays = 65535;  // of a launch, by the limit of a grid

template <typename Piece>
__device__ __forceinline__ void zero_pieces(char* to, int64_t bytes) {
  auto* target = reinterpret_cast<Piece*>(to);
  const int64_t pieces = bytes / static_cast<int64_t>(sizeof(Piece));
  for (int64_t i = threadIdx.x; i < pieces; i += kThreads) target[i] = Piece{};
}

__global__ void __launch_bounds__(kThreads)
    zero_blocks_kernel(const __grid_constant__ ZeroBlocksParams params) {
  cuda::launch_next();
  cuda::wait_for_previous();
  const CacheArray array = params.arrays[blockIdx.y];
  char* to = static_cast<char*>(array.base) + params.blocks[blockIdx.x] * array.stride;
  const uint64_t all = reinterpret_cast<uint64_t>(to) | static_cast<uint64_t>(array.bytes);
  if (all % sizeof(uint4) == 0) {
    zero_pieces<uint4>(to, array.bytes);
  } else {
    zero_pieces<uint8_t>(to, array.bytes);
  }
}

}  // namespace

void zero_blocks_cuda(const ZeroBlocksParams& params, const StepContext& ctx) {
  if (params.count == 0) return;
  for (int32_t first = 0; first < params.num_arrays; first += kMaxArrays) {
    ZeroBlocksParams part = params;
    part.arrays = params.arrays + first;
    part.num_arrays =
        params.num_arrays - first < kMaxArrays ? params.num_arrays - first : kMaxArrays;
    const dim3 grid(static_cast<unsigned>(part.count), static_cast<unsigned>(part.num_arrays));
    cuda::launch("zero_blocks", ctx, zero_blocks_kernel, grid, dim3(kThreads), 0, part);
  }
}

}  // namespace mrv1
