// Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
#pragma once

// Marks functions that the CPU backend and device code share word for word, so that both compute
// the same integers and the same roundings.
#if defined(__CUDACC__)
#define MRV1_HD __host__ __device__ __forceinline__
#else
#define MRV1_HD inline
#endif
