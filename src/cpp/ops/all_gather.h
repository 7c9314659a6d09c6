// Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
#pragma once

#include "core/dtype.h"
#include "state/step_context.h"

namespace mrv1 {

// The columns of all ranks side by side: out[row, rank * cols + c] = x of that rank [row, c].
// Without a communicator in the context there is one rank.
struct AllGatherParams {
  const void* x;     // [rows, cols] of dtype
  void* out;         // [rows, ranks * cols] of dtype, apart from x
  int64_t cols;      // of one rank
  DType dtype;       // float32 or bfloat16
  bool logits_rows;  // rows are the step's logits rows instead of its tokens
};

void all_gather_cpu(const AllGatherParams& params, const StepContext& ctx);
void all_gather_cuda(const AllGatherParams& params, const StepContext& ctx);

}  // namespace mrv1
