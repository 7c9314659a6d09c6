// Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
//
// What the wgmma kernels of moe_experts have in common besides what they have from linear.
#pragma once

#include "linear_wgmma.cuh"
#include "moe_schedule.h"

namespace mrv1::cuda {

// What a block needs besides its ring: barriers, the schedule of few pairs, and room to align the
// ring.
constexpr size_t kMoeReservedBytes = 2560;

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)

// kRows / kShare weight rows, for each block of a cluster.
template <int kShare>
__device__ __forceinline__ void load_expert_tile(void* to, const CUtensorMap& map,
                                                 uint64_t* barrier, int col, int row, int expert,
                                                 uint64_t policy) {
  if constexpr (kShare == 1) {
    tma_load_3d(to, map, barrier, col, row, expert, policy);
  } else {
    constexpr uint16_t kAllBlocks = (1 << kShare) - 1;
    tma_load_3d_multicast(to, map, barrier, col, row, expert, kAllBlocks);
  }
}

// Has the second cache fetch what load_expert_tile() will, of as many rows.
__device__ __forceinline__ void prefetch_expert_tile(const CUtensorMap& map, int col, int row,
                                                     int expert) {
  tma_prefetch_3d(map, col, row, expert);
}

// Where a ring's next stage is.
struct RingPlace {
  int stage = 0;
  int parity = 0;
  __device__ void next(int stages) {
    if (++stage == stages) {
      stage = 0;
      parity ^= 1;
    }
  }
};

#endif  // __CUDA_ARCH_FEAT_SM90_ALL

// Shared memory of each of so many blocks on a multiprocessor. The system keeps 1 KB a block.
inline size_t moe_block_bytes(const DeviceLimits& limits, int blocks) {
  constexpr size_t kSystemBytes = 1024;
  return (limits.shared_bytes + kSystemBytes) / blocks - kSystemBytes;
}

// Describes the weights of a product, in tiles of so many rows of 64 columns.
inline CUtensorMap expert_map(const MoeProduct& product, int tile_rows) {
  const auto size = [](int64_t value) { return static_cast<cuuint64_t>(value); };
  const cuuint64_t row_bytes = size(product.weight.cols) * 2;
  return tensor_map<3>(
      product.weight.data,
      {size(product.weight.cols), size(product.weight_rows()), size(product.weight.matrices)},
      {row_bytes, row_bytes * size(product.weight_rows())},
      {kGroup, static_cast<cuuint32_t>(tile_rows), 1});
}

// The same for a product with an activation: pieces of 8 rows of gate and the 8 of up that go with
// them.
inline CUtensorMap expert_pair_map(const MoeProduct& product, int tile_rows) {
  const auto size = [](int64_t value) { return static_cast<cuuint64_t>(value); };
  const cuuint64_t row_bytes = size(product.weight.cols) * 2;
  return tensor_map<5>(product.weight.data,
                       {size(product.weight.cols), 8, 2, size(product.out_cols()) / 8,
                        size(product.weight.matrices)},
                       {row_bytes, row_bytes * size(product.out_cols()), row_bytes * 8,
                        row_bytes * size(product.weight_rows())},
                       {kGroup, 8, 2, static_cast<cuuint32_t>(tile_rows / 16), 1});
}

}  // namespace mrv1::cuda
