// Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cfloat>

#include "block.cuh"
#include "ops/kv_cache.h"
#include "vector.cuh"

// How heads come into a cache: what the kernels that write one have in common.
namespace mrv1::cuda {

// Codes of two values, the first in the low byte. Hardware converts where there is an instruction
// for it, which rounds, saturates and writes NaN as float8_from_float does.
template <typename F>
__device__ __forceinline__ uint32_t encode_pair(float low, float high) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 890
  uint16_t pair;
  if constexpr (F::kMantissaBits == 3) {
    asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(pair) : "f"(high), "f"(low));
  } else {
    asm("cvt.rn.satfinite.e5m2x2.f32 %0, %1, %2;" : "=h"(pair) : "f"(high), "f"(low));
  }
  return pair;
#else
  return uint32_t{float8_from_float<F>(low).bits} | uint32_t{float8_from_float<F>(high).bits} << 8;
#endif
}

// Codes of eight neighbouring values, each times `inverse`.
template <typename F>
__device__ __forceinline__ uint2 encode(const float (&values)[8], float inverse) {
  uint32_t pairs[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    pairs[i] = encode_pair<F>(values[2 * i] * inverse, values[2 * i + 1] * inverse);
  }
  return make_uint2(pairs[0] | pairs[1] << 16, pairs[2] | pairs[3] << 16);
}

__device__ __forceinline__ float finite_magnitude(float value) {
  const float magnitude = fabsf(value);
  return magnitude <= FLT_MAX ? magnitude : 0.0f;  // NaN compares false
}

template <int kCount>
__device__ __forceinline__ float largest_finite(const float (&values)[kCount]) {
  float largest = 0.0f;
#pragma unroll
  for (int i = 0; i < kCount; ++i) largest = fmaxf(largest, fabsf(values[i]));  // skips NaN
  if (largest > FLT_MAX) {
    largest = 0.0f;
#pragma unroll
    for (int i = 0; i < kCount; ++i) largest = fmaxf(largest, finite_magnitude(values[i]));
  }
  return largest;
}

// Where the elements of a head begin, in elements.
__device__ __forceinline__ int64_t cache_index(const KvCacheLayer& cache, uint32_t block,
                                               uint32_t place, int32_t head) {
  return block * cache.block_stride + place * cache.token_stride + head * cache.head_stride;
}

}  // namespace mrv1::cuda
