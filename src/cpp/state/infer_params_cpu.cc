// Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
#include <algorithm>

#include "state/infer_params.h"
#include "state/step_context.h"

namespace mrv1 {

void infer_params_cpu(const StepContext& ctx) {
  const ControlHeader& record = *ctx.rings.record();
  const RowState& state = ctx.rows;
  const InferParams& out = ctx.infer;
  const auto* entries = record_array<BatchEntry>(&record, record.entries_offset);
  int32_t class_count[3] = {0, 0, 0};
  for (int32_t i = 0; i < record.num_entries; ++i) {
    ++class_count[batch_class(state.rows[entries[i].row])];
  }

  // Stable counting sort by class: entry -> batch position.
  int32_t next[3] = {0, class_count[0], class_count[0] + class_count[1]};
  for (int32_t i = 0; i < record.num_entries; ++i) {
    const int32_t batch = next[batch_class(state.rows[entries[i].row])]++;
    out.entry_batch[i] = batch;
    out.row[batch] = i;  // the entry for now
  }

  if (out.row_lengths != nullptr) {
    std::fill_n(out.row_lengths, int64_t{3} * state.num_rows, 0);
  }
  int32_t token = 0;
  int32_t logits = 0;
  out.query_start_loc[0] = 0;
  for (int32_t batch = 0; batch < record.num_entries; ++batch) {
    const int32_t index = out.row[batch];
    const BatchEntry& entry = entries[index];
    const Row& row = state.rows[entry.row];
    const bool masked = is_masked(entry, row);
    const int32_t context = masked ? 0 : row.num_computed;
    const int32_t num_tokens = live_tokens(entry, masked ? 0 : row.num_drafts);
    const int32_t num_samples = live_samples(entry, masked ? 0 : row.num_drafts);
    out.row[batch] = masked ? -1 : entry.row;
    out.seq_lens[batch] = masked ? 0 : context + num_tokens;
    if (out.row_lengths != nullptr && !masked) {
      out.row_lengths[entry.row] = batch_class(row) == 0 ? 0 : num_tokens;
      out.row_lengths[state.num_rows + entry.row] = context;
      out.row_lengths[2 * state.num_rows + entry.row] = num_tokens;
    }
    const int32_t* history = state.tokens + int64_t{entry.row} * state.max_model_len;
    for (int32_t i = 0; i < num_tokens; ++i, ++token) {
      const int32_t position = context + i;
      out.token_batch[token] = masked ? -1 : batch;
      out.token_ids[token] = masked ? 0 : history[position];
      out.positions[token] = masked ? 0 : position;
      for (int32_t group = 0; group < state.num_groups; ++group) {
        out.slot_mapping[int64_t{group} * out.max_tokens + token] =
            masked ? -1 : token_slot(state, group, entry.row, position);
      }
    }
    out.query_start_loc[batch + 1] = token;
    out.logits_start[batch] = num_samples > 0 ? logits : -1;
    for (int32_t place = 0; place < num_samples; ++place, ++logits) {
      out.logits_indices[logits] = token - num_samples + place;
      out.logits_batch[logits] = masked ? -1 : batch;
      out.logits_place[logits] = place;
      out.logits_entry[logits] = index;
    }
  }
  *out.counts = {record.num_entries, token, logits, class_count[0], class_count[1], class_count[2]};

  for (int32_t batch = record.num_entries; batch < ctx.sizes.num_requests; ++batch) {
    out.row[batch] = -1;
    out.seq_lens[batch] = 0;
    out.logits_start[batch] = -1;
    out.query_start_loc[batch + 1] = token;
  }
  for (int32_t i = token; i < ctx.sizes.num_tokens; ++i) {
    out.token_batch[i] = -1;
    out.token_ids[i] = 0;
    out.positions[i] = 0;
    for (int32_t group = 0; group < state.num_groups; ++group) {
      out.slot_mapping[int64_t{group} * out.max_tokens + i] = -1;
    }
  }
  for (int32_t i = logits; i < ctx.sizes.num_logits; ++i) {
    out.logits_indices[i] = 0;
    out.logits_batch[i] = -1;
    out.logits_place[i] = 0;
    out.logits_entry[i] = -1;
  }
}

}  // namespace mrv1
