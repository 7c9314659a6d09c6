// Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
#pragma once

#include "core/portable.h"
#include "state/step_context.h"

namespace mrv1 {

// What infer_params works out for a runner's step, for callers of single ops who have no rows:
// which request a token belongs to, where it stands in it, and the slot of its key and value.
// Request b owns the tokens [query_start_loc[b], query_start_loc[b + 1]), the last ones of the
// seq_lens[b] that it has; so token t stands at seq_lens[b] - query_start_loc[b + 1] + t. Slots are
// those of token_slot(), state/infer_params.h; -1 means: no write. Tokens of no request, of a
// request with seq_len 0 and those that would stand before position 0 are masked: token_batch -1,
// position 0, slot -1. A position beyond the block table has slot -1.
struct TokenMapParams {
  int32_t num_requests, num_tokens;
  const int32_t* query_start_loc;  // [num_requests + 1], non-decreasing, first 0
  const int32_t* seq_lens;         // [num_requests]; null: positions are given
  int32_t* positions;              // [num_tokens], written unless they are given
  int32_t* token_batch;            // [num_tokens] or null
  int32_t* row;  // [num_requests] or null: the request's own index, -1 where seq_len is 0
  // Or null; num_decodes counts the requests with at most one token before the first with more.
  InferCounts* counts;
  int32_t* slot_mapping;       // [num_tokens] or null
  const int32_t* block_table;  // [num_requests, max_blocks], with slot_mapping
  int32_t max_blocks, block_size;
};

// The request of a token, -1 for none.
MRV1_HD int32_t token_request(const TokenMapParams& params, int32_t token) {
  if (params.num_requests == 0 || token >= params.query_start_loc[params.num_requests]) return -1;
  int32_t low = 0;
  for (int32_t count = params.num_requests; count > 1;) {
    const int32_t half = count / 2;
    if (params.query_start_loc[low + half] <= token) low += half;
    count -= half;
  }
  return low;
}

MRV1_HD void map_token(const TokenMapParams& params, int32_t token) {
  int32_t batch = token_request(params, token);
  int32_t position = 0;
  if (batch >= 0) {
    position = params.seq_lens == nullptr
                   ? params.positions[token]
                   : params.seq_lens[batch] - params.query_start_loc[batch + 1] + token;
    if (position < 0 || (params.seq_lens != nullptr && params.seq_lens[batch] <= 0)) {
      batch = -1;
      position = 0;
    }
  }
  if (params.seq_lens != nullptr) params.positions[token] = position;
  if (params.token_batch != nullptr) params.token_batch[token] = batch;
  if (params.slot_mapping == nullptr) return;
  const int32_t place = position / params.block_size;
  int32_t block = 0;
  if (batch >= 0 && place < params.max_blocks) {
    block = params.block_table[int64_t{batch} * params.max_blocks + place];
  }
  params.slot_mapping[token] =
      block <= 0 ? -1 : block * params.block_size + position % params.block_size;
}

void token_map_cpu(const TokenMapParams& params, const StepContext& ctx);
void token_map_cuda(const TokenMapParams& params, const StepContext& ctx);

}  // namespace mrv1
