// Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>
#include <string_view>

#include "ops/kv_cache.h"

namespace mrv1 {

struct StepContext;

// Keys and values of blocks as contiguous rows, [num_tokens, kv heads, head_dim] of `dtype` each:
// token t is place t % block_size of block block_ids[t / block_size]. An element is its code times
// its scale in float32 (KvScales), rounded once to `dtype`; in a cache of `dtype` it keeps its
// bits. Blocks may be named several times.
struct GatherBlocksParams {
  const KvCacheLayer* cache;  // float32, bfloat16, float16, or FP8 with scales
  const int32_t* block_ids;   // [(num_tokens + block_size - 1) / block_size], in range
  int64_t num_tokens;
  void* key;
  void* value;
  DType dtype;  // float32, bfloat16 or float16
};

void gather_blocks_cpu(const GatherBlocksParams& params, const StepContext& ctx);
void gather_blocks_cuda(const GatherBlocksParams& params, const StepContext& ctx);

// Calls fn(TypeTag<T>) with the storage type of float32, bfloat16 or float16.
template <typename Fn>
auto dispatch_float(DType dtype, std::string_view op, Fn&& fn) {
  if (dtype == DType::kF16) return fn(TypeTag<Float16>{});
  return dispatch_activation(dtype, op, fn);
}

}  // namespace mrv1
