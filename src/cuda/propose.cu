// Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
//
// A block a row.
#include "state/propose.h"

#include "launch.h"
#include "ngram_search.cuh"
#include "staged_record.h"

namespace mrv1 {
namespace {

constexpr std::string_view kOp = "propose";
constexpr int kThreads = 1024;

__global__ void __launch_bounds__(kThreads)
    propose_kernel(const cuda::StagedRecord* staged, RowState state) {
  cuda::launch_next();
  cuda::wait_for_previous();
  const int32_t index = static_cast<int32_t>(blockIdx.x);
  if (index >= staged->header.num_entries) return;
  const int4 words = reinterpret_cast<const int4*>(cuda::staged_entries(staged))[index];
  const BatchEntry entry{words.x, words.y, words.z, words.w};
  if (entry.samples <= 1) return;
  const Row row = state.rows[entry.row];
  if (!takes_drafts(entry, row)) return;
  int32_t* history = state.tokens + int64_t{entry.row} * state.max_model_len;
  const int32_t length = row.total_len;
  const int32_t most = most_drafts(entry, row, state.sampling[entry.row]);
  NgramMatch best = 0;
  if (most > 0) best = cuda::best_ngram_match<kThreads>(history, length, state.ngram);
  if (threadIdx.x == 0) {
    state.rows[entry.row].num_drafts = copy_drafts(history, length, best, most, history + length);
  }
}

}  // namespace

void propose_cuda(const StepContext& ctx) {
  const auto* staged = reinterpret_cast<const cuda::StagedRecord*>(ctx.rings.staged);
  cuda::launch(kOp, ctx, propose_kernel, ctx.sizes.num_requests, kThreads, 0, staged, ctx.rows);
}

}  // namespace mrv1
