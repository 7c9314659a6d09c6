// Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
#pragma once

#include "core/portable.h"
#include "state/output_ring.h"
#include "state/row_state.h"
#include "state/step_context.h"

namespace mrv1 {

// What a stage of a pipeline learns of a row from the last stage's output of a step: after it the
// row is as advance_row() has left it there, and the new tokens are in its history. A row that was
// freed since is left alone, and so is one that drew nothing: see advance_unfinished().
MRV1_HD void adopt_row(const RowState& state, const OutputEntry& entry, const int32_t* tokens) {
  Row row = state.rows[entry.row];
  const bool is_gone = row.generation != entry.generation || row.phase == RowPhase::kFree;
  const bool drew = entry.num_tokens > 0 || entry.finish_reason != FinishReason::kNone;
  if (entry.masked != 0 || is_gone || !drew) return;
  int32_t* history = state.tokens + int64_t{entry.row} * state.max_model_len;
  for (int32_t i = 0; i < entry.num_tokens; ++i) {
    history[entry.total_len - entry.num_tokens + i] = tokens[i];
  }
  if (entry.num_tokens > 0) row.last_token = tokens[entry.num_tokens - 1];
  row.num_computed = entry.num_computed;
  row.total_len = entry.total_len;
  row.finish_reason = entry.finish_reason;
  row.phase = entry.finish_reason == FinishReason::kNone ? RowPhase::kDecode : RowPhase::kFinished;
  state.rows[entry.row] = row;
}

// On stages before the last, first of all phases: takes in the outputs of all steps up to
// ControlHeader::adopt_through, in their order, waiting for those that have not come, and tells the
// last stage, which may use their slots again.
void adopt_cpu(const StepContext& ctx);
void adopt_cuda(const StepContext& ctx);

}  // namespace mrv1
