// Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
#pragma once

#include "ops/kv_cache.h"
#include "state/step_context.h"

namespace mrv1 {

// What stands between the QKV projection and attention, each part optional, always in this order:
// 1. QK-norm: each q and k head is RMS-normalised over head_dim and scaled by q_norm or k_norm.
// 2. RoPE (Su et al. 2021) on the first 2 * rope_pairs elements of q and k heads; the others pass
//    through. With c, s = cos, sin of the token's position, the two elements a, b of pair i become
//    a c[i] - b s[i] and b c[i] + a s[i]. They lie at i and i + rope_pairs (half-split, "rotate
//    half": HF Llama), or at 2 i and 2 i + 1 (interleaved: HF ERNIE 4.5).
// 3. Cache write (ops/cache_write.h) of k and v heads; slot -1 writes nothing.
// The unfused program runs one part at a time, the last one as an op of its own; the fused one runs
// all in one. All arithmetic in float32; a value is rounded to dtype after each part, so that fused
// and unfused agree bit for bit. What no part computes keeps its bits.
struct QkvPrepareParams {
  const void* qkv;  // [tokens, shape.qkv_cols()] of dtype
  void* out;        // the same shape; may be qkv
  HeadShape shape;
  DType dtype;          // float32 or bfloat16
  const float* q_norm;  // [head_dim] or null: no QK-norm
  const float* k_norm;  // [head_dim] or null
  float eps;
  const float* rope;   // [max_position, 2 * rope_pairs]: cosines, then sines; null: no RoPE
  int32_t rope_pairs;  // at most head_dim / 2
  bool interleaved;
  int64_t max_position;
  const KvCacheLayer* cache;  // null: no cache write; of dtype, or FP8 with scales
  int32_t kv_group;           // whose slot mapping
  SlotMapping slots = {};     // [tokens], instead of the step's
};

void qkv_prepare_cpu(const QkvPrepareParams& params, const StepContext& ctx);
void qkv_prepare_cuda(const QkvPrepareParams& params, const StepContext& ctx);

}  // namespace mrv1
