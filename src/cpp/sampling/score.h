// Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>

#include "sampling/logprobs.h"

namespace mrv1 {

struct StepContext;

// The logprobs of given tokens, as sample() reports them of drawn ones: for prompts. Logits are
// taken as they are, without masks or edits.
struct ScoreParams {
  const float* logits;  // [num_rows, vocab_size] float32
  int64_t num_rows;
  int64_t vocab_size;      // 1 to kMaxSampledVocab
  const int32_t* targets;  // [num_rows] token ids; -1: nothing is written for the row
  int32_t num_logprobs;    // candidates of each token; more than the vocabulary are its size
  int32_t max_logprobs;    // of which `records` has room, at least num_logprobs
  LogprobRecord* records;  // [num_rows], logprob_record_bytes(max_logprobs) apart
};

// Needs the workspace of sample() for as many logits rows.
void score_cpu(const ScoreParams& params, const StepContext& ctx);
void score_cuda(const ScoreParams& params, const StepContext& ctx);

}  // namespace mrv1
