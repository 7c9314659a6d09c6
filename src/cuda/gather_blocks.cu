// Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
//
// A thread block takes some tokens of keys or of values; neighbouring threads write neighbouring
// pieces of a row.
#include <algorithm>
#include <type_traits>

#include "launch.h"
#include "ops/gather_blocks.h"

namespace mrv1 {
namespace {

constexpr int kThreads = 256;
constexpr int kPiece = 4;  // elements that a thread takes at a time
constexpr int64_t kMaxGrid = 65536;

template <typename Code, typename Out>
__global__ void __launch_bounds__(kThreads)
    gather_blocks_kernel(const __grid_constant__ KvCacheLayer cache,
                         const __grid_constant__ GatherBlocksParams params) {
  cuda::launch_next();
  cuda::wait_for_previous();
  const bool is_key = blockIdx.y == 0;
  const auto* side = static_cast<const Code*>(is_key ? cache.key : cache.value);
  const float* scales = is_key ? cache.scales.key : cache.scales.value;
  const int32_t row = cache.num_kv_heads * cache.head_dim;
  for (int64_t token = blockIdx.x; token < params.num_tokens; token += gridDim.x) {
    const int64_t block = params.block_ids[token / cache.block_size];
    const int64_t place = token % cache.block_size;
    auto* to = static_cast<Out*>(is_key ? params.key : params.value) + token * row;
    for (int32_t first = threadIdx.x * kPiece; first < row; first += kThreads * kPiece) {
      const int32_t head = first / cache.head_dim;
      const Code* from = side + block * cache.block_stride + place * cache.token_stride +
                         head * cache.head_stride + (first - head * cache.head_dim);
      float scale = 1.0f;
      if (cache.scales.kind != KvScaleKind::kNone) {
        scale = scales[cache.scales.index(block, place, head)];
      }
#pragma unroll
      for (int i = 0; i < kPiece; ++i) {
        if constexpr (std::is_same_v<Code, Out>) {
          to[first + i] = from[i];
        } else {
          to[first + i] = from_float<Out>(to_float(from[i]) * scale);
        }
      }
    }
  }
}

}  // namespace

void gather_blocks_cuda(const GatherBlocksParams& params, const StepContext& ctx) {
  constexpr std::string_view kOp = "gather_blocks";
  if (params.num_tokens == 0) return;
  const dim3 grid(static_cast<unsigned>(std::min(params.num_tokens, kMaxGrid)), 2);
  const auto gather = [&](auto code, auto out) {
    cuda::launch(kOp, ctx,
                 gather_blocks_kernel<typename decltype(code)::type, typename decltype(out)::type>,
                 grid, dim3(kThreads), 0, *params.cache, params);
  };
  dispatch_float(params.dtype, kOp, [&](auto out) {
    if (is_float8(params.cache->dtype)) {
      dispatch_cache(params.cache->dtype, kOp, [&](auto code) { gather(code, out); });
    } else {
      dispatch_float(params.cache->dtype, kOp, [&](auto code) { gather(code, out); });
    }
  });
}

}  // namespace mrv1
