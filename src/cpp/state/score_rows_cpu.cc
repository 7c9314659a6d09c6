// Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
#include "state/score_rows.h"

#include "state/step_context.h"

namespace mrv1 {

void score_rows_cpu(const ScoreRowsParams& params, const StepContext& ctx) {
  for (int32_t i = 0; i < params.count; ++i) {
    write_score_row(params, ctx.infer, ctx.rows, i);
  }
}

}  // namespace mrv1
