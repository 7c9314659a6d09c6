// Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cuda_runtime.h>

#include "core/dtype.h"
#include "vector.cuh"

namespace mrv1::cuda {

// Sums of one piece of values of T as they are stored: 16 bytes, or 8 where float32 becomes
// bfloat16.
template <int kBytes>
struct StoredSums;
template <>
struct StoredSums<16> {
  using type = uint4;
};
template <>
struct StoredSums<8> {
  using type = uint2;
};
template <typename T, typename Out>
using SumsOf = typename StoredSums<kVectorSize<T>* static_cast<int>(sizeof(Out))>::type;

template <typename T, typename Out>
__device__ __forceinline__ SumsOf<T, Out> round_sums(const float (&sums)[kVectorSize<T>]) {
  if constexpr (sizeof(T) == sizeof(Out)) {
    return pack(sums);
  } else {
    const float padded[8] = {sums[0], sums[1], sums[2], sums[3], 0.0f, 0.0f, 0.0f, 0.0f};
    const uint4 packed = pack(padded);
    return make_uint2(packed.x, packed.y);
  }
}

}  // namespace mrv1::cuda
