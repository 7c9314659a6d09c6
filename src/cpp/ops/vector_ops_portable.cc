// Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
#include "ops/vector_ops.h"

#include <cmath>
#include <cstring>

#define MRV1_SIMD_NAMESPACE portable
#include "ops/simd_cpu.h"
#include "ops/vector_ops_body.h"
