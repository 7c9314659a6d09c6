// Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "core/dtype.h"

namespace mrv1::cuda {

// 16-byte pieces of activations: what one load or store instruction moves at most.
constexpr int kVectorBytes = 16;
template <typename T>
constexpr int kVectorSize = kVectorBytes / static_cast<int>(sizeof(T));

__host__ __device__ __forceinline__ bool is_vector_aligned(const void* address) {
  return reinterpret_cast<uintptr_t>(address) % kVectorBytes == 0;
}

// `index` counts vectors.
template <typename T>
__device__ __forceinline__ uint4 load_vector(const T* base, int64_t index) {
  return reinterpret_cast<const uint4*>(base)[index];
}

template <typename T>
__device__ __forceinline__ void store_vector(T* base, int64_t index, uint4 vector) {
  reinterpret_cast<uint4*>(base)[index] = vector;
}

// The elements of a vector as floats, and back with one rounding each. A NaN stays a NaN.
__device__ __forceinline__ void unpack(uint4 vector, float (&values)[4]) {
  values[0] = __uint_as_float(vector.x);
  values[1] = __uint_as_float(vector.y);
  values[2] = __uint_as_float(vector.z);
  values[3] = __uint_as_float(vector.w);
}

__device__ __forceinline__ void unpack(uint4 vector, float (&values)[8]) {
  const uint32_t words[4] = {vector.x, vector.y, vector.z, vector.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    values[2 * i] = __uint_as_float(words[i] << 16);
    values[2 * i + 1] = __uint_as_float(words[i] & 0xffff0000u);
  }
}

// The elements of a vector of a type with 16 bits.
template <typename T>
__device__ __forceinline__ void unpack_as(uint4 vector, float (&values)[8]) {
  if constexpr (std::is_same_v<T, BFloat16>) {
    unpack(vector, values);
  } else {
    static_assert(std::is_same_v<T, Float16>);
    const uint32_t words[4] = {vector.x, vector.y, vector.z, vector.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      __half2 pair;
      memcpy(&pair, &words[i], sizeof(pair));
      const float2 both = __half22float2(pair);
      values[2 * i] = both.x;
      values[2 * i + 1] = both.y;
    }
  }
}

// What pack() gives of values that the type holds exactly; the bits of a NaN stay, too.
__device__ __forceinline__ uint4 pack_exact(const float (&values)[4]) {
  return make_uint4(__float_as_uint(values[0]), __float_as_uint(values[1]),
                    __float_as_uint(values[2]), __float_as_uint(values[3]));
}

__device__ __forceinline__ uint4 pack_exact(const float (&values)[8]) {
  uint32_t words[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    words[i] =
        __byte_perm(__float_as_uint(values[2 * i]), __float_as_uint(values[2 * i + 1]), 0x7632);
  }
  return make_uint4(words[0], words[1], words[2], words[3]);
}

__device__ __forceinline__ uint4 pack(const float (&values)[4]) {
  return make_uint4(__float_as_uint(values[0]), __float_as_uint(values[1]),
                    __float_as_uint(values[2]), __float_as_uint(values[3]));
}

__device__ __forceinline__ uint4 pack(const float (&values)[8]) {
  uint32_t words[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;"
        : "=r"(words[i])
        : "f"(values[2 * i + 1]), "f"(values[2 * i]));
  }
  return make_uint4(words[0], words[1], words[2], words[3]);
}

// What `count` values of dtype T (a multiple of a vector) become when they are stored and read
// again.
template <typename T, int kCount>
__device__ __forceinline__ void round_values(float (&values)[kCount]) {
  if constexpr (sizeof(T) == 2) {
    static_assert(kCount == 8);
    unpack(pack(values), values);
  }
}

// kCount elements of T (one vector or more) from or to an aligned address.
template <typename T, int kCount>
__device__ __forceinline__ void load_values(const T* from, float (&values)[kCount]) {
  constexpr int kSize = kVectorSize<T>;
  static_assert(kCount % kSize == 0);
#pragma unroll
  for (int i = 0; i < kCount / kSize; ++i) {
    float piece[kSize];
    unpack(load_vector(from, i), piece);
#pragma unroll
    for (int j = 0; j < kSize; ++j) values[i * kSize + j] = piece[j];
  }
}

// Of values that T holds exactly.
template <typename T, int kCount>
__device__ __forceinline__ void store_exact(T* to, const float (&values)[kCount]) {
  constexpr int kSize = kVectorSize<T>;
  static_assert(kCount % kSize == 0);
#pragma unroll
  for (int i = 0; i < kCount / kSize; ++i) {
    float piece[kSize];
#pragma unroll
    for (int j = 0; j < kSize; ++j) piece[j] = values[i * kSize + j];
    store_vector(to, i, pack_exact(piece));
  }
}

template <typename T, int kCount>
__device__ __forceinline__ void store_values(T* to, const float (&values)[kCount]) {
  constexpr int kSize = kVectorSize<T>;
  static_assert(kCount % kSize == 0);
#pragma unroll
  for (int i = 0; i < kCount / kSize; ++i) {
    float piece[kSize];
#pragma unroll
    for (int j = 0; j < kSize; ++j) piece[j] = values[i * kSize + j];
    store_vector(to, i, pack(piece));
  }
}

}  // namespace mrv1::cuda
