// Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
#include "ops/cache_write.h"

#include "core/error.h"

namespace mrv1 {

void check_cache_write(std::string_view op, const KvCacheLayer& cache, const HeadShape& shape,
                       DType dtype) {
  check(dtype == DType::kF32 || dtype == DType::kBF16 || dtype == DType::kF16, op, "keys are ",
        dtype_name(dtype), ", must be float32, bfloat16 or float16");
  check(cache.dtype == dtype || is_float8(cache.dtype), op, "cache dtype is ",
        dtype_name(cache.dtype), ", must be ", dtype_name(dtype), " or FP8");
  const bool has_scales = cache.scales.kind != KvScaleKind::kNone && cache.scales.key != nullptr &&
                          cache.scales.value != nullptr;
  check(is_float8(cache.dtype) ? has_scales : cache.scales.kind == KvScaleKind::kNone, op,
        "a cache of ", dtype_name(cache.dtype), " has ", has_scales ? "" : "no ",
        "scales; FP8 needs them, other caches must have none");
  check(cache.num_kv_heads == shape.num_kv_heads && cache.head_dim == shape.head_dim, op,
        "cache holds ", cache.num_kv_heads, " heads of ", cache.head_dim, ", must be ",
        shape.num_kv_heads, " of ", shape.head_dim);
  check(cache.num_blocks > 0 && cache.block_size > 0, op, "cache has ", cache.num_blocks,
        " blocks of ", cache.block_size, " tokens, must have some");
}

}  // namespace mrv1
