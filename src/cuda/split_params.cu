// Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
//
// A batch position of one half a thread; blockIdx.y is the half.
#include "launch.h"
#include "state/split_params.h"

namespace mrv1 {
namespace {

constexpr std::string_view kOp = "split_params";
constexpr int kThreads = 256;

__global__ void __launch_bounds__(kThreads)
    split_params_kernel(const __grid_constant__ InferParams whole,
                        const __grid_constant__ SplitParams params, StepSizes sizes) {
  cuda::launch_next();
  cuda::wait_for_previous();
  const bool second = blockIdx.y == 1;
  const InferParams& half = second ? params.second : params.first;
  const int32_t first = second ? params.cut : 0;
  const int32_t last = second ? sizes.num_tokens : params.cut;
  const auto batch = static_cast<int32_t>(blockIdx.x * kThreads + threadIdx.x);
  if (batch == 0) {
    *half.counts = half_counts(*whole.counts, first, last);
    half.query_start_loc[0] = 0;
  }
  if (batch >= sizes.num_requests) return;
  const int32_t begin = whole.query_start_loc[batch], end = whole.query_start_loc[batch + 1];
  const HalfRow row = half_row(whole.row[batch], whole.seq_lens[batch], begin, end, first, last);
  half.row[batch] = row.row;
  half.seq_lens[batch] = row.seq_len;
  half.query_start_loc[batch + 1] = half_token(end, first, last);
}

}  // namespace

void split_params_cuda(const SplitParams& params, const StepContext& ctx) {
  const StepSizes& sizes = ctx.sizes;
  check_internal(params.cut > 0 && params.cut < sizes.num_tokens, kOp, "no cut of ",
                 sizes.num_tokens, " tokens at ", params.cut);
  const auto blocks = static_cast<unsigned>((sizes.num_requests + kThreads - 1) / kThreads);
  cuda::launch(kOp, ctx, split_params_kernel, dim3(blocks, 2), dim3(kThreads), 0, ctx.infer, params,
               sizes);
}

}  // namespace mrv1
