// Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
#pragma once

#include "ops/kv_cache.h"
#include "state/step_context.h"

namespace mrv1 {

// Causal attention of the step's tokens over the paged cache, the step's own keys and values
// included (they are written before). Query head h reads key/value head h / (heads / kv_heads).
// A token at position p of batch row b sees positions [max(0, p - window + 1), p]; window 0 means
// no limit. Softmax is online in float32 over positions in ascending order in fixed chunks, so that
// a token's result does not depend on the batch or on how the prompt was cut into chunks.
// Padding and masked tokens (token_batch -1) give zero rows.
struct PagedAttentionParams {
  const void* qkv;  // [tokens, shape.qkv_cols()] of dtype; only q is read
  void* out;        // [tokens, shape.q_cols()] of dtype
  HeadShape shape;
  DType dtype;
  float scale;  // of the scores, usually 1 / sqrt(head_dim)
  int32_t window;
  const KvCacheLayer* cache;  // cache dtype equals dtype
  int32_t kv_group;           // whose block table
};

void paged_attention_cpu(const PagedAttentionParams& params, const StepContext& ctx);
void paged_attention_cuda(const PagedAttentionParams& params, const StepContext& ctx);

}  // namespace mrv1
