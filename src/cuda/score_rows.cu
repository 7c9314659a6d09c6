// Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
//
// A thread a row.
#include "state/score_rows.h"

#include "launch.h"

namespace mrv1 {
namespace {

constexpr std::string_view kOp = "score_rows";
constexpr int kThreads = 128;

__global__ void __launch_bounds__(kThreads)
    score_rows_kernel(ScoreRowsParams params, InferParams infer, RowState state) {
  cuda::launch_next();
  cuda::wait_for_previous();
  const auto i = static_cast<int32_t>(blockIdx.x * kThreads + threadIdx.x);
  if (i < params.count) write_score_row(params, infer, state, i);
}

}  // namespace

void score_rows_cuda(const ScoreRowsParams& params, const StepContext& ctx) {
  if (params.count == 0) return;
  cuda::launch(kOp, ctx, score_rows_kernel, (params.count + kThreads - 1) / kThreads, kThreads, 0,
               params, ctx.infer, ctx.rows);
}

}  // namespace mrv1
