// Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
#pragma once

#include "ops/kv_cache.h"
#include "state/step_context.h"

namespace mrv1 {

// Writes the key and value heads of tokens into a paged cache (vLLM's reshape_and_cache_flash):
// token t goes to place slots[t] % block_size of block slots[t] / block_size; slot -1 writes
// nothing. A cache of the same dtype gets the same bits. An FP8 cache gets codes, and with kToken a
// scale for each token and head, as KvScales says; every backend the same bits. Slots are in
// [-1, slots of the cache), and none but -1 is named twice: the CPU checks the first, callers the
// second.
struct CacheWriteParams {
  const void* key;  // [tokens, num_kv_heads * head_dim] of dtype, key_stride elements apart
  const void* value;
  int64_t key_stride, value_stride;
  DType dtype;                // float32, bfloat16 or float16
  const KvCacheLayer* cache;  // of dtype, or FP8 with scales
  int32_t kv_group;           // whose slot mapping
  SlotMapping slots = {};     // [tokens], instead of the step's
};

void cache_write_cpu(const CacheWriteParams& params, const StepContext& ctx);
void cache_write_cuda(const CacheWriteParams& params, const StepContext& ctx);

// What is written into `cache` from heads of `dtype`; throws kInvalidArgument for what no writer
// takes.
void check_cache_write(std::string_view op, const KvCacheLayer& cache, const HeadShape& shape,
                       DType dtype);

// The slots that an op writes to: its own, or those of the step.
inline SlotMapping slots_of(const SlotMapping& own, int32_t kv_group, const StepContext& ctx) {
  if (own.data != nullptr) return own;
  return {ctx.infer.slot_mapping + int64_t{kv_group} * ctx.infer.max_tokens, false};
}

}  // namespace mrv1
