// Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
//
// A block a request.
#include "ops/ngram_propose.h"

#include "launch.h"
#include "ngram_search.cuh"

namespace mrv1 {
namespace {

constexpr int kThreads = 1024;

__global__ void __launch_bounds__(kThreads) ngram_propose_kernel(NgramProposeParams params) {
  cuda::launch_next();
  cuda::wait_for_previous();
  const int64_t b = blockIdx.x;
  const int32_t length = params.lengths[b];
  NgramMatch best = 0;
  if (length > 0 && most_drafts(params, b) > 0) {
    best = cuda::best_ngram_match<kThreads>(params.histories + b * params.history_stride, length,
                                            params.range);
  }
  if (threadIdx.x == 0) write_drafts(params, b, best);
}

}  // namespace

void ngram_propose_cuda(const NgramProposeParams& params, const StepContext& ctx) {
  if (params.num_requests == 0) return;
  cuda::launch("ngram_propose", ctx, ngram_propose_kernel,
               dim3(static_cast<unsigned>(params.num_requests)), dim3(kThreads), 0, params);
}

}  // namespace mrv1
