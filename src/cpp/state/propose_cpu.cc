// Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
#include "state/propose.h"

#include "core/thread_pool.h"
#include "state/step_context.h"

namespace mrv1 {

void propose_cpu(const StepContext& ctx) {
  const ControlHeader& record = *ctx.rings.record();
  const RowState& state = ctx.rows;
  const auto* entries = record_array<BatchEntry>(&record, record.entries_offset);
  ctx.pool->parallel_for(record.num_entries, 1, [&](int64_t begin, int64_t end, int) {
    for (int64_t i = begin; i < end; ++i) {
      const BatchEntry& entry = entries[i];
      Row& row = state.rows[entry.row];
      if (!takes_drafts(entry, row)) continue;
      int32_t* history = state.tokens + int64_t{entry.row} * state.max_model_len;
      const int32_t most = most_drafts(entry, row, state.sampling[entry.row]);
      NgramMatch best = 0;
      if (most > 0) best = best_ngram_match(history, row.total_len, state.ngram);
      row.num_drafts = copy_drafts(history, row.total_len, best, most, history + row.total_len);
    }
  });
}

}  // namespace mrv1
