// Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
#include "ops/cache_write.h"

#include <cstring>

#include "core/error.h"
#include "core/thread_pool.h"
#include "ops/cache_head_cpu.h"

namespace mrv1 {
namespace {

constexpr int64_t kElementsPerPiece = 8192;

}  // namespace

CacheHeadWriter::CacheHeadWriter(const KvCacheLayer& cache, DType dtype) : cache_(cache) {
  if (!is_float8(cache.dtype)) return;
  const VectorOps& ops = vector_ops();
  codes_ = dtype == DType::kF32    ? &ops.f32_codes
           : dtype == DType::kBF16 ? &ops.bf16_codes
                                   : &ops.f16_codes;
}

void CacheHeadWriter::write(bool is_key, int64_t slot, int64_t head, const void* from) const {
  const int64_t block = slot / cache_.block_size, place = slot % cache_.block_size;
  const int64_t index =
      block * cache_.block_stride + place * cache_.token_stride + head * cache_.head_stride;
  const auto size = static_cast<int64_t>(dtype_size(cache_.dtype));
  char* to = static_cast<char*>(is_key ? cache_.key : cache_.value) + index * size;
  if (codes_ == nullptr) {
    std::memcpy(to, from, static_cast<size_t>(cache_.head_dim * size));
    return;
  }
  const bool is_e4m3 = cache_.dtype == DType::kE4M3;
  const KvScales& scales = cache_.scales;
  float& scale = (is_key ? scales.key : scales.value)[scales.index(block, place, head)];
  if (scales.kind == KvScaleKind::kToken) {
    const float largest = codes_->largest_finite(from, cache_.head_dim);
    scale = is_e4m3 ? kv_token_scale<Float8E4M3>(largest) : kv_token_scale<Float8E5M2>(largest);
  }
  (is_e4m3 ? codes_->encode_e4m3 : codes_->encode_e5m2)(from, 1.0f / scale, to, cache_.head_dim);
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
  const CacheHeadWriter writer(cache, params.dtype);
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
          writer.write(true, slot, head, key + (token * params.key_stride + within) * size);
          writer.write(false, slot, head, value + (token * params.value_stride + within) * size);
        }
      });
}

}  // namespace mrv1
