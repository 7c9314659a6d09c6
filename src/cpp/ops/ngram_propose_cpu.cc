// Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
#include "ops/ngram_propose.h"

#include "core/thread_pool.h"

namespace mrv1 {

void ngram_propose_cpu(const NgramProposeParams& params, const StepContext& ctx) {
  ctx.pool->parallel_for(params.num_requests, 1, [&](int64_t begin, int64_t end, int) {
    for (int64_t b = begin; b < end; ++b) {
      NgramMatch best = 0;
      if (most_drafts(params, b) > 0) {
        best = best_ngram_match(params.histories + b * params.history_stride, params.lengths[b],
                                params.range);
      }
      write_drafts(params, b, best);
    }
  });
}

}  // namespace mrv1
