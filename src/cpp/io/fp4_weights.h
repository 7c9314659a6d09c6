// Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>

#include "core/dtype.h"

namespace mrv1 {

// The largest magnitude of `count` values of float32, bfloat16 or float16; NaN if one is NaN.
float largest_magnitude(const void* values, DType dtype, int64_t count);

// Of what quantisation changed: sums over all elements, and the largest error.
struct Fp4Error {
  double squared_errors = 0.0, squares = 0.0;
  float largest = 0.0f;
};

// Values [rows, cols] of float32, bfloat16 or float16 as NVFP4 (core/float4.h): codes [rows, cols /
// 2] and block scales [rows, cols / 16]. `cols` is a multiple of 16, values are finite.
Fp4Error quantize_fp4(const void* values, DType dtype, int64_t rows, int64_t cols,
                      float global_scale, uint8_t* codes, uint8_t* block_scales);

// The way back, to float32 [rows, cols]: code * block scale, exact, times the global scale,
// rounded.
void dequantize_fp4(const uint8_t* codes, const uint8_t* block_scales, int64_t rows, int64_t cols,
                    float global_scale, float* values);

}  // namespace mrv1
