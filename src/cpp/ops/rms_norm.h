// Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
#pragma once

#include "core/dtype.h"
#include "state/step_context.h"

namespace mrv1 {

// out = x / sqrt(mean(x^2) + eps) * weight, by row, in float32.
// With a residual: sum = x + residual (rounded to dtype and stored in `sum`), out = norm of sum.
// Source of the formula: Zhang & Sennrich 2019, as Llama uses it.
struct RmsNormParams {
  const void* x;         // [tokens, cols] of dtype
  const void* residual;  // [tokens, cols] of dtype, or null
  const float* weight;   // [cols]
  void* out;             // [tokens, cols] of dtype; may be x or residual
  void* sum;             // [tokens, cols] of dtype when residual is given; may be x or residual
  int64_t cols;
  float eps;
  DType dtype;
  bool logits_rows;  // rows are the step's logits rows instead of its tokens
};

void rms_norm_cpu(const RmsNormParams& params, const StepContext& ctx);
void rms_norm_cuda(const RmsNormParams& params, const StepContext& ctx);

}  // namespace mrv1
