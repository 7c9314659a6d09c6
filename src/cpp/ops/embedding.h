// Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
#pragma once

#include "ops/weight_view.h"
#include "state/step_context.h"

namespace mrv1 {

// out[t] = scale * table[token_ids[t] - first_row] for the step's tokens, token_ids from the step's
// infer_params. The product is made in float32 and rounded to dtype. Ids without a row in the table
// give zeros: those of other ranks' rows, and padding, as admission has refused all others.
struct EmbeddingParams {
  WeightView table;  // [vocab, cols], any layout: a tied embedding is gathered from the packed copy
  void* out;         // [tokens, cols] of `dtype`
  DType dtype;
  float scale;        // 1 leaves rows as they are
  int64_t first_row;  // token id of the table's first row
};

void embedding_cpu(const EmbeddingParams& params, const StepContext& ctx);
void embedding_cuda(const EmbeddingParams& params, const StepContext& ctx);

}  // namespace mrv1
