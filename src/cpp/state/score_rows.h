// Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>

#include "core/portable.h"
#include "state/infer_params.h"
#include "state/row_state.h"

namespace mrv1 {

struct StepContext;

// Rows [first_row, first_row + count) of a pass of the output head over a step's tokens: which
// tokens they stand for, and against which they are scored. They are those of one entry of the
// batch, from its token `first_token` on; the target of a token is the one after it in the row's
// history. With an entry of -1 they are padding.
struct ScoreRowsParams {
  int32_t entry;        // of the batch, in the host's order
  int32_t first_token;  // of the entry's tokens in this step
  int32_t first_row, count;
  int32_t* indices;  // [rows of the pass] token of the step; 0 for padding and masked rows
  int32_t* targets;  // [rows of the pass] token id; kNoToken for padding and masked rows
};

// Writes the i-th of the rows.
MRV1_HD void write_score_row(const ScoreRowsParams& params, const InferParams& infer,
                             const RowState& state, int32_t i) {
  const int32_t batch = params.entry < 0 ? -1 : infer.entry_batch[params.entry];
  const int32_t row = batch < 0 ? -1 : infer.row[batch];
  int32_t token = 0, target = kNoToken;
  if (row >= 0) {
    token = infer.query_start_loc[batch] + params.first_token + i;
    target = state.tokens[int64_t{row} * state.max_model_len + infer.positions[token] + 1];
  }
  params.indices[params.first_row + i] = token;
  params.targets[params.first_row + i] = target;
}

void score_rows_cpu(const ScoreRowsParams& params, const StepContext& ctx);
void score_rows_cuda(const ScoreRowsParams& params, const StepContext& ctx);

}  // namespace mrv1
