// Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
#include "ops/vector_ops.h"

#if defined(__x86_64__)

#include <cmath>
#include <cstring>

// From here to the end of the file: only code in this file's own namespace may follow, lest a
// shared inline function be compiled for this target and be linked in for all.
#pragma GCC target("avx2,fma")

#define MRV1_SIMD_AVX2
#define MRV1_SIMD_NAMESPACE avx2
#include "ops/simd_cpu.h"
#include "ops/vector_ops_body.h"

#endif
