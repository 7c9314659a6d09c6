// Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>

#include "core/portable.h"
#include "state/control_record.h"
#include "state/row_state.h"

namespace mrv1 {

struct StepContext;

struct InferCounts {
  int32_t num_requests;  // entries of the batch, masked ones included
  int32_t num_tokens;
  int32_t num_logits;
  int32_t num_decodes, num_extends, num_prefills;  // they add up to num_requests
};

// What the program and the sampler read about a batch: device addresses, written in place every
// step by infer_params(). B = padded requests, T = padded tokens, L = padded logits rows.
// Batch order: decode rows (finished ones among them), then extend, then prefill; stable inside.
// A decode row has its last token and its drafts, as many as were proposed; the places that the
// host kept for more of them are padding, which all stands at the end.
// Padding: row -1, seq_len 0, slots -1, token id 0, position 0, query_start_loc stays at
// num_tokens. A masked row keeps its place in the batch and looks like padding otherwise.
struct InferParams {
  InferCounts* counts;
  int32_t* row;              // [B] batch position -> row, -1 for padding and masked rows
  int32_t* query_start_loc;  // [B + 1] non-decreasing
  int32_t* seq_lens;         // [B] context + query tokens; 0 for padding and masked rows
  int32_t* token_batch;      // [T] token -> batch position, -1 for padding and masked rows
  int32_t* token_ids;        // [T]
  int32_t* positions;        // [T]
  int32_t* slot_mapping;     // [num_groups, max_tokens] block * block_size + offset, -1 = no write
  int32_t* logits_indices;   // [L] logits row -> token; 0 for padding
  int32_t* logits_batch;     // [L] logits row -> batch position, -1 for padding and masked rows
  int32_t* logits_place;     // [L] logits row -> which of its batch position's, from 0; 0 if none
  int32_t* logits_entry;     // [L] logits row -> host's entry, -1 for padding
  int32_t* logits_start;     // [B] batch position -> its first logits row, -1 for none
  int32_t* entry_batch;      // [B] host's entry -> batch position
  int32_t* sampled;          // [L] token drawn from the logits row, -1 for none; by sample()
  // [3, R] new prefill tokens, tokens in the cache, tokens of this step by table row, zero for rows
  // outside the batch: the inputs of infer_param_view. Null unless the runner was asked for it.
  int32_t* row_lengths;
  int32_t max_requests, max_tokens, max_logits;  // capacities
};

// Class of an entry for the batch order: 0 decode, 1 extend, 2 prefill.
MRV1_HD int32_t batch_class(const Row& row) {
  return row.phase == RowPhase::kPrefill ? 2 : row.phase == RowPhase::kExtend ? 1 : 0;
}

// True if the entry computes nothing: its row stopped, or was freed and given to another request.
MRV1_HD bool is_masked(const BatchEntry& entry, const Row& row) {
  return row.generation != entry.generation || row.phase == RowPhase::kFinished ||
         row.phase == RowPhase::kFree;
}

// Tokens of an entry that the step computes, and logits rows that it has. A masked row has no
// drafts.
MRV1_HD int32_t live_tokens(const BatchEntry& entry, int32_t num_drafts) {
  return entry.samples > 1 ? 1 + num_drafts : entry.num_tokens;
}
MRV1_HD int32_t live_samples(const BatchEntry& entry, int32_t num_drafts) {
  return entry.samples > 1 ? 1 + num_drafts : entry.samples;
}

// slot = block_table[row][position / block_size] * block_size + position % block_size.
// Block 0 is the null block: no request may write there, so an unset entry gives -1.
MRV1_HD int32_t token_slot(const RowState& state, int32_t group, int32_t row, int32_t position) {
  const int64_t table = (int64_t{group} * state.num_rows + row) * state.max_blocks;
  const int32_t block = state.block_table[table + position / state.block_size];
  return block == 0 ? -1 : block * state.block_size + position % state.block_size;
}

// Carries out the commands of the step's record: frees, new rows, token, block and stop-id writes.
void apply_cpu(const StepContext& ctx);
void apply_cuda(const StepContext& ctx);

// Fills ctx.infer from the record's batch and the row state. Sizes are those of the context: they
// equal the record's padded sizes.
void infer_params_cpu(const StepContext& ctx);
void infer_params_cuda(const StepContext& ctx);

}  // namespace mrv1
