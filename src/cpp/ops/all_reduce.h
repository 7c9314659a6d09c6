// Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
#pragma once

#include "core/dtype.h"
#include "core/portable.h"
#include "state/step_context.h"

namespace mrv1 {

// The order in which values of ranks, or of parts of a row-parallel linear, are summed in float32:
// neighbours first, ((v0 + v1) + (v2 + v3)) + ..., one without a neighbour stays as it is. So a sum
// of 8 parts has the same bits wherever ranks have summed 1, 2, 4 or 8 of them beforehand. The
// result is in values[0].
MRV1_HD float sum_in_order(float* values, int count) {
  for (int step = 1; step < count; step *= 2) {
    for (int i = 0; i + step < count; i += 2 * step) values[i] += values[i + step];
  }
  return values[0];
}

// out = sum over the ranks of x (+ bias), by element, in the order of sum_in_order; the sum and the
// bias are added in float32 and rounded to out_dtype once. All ranks get the same bits. Without a
// communicator in the context there is one rank.
struct AllReduceParams {
  const void* x;      // [rows, cols] of dtype
  const float* bias;  // [cols] or null; the same on all ranks
  void* out;          // [rows, cols] of out_dtype; may be x where the dtypes are equal
  int64_t cols;
  DType dtype;       // float32 or bfloat16
  DType out_dtype;   // float32 or bfloat16, not wider than dtype
  bool logits_rows;  // rows are the step's logits rows instead of its tokens
};

void all_reduce_cpu(const AllReduceParams& params, const StepContext& ctx);
void all_reduce_cuda(const AllReduceParams& params, const StepContext& ctx);

}  // namespace mrv1
