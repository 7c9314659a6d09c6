// Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>

#include "ops/linear.h"

// Linears of NVFP4 weights, in WeightLayout::kTile16 (fp4.cuh).
namespace mrv1::cuda {

class LinearContext;

// The most rows that the streaming kernel is faster for than a dequantised copy of the weight.
constexpr int64_t kFp4StreamedRows = 256;
// Copies of weights in bfloat16 are made in pieces of so many bytes at most.
constexpr int64_t kMaxFp4Scratch = int64_t{256} << 20;

// Bytes of workspace besides those of other linears, where the largest NVFP4 weight of a linear has
// so many elements and steps so many tokens.
constexpr int64_t fp4_workspace_bytes(int64_t elements, int64_t max_tokens) {
  if (max_tokens <= kFp4StreamedRows) return 0;
  const int64_t bytes = (elements * static_cast<int64_t>(sizeof(BFloat16)) + 255) / 256 * 256;
  return bytes < kMaxFp4Scratch ? bytes : kMaxFp4Scratch;
}

// A zero in the memory of the current device.
const float* fp4_zero();

// Copies `count` matrices of an NVFP4 weight from the first on to bfloat16, row-major: codes times
// block scales, which is exact, without the scales of rows.
void fp4_dequantize(const WeightView& weight, int64_t first, int64_t count, BFloat16* out,
                    const StepContext& ctx);

// Whether the streaming kernel takes columns [first_col, first_col + cols) of this linear: x is
// bfloat16 and aligned, the columns whole tiles, or the weight's last.
bool fp4_streams(const LinearParams& params, int64_t first_col, int64_t cols, int64_t x_stride);

// Weights stream from memory and are dequantised in registers. Whatever the number of rows, a row's
// result has the same bits. x has the columns alone, its rows `x_stride` elements apart.
void linear_fp4_streamed(const LinearParams& params, int64_t first_col, int64_t cols, int64_t rows,
                         int64_t x_stride, const StepContext& ctx);

// The columns of any linear of an NVFP4 weight; as above.
void linear_fp4_columns(const LinearParams& params, int64_t first_col, int64_t cols, int64_t rows,
                        int64_t x_stride, const StepContext& ctx);

// All columns: by linear_fp4_columns, or by way of copies of the weight in bfloat16.
void linear_fp4(const LinearParams& params, int64_t rows, LinearContext& context,
                const StepContext& ctx);

}  // namespace mrv1::cuda
