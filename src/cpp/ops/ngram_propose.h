// Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
#pragma once

#include "core/portable.h"
#include "state/propose.h"
#include "state/step_context.h"

namespace mrv1 {

// Prompt lookup on plain arrays, for callers of single ops: by the rules of state/propose.h, what
// followed the last tokens of a history when they occurred before. Row b of the histories holds
// lengths[b] tokens; at most min(max_drafts, limits[b]) are proposed. drafts[b] has them, then -1.
struct NgramProposeParams {
  int32_t num_requests;
  const int32_t* histories;  // [num_requests, >= lengths], rows `history_stride` apart
  int64_t history_stride;
  const int32_t* lengths;  // [num_requests], not negative
  const int32_t* limits;   // [num_requests], not negative, or null
  int32_t max_drafts;
  NgramRange range;
  int32_t* drafts;      // [num_requests, max_drafts]
  int32_t* num_drafts;  // [num_requests]
};

MRV1_HD int32_t most_drafts(const NgramProposeParams& params, int64_t b) {
  const int32_t limit = params.limits != nullptr ? params.limits[b] : params.max_drafts;
  return limit < params.max_drafts ? limit : params.max_drafts;
}

// Writes what is proposed for request b, given the best occurrence.
MRV1_HD void write_drafts(const NgramProposeParams& params, int64_t b, NgramMatch best) {
  int32_t* drafts = params.drafts + b * params.max_drafts;
  const int32_t count = copy_drafts(params.histories + b * params.history_stride, params.lengths[b],
                                    best, most_drafts(params, b), drafts);
  for (int32_t i = count; i < params.max_drafts; ++i) drafts[i] = kNoToken;
  params.num_drafts[b] = count;
}

void ngram_propose_cpu(const NgramProposeParams& params, const StepContext& ctx);
void ngram_propose_cuda(const NgramProposeParams& params, const StepContext& ctx);

}  // namespace mrv1
