// Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
#include "core/error.h"
#include "core/thread_pool.h"
#include "ops/token_map.h"

namespace mrv1 {
namespace {

constexpr int64_t kTokensPerPiece = 1024;

}  // namespace

void token_map_cpu(const TokenMapParams& params, const StepContext& ctx) {
  check(params.slot_mapping == nullptr || (params.block_size > 0 && params.max_blocks > 0),
        "token_map", "block_size is ", params.block_size, " and max_blocks ", params.max_blocks,
        ", both must be positive");
  ctx.pool->parallel_for(params.num_tokens, kTokensPerPiece, [&](int64_t begin, int64_t end, int) {
    for (int64_t t = begin; t < end; ++t) map_token(params, static_cast<int32_t>(t));
  });
  if (params.row != nullptr) {
    for (int32_t b = 0; b < params.num_requests; ++b) {
      params.row[b] = params.seq_lens == nullptr || params.seq_lens[b] > 0 ? b : -1;
    }
  }
  if (params.counts != nullptr) {
    int32_t decodes = 0;
    while (decodes < params.num_requests &&
           params.query_start_loc[decodes + 1] - params.query_start_loc[decodes] <= 1) {
      ++decodes;
    }
    *params.counts = {.num_requests = params.num_requests,
                      .num_tokens = params.num_tokens,
                      .num_logits = 0,
                      .num_decodes = decodes,
                      .num_extends = params.num_requests - decodes,
                      .num_prefills = 0};
  }
}

}  // namespace mrv1
