// Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
#include "ops/gather_blocks.h"

#include <type_traits>

#include "core/thread_pool.h"
#include "state/step_context.h"

namespace mrv1 {
namespace {

constexpr int64_t kTokensPerPiece = 16;

template <typename Code, typename Out>
void gather_token(const GatherBlocksParams& params, const void* side, const float* scales,
                  int64_t token, void* out) {
  const KvCacheLayer& cache = *params.cache;
  const int64_t block = params.block_ids[token / cache.block_size];
  const int64_t place = token % cache.block_size;
  Out* to = static_cast<Out*>(out) + token * cache.num_kv_heads * cache.head_dim;
  for (int64_t head = 0; head < cache.num_kv_heads; ++head, to += cache.head_dim) {
    const Code* from = static_cast<const Code*>(side) + block * cache.block_stride +
                       place * cache.token_stride + head * cache.head_stride;
    const float scale = scales == nullptr ? 1.0f : scales[cache.scales.index(block, place, head)];
    for (int32_t i = 0; i < cache.head_dim; ++i) {
      if constexpr (std::is_same_v<Code, Out>) {
        to[i] = from[i];
      } else {
        to[i] = from_float<Out>(to_float(from[i]) * scale);
      }
    }
  }
}

}  // namespace

void gather_blocks_cpu(const GatherBlocksParams& params, const StepContext& ctx) {
  constexpr std::string_view kOp = "gather_blocks";
  const KvCacheLayer& cache = *params.cache;
  const bool scaled = cache.scales.kind != KvScaleKind::kNone;
  const auto gather = [&](auto code, auto out) {
    using Code = typename decltype(code)::type;
    using Out = typename decltype(out)::type;
    ctx.pool->parallel_for(
        params.num_tokens, kTokensPerPiece, [&](int64_t begin, int64_t end, int) {
          for (int64_t token = begin; token < end; ++token) {
            gather_token<Code, Out>(params, cache.key, scaled ? cache.scales.key : nullptr, token,
                                    params.key);
            gather_token<Code, Out>(params, cache.value, scaled ? cache.scales.value : nullptr,
                                    token, params.value);
          }
        });
  };
  dispatch_float(params.dtype, kOp, [&](auto out) {
    if (is_float8(cache.dtype)) {
      dispatch_cache(cache.dtype, kOp, [&](auto code) { gather(code, out); });
    } else {
      dispatch_float(cache.dtype, kOp, [&](auto code) { gather(code, out); });
    }
  });
}

}  // namespace mrv1
