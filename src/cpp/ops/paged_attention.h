// Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
#pragma once

#include "ops/kv_cache.h"
#include "state/step_context.h"

namespace mrv1 {

// Causal attention of the step's tokens over the paged cache, the step's own keys and values
// included (they are written before). Query head h reads key/value head h / (heads / kv_heads).
// A token at position p of batch row b sees positions [max(0, p - window + 1), p]; window 0 means
// no limit. Blocks that lie wholly before what a row's tokens see may be replaced by the null
// block. A score is scale * q k; with a soft cap it becomes softcap * tanh(score / softcap) (Gemma
// 2). Softmax is in float32. On the CPU, and on a GPU if ctx.batch_invariant, positions are summed
// in fixed chunks in ascending order, so that a token's result does not depend on the batch or on
// how the prompt was cut into chunks; else how they are summed follows from the batch alone.
// Padding and masked tokens (token_batch -1) give zero rows.
//
// Elements of an FP8 cache are their codes times their scales (KvScales), also those that this step
// wrote: nothing reads a key or a value that was not rounded to the cache, so that a prompt in
// chunks gives what it gives as a whole.
//
// How the work is split over a GPU is decided by plan_attention, once for all layers that share a
// geometry, whatever KV groups they are in: on the device, from seq_lens, into fixed buffers, so
// that it is part of a captured step.
struct AttentionPlan {
  HeadShape shape;
  DType dtype = DType::kF32;
  DType cache_dtype = DType::kF32;  // of its layers: dtype, or FP8
  KvScaleKind cache_scales = KvScaleKind::kNone;
  int32_t window = 0;
  float softcap = 0.0f;
  int32_t first_group = 0, num_groups = 1;  // KV groups of its layers, one after the other
  int32_t max_requests = 0, max_tokens = 0;
  void* data = nullptr;  // device memory, attention_plan_bytes() long, zeros at first

  bool serves(const HeadShape& heads, int32_t of_window, float of_softcap) const {
    return shape.num_heads == heads.num_heads && shape.num_kv_heads == heads.num_kv_heads &&
           shape.head_dim == heads.head_dim && window == of_window && softcap == of_softcap;
  }
  bool has_group(int32_t group) const {
    return group >= first_group && group - first_group < num_groups;
  }
};

struct PagedAttentionParams {
  const void* qkv;  // [tokens, shape.qkv_cols()] of dtype; only q is read
  void* out;        // [tokens, shape.q_cols()] of dtype
  HeadShape shape;
  DType dtype;  // float32 or bfloat16; of single ops also float16
  float scale;  // of the scores, usually 1 / sqrt(head_dim)
  int32_t window;
  float softcap;              // 0: none
  const KvCacheLayer* cache;  // its dtype is dtype, or FP8 with scales
  int32_t kv_group;           // whose block table
  const AttentionPlan* plan;  // that serves this geometry; computed earlier in the same step
  int64_t q_stride = 0;       // elements from a token's q to the next one's; 0: shape.qkv_cols()
  // The launch right before is qkv_prepare's. On a GPU that lets the next one start only when all
  // before it has ended, so a kernel may read the plan while it still runs.
  bool follows_prepare = false;

  int64_t q_token_stride() const { return q_stride != 0 ? q_stride : shape.qkv_cols(); }
};

void paged_attention_cpu(const PagedAttentionParams& params, const StepContext& ctx);
void paged_attention_cuda(const PagedAttentionParams& params, const StepContext& ctx);

// Bytes of AttentionPlan::data: the work list and the partial results of split rows.
int64_t attention_plan_bytes_cuda(const AttentionPlan& plan, Device& device);
AttentionBackend decode_backend_cuda(const AttentionPlan& plan, const StepContext& ctx);
void plan_attention_cuda(const AttentionPlan& plan, const StepContext& ctx);

}  // namespace mrv1
