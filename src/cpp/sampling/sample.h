// Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
#pragma once

#include "core/portable.h"
#include "state/step_context.h"

namespace mrv1 {

// The token that takes the place of the one drawn for a position.
MRV1_HD int32_t forced_token(const RowState& state, int32_t row, const SamplingRow& sampling,
                             int32_t position, int32_t drawn) {
  if (position >= sampling.forced_end || drawn < 0) return drawn;
  return state.forced_tokens[int64_t{row} * state.max_model_len + position];
}

// Draws one token for every logits row whose batch position is live, and writes it to
// infer.sampled; padding and masked rows get kNoToken, rows whose logits hold nothing to draw (NaN,
// or all -inf) kErrorToken. Parameters come from the row's SamplingRow. The token of place j, for a
// row with drafts, is drawn as the row would draw it once j tokens longer: at that position, with
// the processors that then apply.
// Rows with num_logprobs get a LogprobRecord of the token that they take, at the place's
// output_logprobs() of the step's output slot; others write nothing there.
// The draw depends on the row's logits, history, parameters, seed and the position of the new token
// only: never on the batch, on padding or on the place in the batch. See sampling/processors.h for
// the order of processors and the exact rules.
struct SampleParams {
  float* logits;  // [logits rows, vocab] float32; may be overwritten
  int64_t vocab_size;
};

void sample_cpu(const SampleParams& params, const StepContext& ctx);
void sample_cuda(const SampleParams& params, const StepContext& ctx);

}  // namespace mrv1
