// Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
#include "ops/vector_ops.h"

#if defined(__x86_64__)

#include <cmath>
#include <cstring>

// From here to the end of the file: only code in this file's own namespace may follow, lest a
// shared inline function be compiled for this target and be linked in for all.
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")

// A false alarm of GCC 12 about its own intrinsics.
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"

#define MRV1_SIMD_AVX512
#define MRV1_SIMD_NAMESPACE avx512
#include "ops/simd_cpu.h"
#include "ops/vector_ops_body.h"

#endif
