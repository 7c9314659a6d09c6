// Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
#pragma once

#include "dist/expert_link.h"
#include "state/step_context.h"

namespace mrv1 {

// What a rank's tokens have to bring back in a step, in pieces of 16 bytes of a row's sums.
constexpr int64_t kMaxCombinedPieces = (int64_t{1} << 30) - 1;
// Of a token.
constexpr int64_t combined_pieces(int64_t hidden, DType sum_dtype) {
  return (hidden * static_cast<int64_t>(dtype_size(sum_dtype)) + 15) / 16;
}

// Brings what ranks have computed of each other's tokens back, one row for each token and rank that
// had it, and adds up: out[t] is the sum over the ranks that token t was sent to, in the order of
// sum_in_order (ops/all_reduce.h; ranks without it add nothing), in float32 and rounded once; zeros
// where it was sent to none. Follows the moe_dispatch that brought the tokens.
struct MoeCombineParams {
  const void* partial;     // [ranks, region_rows, hidden] of sum_dtype: of what has come, the sums
  const int32_t* places;   // [tokens, ranks], as moe_dispatch has left them
  void* out;               // [tokens, hidden] of dtype
  ExpertBuffers received;  // as MoeDispatchParams has it
};

void moe_combine_cpu(const MoeCombineParams& params, const StepContext& ctx);
void moe_combine_cuda(const MoeCombineParams& params, const StepContext& ctx);

}  // namespace mrv1
