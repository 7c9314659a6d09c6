// Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
#pragma once

#include "core/dtype.h"
#include "ops/activation.h"
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

// out = activation(x[:, :cols]) * x[:, cols:], in float32.
struct GatedMulParams {
  const void* x;  // [tokens, 2 * cols] of dtype: gate then up
  void* out;      // [tokens, cols] of dtype
  int64_t cols;
  DType dtype;
  Activation activation;  // not kNone
};

void gated_mul_cpu(const GatedMulParams& params, const StepContext& ctx);
void gated_mul_cuda(const GatedMulParams& params, const StepContext& ctx);

// out = cap * tanh(x / cap) by element: logits that are kept within (-cap, cap) (Gemma 2).
struct SoftCapParams {
  const float* x;  // [logits rows, cols]
  float* out;      // [logits rows, cols]; may be x
  int64_t cols;
  float cap;  // positive
};

void soft_cap_cpu(const SoftCapParams& params, const StepContext& ctx);
void soft_cap_cuda(const SoftCapParams& params, const StepContext& ctx);

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
