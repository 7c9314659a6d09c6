// Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
#include "ops/cache_write.h"

#include <cmath>
#include <cstring>
#include <limits>

#include "core/error.h"
#include "ops/cache_head_cpu.h"

namespace mrv1 {
namespace {

constexpr int64_t kElementsPerPiece = 8192;

int64_t cache_index(const KvCacheLayer& cache, int64_t slot, int64_t head) {
  return slot / cache.block_size * cache.block_stride +
         slot % cache.block_size * cache.token_stride + head * cache.head_stride;
}

void copy_head(const KvCacheLayer& cache, bool is_key, int64_t slot, int64_t head,
               const void* from) {
  const auto size = static_cast<int64_t>(dtype_size(cache.dtype));
  std::memcpy(
      static_cast<char*>(is_key ? cache.key : cache.value) + cache_index(cache, slot, head) * size,
      from, static_cast<size_t>(cache.head_dim * size));
}

// The largest finite magnitude. Comparisons with NaN are false.
template <typename T>
float largest_finite(const T* values, int64_t count) {
  float largest = 0.0f;
  for (int64_t i = 0; i < count; ++i) {
    const float magnitude = std::fabs(to_float(values[i]));
    const float finite = magnitude <= std::numeric_limits<float>::max() ? magnitude : 0.0f;
    largest = finite > largest ? finite : largest;
  }
  return largest;
}

template <typename T, typename F>
void quantise_head(const KvCacheLayer& cache, bool is_key, int64_t slot, int64_t head,
                   const void* from) {
  const T* values = static_cast<const T*>(from);
  const KvScales& scales = cache.scales;
  float& scale =
      (is_key ? scales.key
              : scales.value)[scales.index(slot / cache.block_size, slot % cache.block_size, head)];
  if (scales.kind == KvScaleKind::kToken) {
    scale = kv_token_scale<F>(largest_finite(values, cache.head_dim));
  }
  const float inverse = 1.0f / scale;
  F* codes = static_cast<F*>(is_key ? cache.key : cache.value) + cache_index(cache, slot, head);
  for (int64_t i = 0; i < cache.head_dim; ++i) {
    codes[i] = from_float<F>(to_float(values[i]) * inverse);
  }
}

template <typename T>
WriteCacheHead quantiser(DType format) {
  return format == DType::kE4M3 ? quantise_head<T, Float8E4M3> : quantise_head<T, Float8E5M2>;
}

}  // namespace

WriteCacheHead cache_head_writer(const KvCacheLayer& cache, DType dtype) {
  if (!is_float8(cache.dtype)) return copy_head;
  switch (dtype) {
    case DType::kF32:
      return quantiser<float>(cache.dtype);
    case DType::kBF16:
      return quantiser<BFloat16>(cache.dtype);
    default:
      return quantiser<Float16>(cache.dtype);
  }
}

void check_slots(std::string_view op, const KvCacheLayer& cache, const SlotMapping& slots,
                 const StepContext& ctx) {
  const int64_t count = int64_t{cache.num_blocks} * cache.block_size;
  for (int32_t t = 0; t < ctx.sizes.num_tokens; ++t) {
    check(slots[t] >= -1 && slots[t] < count, op, "slot of token ", t, " is ", slots[t],
          ", must be in [-1, ", count, ")");
  }
}

void cache_write_cpu(const CacheWriteParams& params, const StepContext& ctx) {
  constexpr std::string_view kOp = "cache_write";
  const KvCacheLayer& cache = *params.cache;
  check_cache_write(kOp, cache, {cache.num_kv_heads, cache.num_kv_heads, cache.head_dim},
                    params.dtype);
  const SlotMapping slots = slots_of(params.slots, params.kv_group, ctx);
  check_slots(kOp, cache, slots, ctx);
  const WriteCacheHead write = cache_head_writer(cache, params.dtype);
  const auto size = static_cast<int64_t>(dtype_size(params.dtype));
  const int64_t heads = cache.num_kv_heads;
  ctx.pool->parallel_for(
      ctx.sizes.num_tokens * heads, kElementsPerPiece / cache.head_dim,
      [&](int64_t begin, int64_t end, int) {
        for (int64_t i = begin; i < end; ++i) {
          const int64_t token = i / heads, head = i % heads, slot = slots[token];
          if (slot < 0) continue;
          const int64_t within = head * cache.head_dim;
          const char* key = static_cast<const char*>(params.key);
          const char* value = static_cast<const char*>(params.value);
          write(cache, true, slot, head, key + (token * params.key_stride + within) * size);
          write(cache, false, slot, head, value + (token * params.value_stride + within) * size);
        }
      });
}

}  // namespace mrv1
