// Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
#pragma once

#include "core/dtype.h"
#include "state/step_context.h"

namespace mrv1 {

// out = a + b by element, rounded to dtype.
struct AddParams {
  const void* a;  // [tokens, cols] of dtype
  const void* b;  // [tokens, cols] of dtype
  void* out;      // [tokens, cols] of dtype; may be a or b
  int64_t cols;
  DType dtype;
};

void add_cpu(const AddParams& params, const StepContext& ctx);
void add_cuda(const AddParams& params, const StepContext& ctx);

// out = silu(x[:, :cols]) * x[:, cols:], silu(v) = v / (1 + exp(-v)), in float32.
struct SiluMulParams {
  const void* x;  // [tokens, 2 * cols] of dtype: gate then up
  void* out;      // [tokens, cols] of dtype
  int64_t cols;
  DType dtype;
};

void silu_mul_cpu(const SiluMulParams& params, const StepContext& ctx);
void silu_mul_cuda(const SiluMulParams& params, const StepContext& ctx);

// out[l] = x[logits_indices[l]] for the step's logits rows.
struct GatherRowsParams {
  const void* x;  // [tokens, cols] of dtype
  void* out;      // [logits rows, cols] of dtype
  int64_t cols;
  DType dtype;
};

void gather_rows_cpu(const GatherRowsParams& params, const StepContext& ctx);
void gather_rows_cuda(const GatherRowsParams& params, const StepContext& ctx);

}  // namespace mrv1
