// Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
//
// Stands in for FlashInfer's cutlass_utils.cuh, whose guard it defines: that file pulls in
// CUTLASS's GEMM and test headers, and with them cuRAND, of which the attention kernels use
// nothing.
#pragma once

#define FLASHINFER_CUTLASS_UTILS_CUH_

#include <cutlass/cutlass.h>
#include <cutlass/numeric_types.h>
#include <cute/tensor.hpp>
