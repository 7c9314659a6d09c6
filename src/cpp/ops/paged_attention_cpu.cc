// Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
#include "ops/paged_attention.h"

#include <algorithm>
#include <cstring>

#include "core/error.h"
#include "core/thread_pool.h"
#include "ops/vector_ops.h"
#include "ops/workspace_cpu.h"

namespace mrv1 {
namespace {

// Pieces a thread gets on average, so that slow threads can be helped.
constexpr int64_t kPiecesPerThread = 16;

int64_t thread_bytes(int64_t head_dim) {
  return (attention_scratch_bytes(head_dim) + 255) / 256 * 256;
}

void check_params(const PagedAttentionParams& params, const StepContext& ctx) {
  constexpr std::string_view kOp = "paged_attention";
  const HeadShape& shape = params.shape;
  const KvCacheLayer& cache = *params.cache;
  check(shape.head_dim > 0 && shape.head_dim % 8 == 0 && shape.head_dim <= 256, kOp, "head_dim is ",
        shape.head_dim, ", must be a multiple of 8 up to 256");
  check(shape.num_kv_heads > 0 && shape.num_heads > 0 && shape.num_heads % shape.num_kv_heads == 0,
        kOp, "num_heads is ", shape.num_heads, ", must be a multiple of num_kv_heads ",
        shape.num_kv_heads);
  check(cache.dtype == params.dtype || is_float8(cache.dtype), kOp, "cache dtype is ",
        dtype_name(cache.dtype), ", must be ", dtype_name(params.dtype),
        ", float8_e4m3fn or float8_e5m2");
  const bool scaled = cache.scales.kind != KvScaleKind::kNone;
  check(scaled == is_float8(cache.dtype), kOp, "a cache of ", dtype_name(cache.dtype),
        scaled ? " has no scales" : " needs scales");
  check(!scaled || (cache.scales.key != nullptr && cache.scales.value != nullptr), kOp,
        "scales of keys and of values must be given");
  check(cache.num_kv_heads == shape.num_kv_heads && cache.head_dim == shape.head_dim, kOp,
        "cache holds ", cache.num_kv_heads, " heads of ", cache.head_dim, ", must be ",
        shape.num_kv_heads, " of ", shape.head_dim);
  check(cache.block_size == ctx.rows.block_size, kOp, "block size of the cache is ",
        cache.block_size, ", of the block table ", ctx.rows.block_size);
  check(params.kv_group >= 0 && params.kv_group < ctx.rows.num_groups, kOp, "kv_group is ",
        params.kv_group, ", must be in [0, ", ctx.rows.num_groups, ")");
  check(params.window >= 0, kOp, "window is ", params.window, ", must not be negative");
  check(params.softcap >= 0.0f, kOp, "softcap is ", params.softcap, ", must not be negative");
  const int64_t needed = thread_bytes(shape.head_dim) * ctx.pool->num_threads();
  check_internal(static_cast<int64_t>(ctx.workspace_bytes) >= needed, kOp, "workspace has ",
                 ctx.workspace_bytes, " bytes, needs ", needed);
}

}  // namespace

int64_t paged_attention_workspace_cpu(const WorkspaceLimits& limits) {
  return thread_bytes(limits.head_dim) * limits.num_threads;
}

void paged_attention_cpu(const PagedAttentionParams& params, const StepContext& ctx) {
  const auto attention = params.dtype == DType::kF16
                             ? vector_ops().attention_f16
                             : vector_ops(params.dtype, "paged_attention").attention;
  check_params(params, ctx);
  const HeadShape& shape = params.shape;
  const KvCacheLayer& cache = *params.cache;
  const int64_t size = static_cast<int64_t>(dtype_size(params.dtype));
  const int64_t cache_size = static_cast<int64_t>(dtype_size(cache.dtype));
  const int group = shape.num_heads / shape.num_kv_heads;
  const int64_t num_tokens = ctx.sizes.num_tokens;

  // Tiles of as many tokens as fit, fewer if there would be too few of them to go round.
  const int64_t wanted = kPiecesPerThread * ctx.pool->num_threads();
  const int64_t fair = std::max<int64_t>(num_tokens * shape.num_kv_heads / wanted, 1);
  const int64_t tile_tokens = std::min<int64_t>(fair, std::max<int64_t>(kAttentionRows / group, 1));
  const int64_t num_tiles = (num_tokens + tile_tokens - 1) / tile_tokens;

  const auto attend = [&](int64_t first, int64_t end, int kv_head, int thread) {
    const int32_t batch = ctx.infer.token_batch[first];
    char* out = static_cast<char*>(params.out) +
                (first * shape.q_cols() + int64_t{kv_head} * group * shape.head_dim) * size;
    if (batch < 0) {
      for (int64_t t = first; t < end; ++t, out += shape.q_cols() * size) {
        std::memset(out, 0, static_cast<size_t>(group * shape.head_dim * size));
      }
      return;
    }
    AttentionTile tile;
    tile.q_token_stride = params.q_token_stride();
    tile.out_token_stride = shape.q_cols();
    tile.num_tokens = static_cast<int>(end - first);
    tile.head_dim = shape.head_dim;
    tile.positions = ctx.infer.positions + first;
    tile.block_table =
        ctx.rows.block_table +
        (int64_t{params.kv_group} * ctx.rows.num_rows + ctx.infer.row[batch]) * ctx.rows.max_blocks;
    tile.key = static_cast<const char*>(cache.key) + kv_head * cache.head_stride * cache_size;
    tile.value = static_cast<const char*>(cache.value) + kv_head * cache.head_stride * cache_size;
    tile.cache_dtype = cache.dtype;
    tile.block_stride = cache.block_stride;
    tile.token_stride = cache.token_stride;
    const KvScales& scales = cache.scales;
    const bool scaled = scales.kind != KvScaleKind::kNone;
    tile.key_scale = scaled ? scales.key + scales.index(0, 0, kv_head) : nullptr;
    tile.value_scale = scaled ? scales.value + scales.index(0, 0, kv_head) : nullptr;
    tile.scale_block_stride = scales.block_stride;
    tile.scale_token_stride = scales.token_stride;
    tile.block_size = cache.block_size;
    tile.scale = params.scale;
    tile.softcap = params.softcap;
    tile.window = params.window;
    tile.scratch = static_cast<char*>(ctx.workspace) + thread * thread_bytes(shape.head_dim);
    const char* q =
        static_cast<const char*>(params.qkv) +
        (first * params.q_token_stride() + int64_t{kv_head} * group * shape.head_dim) * size;
    for (int head = 0; head < group; head += kAttentionRows) {
      tile.num_heads = std::min(group - head, kAttentionRows);
      tile.q = q + head * shape.head_dim * size;
      tile.out = out + head * shape.head_dim * size;
      attention(tile);
    }
  };

  ctx.pool->parallel_for(
      num_tiles * shape.num_kv_heads, 1, [&](int64_t begin, int64_t end, int thread) {
        for (int64_t i = begin; i < end; ++i) {
          // Late tiles of a prompt have the most keys: they come first.
          const int64_t tile = num_tiles - 1 - i / shape.num_kv_heads;
          const int kv_head = static_cast<int>(i % shape.num_kv_heads);
          const int64_t tile_end = std::min((tile + 1) * tile_tokens, num_tokens);
          for (int64_t first = tile * tile_tokens; first < tile_end;) {
            int64_t next = first + 1;
            while (next < tile_end && ctx.infer.token_batch[next] == ctx.infer.token_batch[first]) {
              ++next;
            }
            attend(first, next, kv_head, thread);
            first = next;
          }
        }
      });
}

}  // namespace mrv1
