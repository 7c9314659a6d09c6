// Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
#include "core/clock.h"
#include "state/output_ring.h"
#include "state/step_context.h"

namespace mrv1 {

void advance_cpu(const StepContext& ctx) {
  const ControlHeader& record = *ctx.rings.record();
  const InferParams& infer = ctx.infer;
  OutputHeader* slot = ctx.rings.output_slot();
  const auto* entries = record_array<BatchEntry>(&record, record.entries_offset);
  OutputEntry* out = output_entries(slot);
  int32_t* tokens = output_tokens(slot, infer.max_requests);
  for (int32_t i = 0; i < record.num_entries; ++i) {
    const int32_t start = infer.logits_start[infer.entry_batch[i]];
    out[i] = advance_row(ctx.rows, entries[i], start < 0 ? nullptr : infer.sampled + start,
                         tokens + int64_t{i} * (1 + ctx.rows.max_drafts));
  }
  slot->step = record.step;
  slot->num_entries = record.num_entries;
  slot->end_ns = clock_ns();
  *ctx.rings.step = record.step + 1;
  slot->sequence.store(record.step + 1, std::memory_order_release);
}

}  // namespace mrv1
