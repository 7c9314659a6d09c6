// Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cuda_runtime.h>

namespace mrv1::cuda {

// Collectives over a one-dimensional block of kThreads threads (a multiple of 32). Every thread of
// the block must call them, and every thread gets the result. The order of operations is fixed.

constexpr int kWarpSize = 32;
constexpr unsigned kFullWarp = 0xffffffffu;

template <typename T>
__device__ T warp_sum(T value) {
  for (int offset = kWarpSize / 2; offset > 0; offset /= 2) {
    value += __shfl_xor_sync(kFullWarp, value, offset);
  }
  return value;
}

template <int kThreads, typename T, typename Combine>
__device__ T block_reduce(T value, Combine combine) {
  __shared__ T partial[kThreads / kWarpSize];
  for (int offset = kWarpSize / 2; offset > 0; offset /= 2) {
    value = combine(value, __shfl_xor_sync(kFullWarp, value, offset));
  }
  if (threadIdx.x % kWarpSize == 0) partial[threadIdx.x / kWarpSize] = value;
  __syncthreads();
  T result = partial[0];
  for (int warp = 1; warp < kThreads / kWarpSize; ++warp) result = combine(result, partial[warp]);
  __syncthreads();  // `partial` may be written again by the next call
  return result;
}

template <int kThreads, typename T>
__device__ T block_sum(T value) {
  return block_reduce<kThreads>(value, [](T a, T b) { return a + b; });
}

template <int kThreads, typename T>
__device__ T block_max(T value) {
  return block_reduce<kThreads>(value, [](T a, T b) { return a < b ? b : a; });
}

template <int kThreads, typename T>
__device__ T block_min(T value) {
  return block_reduce<kThreads>(value, [](T a, T b) { return b < a ? b : a; });
}

// Sum over a block of any number of whole warps, with one barrier: once in a kernel only.
template <typename T>
__device__ T whole_block_sum(T value) {
  __shared__ T partial[kWarpSize];
  value = warp_sum(value);
  if (threadIdx.x % kWarpSize == 0) partial[threadIdx.x / kWarpSize] = value;
  __syncthreads();
  const unsigned lane = threadIdx.x % kWarpSize;
  return warp_sum(lane < blockDim.x / kWarpSize ? partial[lane] : T{});
}

// Sum of `value` over the threads before this one; `total` gets the sum over all. Integers only.
template <int kThreads, typename T>
__device__ T block_exclusive_scan(T value, T* total) {
  __shared__ T warp_total[kThreads / kWarpSize];
  const int lane = threadIdx.x % kWarpSize;
  const int warp = threadIdx.x / kWarpSize;
  T inclusive = value;
  for (int offset = 1; offset < kWarpSize; offset *= 2) {
    const T before = __shfl_up_sync(kFullWarp, inclusive, offset);
    if (lane >= offset) inclusive += before;
  }
  if (lane == kWarpSize - 1) warp_total[warp] = inclusive;
  __syncthreads();
  T base = 0;
  T sum = 0;
  for (int i = 0; i < kThreads / kWarpSize; ++i) {
    if (i < warp) base += warp_total[i];
    sum += warp_total[i];
  }
  __syncthreads();  // `warp_total` may be written again by the next call
  *total = sum;
  return base + inclusive - value;
}

}  // namespace mrv1::cuda
