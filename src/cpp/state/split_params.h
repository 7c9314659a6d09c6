// Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>

#include "core/portable.h"
#include "state/infer_params.h"

namespace mrv1 {

struct StepContext;

// Derives from the infer_params of a step those of its tokens before `cut` and of those from it on,
// for two-batch overlap (runner/two_batch.h). Batch positions are those of the whole step in both
// halves: a position without tokens in a half looks masked there, and one that has some in both is
// as long in the first as its tokens there reach. Written are counts, without logits rows, and the
// arrays [B] and [B + 1]; arrays of tokens are the step's own, the second half's `cut` further on.
struct SplitParams {
  InferParams first, second;
  int32_t cut = 0;  // in (0, padded tokens)
};

// What one half has of a batch position whose tokens are [begin, end) of the step's.
struct HalfRow {
  int32_t row, seq_len;
};

// `first` and `last`: the half's tokens, of the step's.
MRV1_HD HalfRow half_row(int32_t row, int32_t seq_len, int32_t begin, int32_t end, int32_t first,
                         int32_t last) {
  if (row < 0 || begin >= last || end <= first || begin == end) return {-1, 0};
  return {row, end > last ? seq_len - (end - last) : seq_len};
}

// Where a position of the step's tokens lies in the half.
MRV1_HD int32_t half_token(int32_t token, int32_t first, int32_t last) {
  return (token < first ? first : token > last ? last : token) - first;
}

// The counts of the half whose tokens are [first, last) of the step's.
MRV1_HD InferCounts half_counts(InferCounts whole, int32_t first, int32_t last) {
  whole.num_tokens = half_token(whole.num_tokens, first, last);
  whole.num_logits = 0;
  return whole;
}

void split_params_cpu(const SplitParams& params, const StepContext& ctx);
void split_params_cuda(const SplitParams& params, const StepContext& ctx);

}  // namespace mrv1
