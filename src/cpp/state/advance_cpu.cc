// Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
#include "state/output_ring.h"
#include "state/step_context.h"

namespace mrv1 {

void advance_cpu(const ControlHeader& record, const RowState& state, const InferParams& infer,
                 OutputHeader* slot, const StepContext&) {
  const auto* entries = record_array<BatchEntry>(&record, record.entries_offset);
  OutputEntry* out = output_entries(slot);
  for (int32_t i = 0; i < record.num_entries; ++i) {
    const int32_t batch = infer.entry_batch[i];
    out[i] = advance_row(state, entries[i], entries[i].num_tokens, infer.sampled[batch]);
  }
  slot->step = record.step;
  slot->num_entries = record.num_entries;
  slot->sequence.store(record.step + 1, std::memory_order_release);
}

}  // namespace mrv1
