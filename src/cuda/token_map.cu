// Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
//
// A thread takes a token and finds its request by binary search; the first block also writes what
// there is one of a request, and counts.
#include "launch.h"
#include "ops/token_map.h"

namespace mrv1 {
namespace {

constexpr std::string_view kOp = "token_map";
constexpr int kThreads = 256;

__global__ void __launch_bounds__(kThreads) token_map_kernel(TokenMapParams params) {
  __shared__ int32_t first_long;  // first request with more than one token
  cuda::launch_next();
  cuda::wait_for_previous();
  const int32_t token = blockIdx.x * kThreads + threadIdx.x;
  if (token < params.num_tokens) map_token(params, token);
  if (blockIdx.x > 0) return;
  const int32_t thread = static_cast<int32_t>(threadIdx.x);
  if (params.row != nullptr) {
    for (int32_t b = thread; b < params.num_requests; b += kThreads) {
      params.row[b] = params.seq_lens == nullptr || params.seq_lens[b] > 0 ? b : -1;
    }
  }
  if (params.counts == nullptr) return;
  if (thread == 0) first_long = params.num_requests;
  __syncthreads();
  for (int32_t b = thread; b < params.num_requests; b += kThreads) {
    if (params.query_start_loc[b + 1] - params.query_start_loc[b] > 1) atomicMin(&first_long, b);
  }
  __syncthreads();
  if (thread == 0) {
    *params.counts = {
        params.num_requests, params.num_tokens, 0, first_long, params.num_requests - first_long, 0};
  }
}

}  // namespace

void token_map_cuda(const TokenMapParams& params, const StepContext& ctx) {
  check(params.slot_mapping == nullptr || (params.block_size > 0 && params.max_blocks > 0), kOp,
        "block_size is ", params.block_size, " and max_blocks ", params.max_blocks,
        "; both must be positive");
  const bool whole = params.row != nullptr || params.counts != nullptr;
  if (params.num_tokens == 0 && !whole) return;
  const int32_t blocks = (params.num_tokens + kThreads - 1) / kThreads;
  cuda::launch(kOp, ctx, token_map_kernel, dim3(blocks > 0 ? blocks : 1), dim3(kThreads), 0,
               params);
}

}  // namespace mrv1
