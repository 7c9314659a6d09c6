// Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
//
// A block a row: its threads look at one place of the history each, most of which differ from the
// row's last token, and the best occurrence is the largest number.
#include "state/propose.h"

#include "block.cuh"
#include "launch.h"
#include "staged_record.h"

namespace mrv1 {
namespace {

constexpr std::string_view kOp = "propose";
constexpr int kThreads = 1024;
// Places that a thread asks for before it looks at the first.
constexpr int kAtOnce = 8;

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
  if (most > 0) {
    const int32_t last = history[length - 1];
    for (int32_t first = 1 + static_cast<int32_t>(threadIdx.x); first < length;
         first += kThreads * kAtOnce) {
      int32_t before[kAtOnce];
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
        const int32_t end = first + i * kThreads;
        before[i] = end < length ? history[end - 1] : kNoToken;
      }
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
        if (before[i] != last) continue;
        best = max(best, ngram_match_at(history, length, first + i * kThreads, state.ngram));
      }
    }
    best = cuda::block_max<kThreads>(best);
  }
  if (threadIdx.x == 0) {
    state.rows[entry.row].num_drafts = copy_drafts(history, length, best, most);
  }
}

}  // namespace

void propose_cuda(const StepContext& ctx) {
  const auto* staged = reinterpret_cast<const cuda::StagedRecord*>(ctx.rings.staged);
  cuda::launch(kOp, ctx, propose_kernel, ctx.sizes.num_requests, kThreads, 0, staged, ctx.rows);
}

}  // namespace mrv1
