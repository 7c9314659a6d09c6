// Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
//
// Attention of a step: checks, and which kernels take which rows.
#include "attention_backends.h"
#include "launch.h"
#include "native_attention.h"
#include "ops/paged_attention.h"
#include "vector.cuh"

namespace mrv1 {
namespace {

constexpr std::string_view kOp = "paged_attention";
constexpr int kThreads = 128;
constexpr int32_t kMaxHeadDim = 256;
constexpr float kLog2e = 1.4426950408889634f;

// Zero rows for padding and masked tokens, for backends that leave them alone.
__global__ void __launch_bounds__(kThreads)
    dead_rows_kernel(uint4* out, const int32_t* token_batch, int32_t row_chunks) {
  cuda::launch_next();
  cuda::wait_for_previous();
  const int64_t token = blockIdx.x;
  if (token_batch[token] >= 0) return;
  for (int32_t i = static_cast<int32_t>(threadIdx.x); i < row_chunks; i += kThreads) {
    out[token * row_chunks + i] = make_uint4(0, 0, 0, 0);
  }
}

// Elements of the cache in one chunk.
int64_t chunk_elements(const KvCacheLayer& cache) {
  return cuda::kChunkBytes / static_cast<int64_t>(dtype_size(cache.dtype));
}

// Whether the native kernel, and with it FlashInfer's, can read queries and cache: in pieces of 16
// bytes, at offsets of 32 bits.
bool is_native(const PagedAttentionParams& params) {
  const KvCacheLayer& cache = *params.cache;
  const bool is_read = cache.dtype == params.dtype || cache.dtype == DType::kE4M3;
  if (params.dtype != DType::kBF16 || !is_read ||
      cuda::attention_launch(params.shape.head_dim).stages < 2) {
    return false;
  }
  const int64_t chunk = chunk_elements(cache);
  const int64_t last = (cache.num_blocks - 1) * cache.block_stride +
                       (cache.block_size - 1) * cache.token_stride +
                       (cache.num_kv_heads - 1) * cache.head_stride + cache.head_dim;
  return cache.block_stride % chunk == 0 && cache.token_stride % chunk == 0 &&
         cache.head_stride % chunk == 0 && cache.head_dim % chunk == 0 &&
         params.q_token_stride() % cuda::kVectorSize<BFloat16> == 0 &&
         cuda::is_vector_aligned(params.qkv) && cuda::is_vector_aligned(params.out) &&
         cuda::is_vector_aligned(cache.key) && cuda::is_vector_aligned(cache.value) &&
         last / chunk < UINT32_MAX;
}

void native_attention(const PagedAttentionParams& params, const StepContext& ctx) {
  const HeadShape& shape = params.shape;
  const KvCacheLayer& cache = *params.cache;
  const AttentionPlan& plan = *params.plan;
  const cuda::AttentionLaunch launch = cuda::attention_launch(shape.head_dim, cache.dtype);
  const cuda::AttentionPlanLayout layout = cuda::attention_plan_layout(plan, launch);
  char* data = static_cast<char*>(plan.data);
  cuda::NativeAttentionArgs args{};
  args.qkv = static_cast<const uint16_t*>(params.qkv);
  args.out = static_cast<uint16_t*>(params.out);
  args.key = static_cast<const char*>(cache.key);
  args.value = static_cast<const char*>(cache.value);
  args.scales = cache.scales;
  args.block_table =
      ctx.rows.block_table + int64_t{params.kv_group} * ctx.rows.num_rows * ctx.rows.max_blocks;
  args.token_batch = ctx.infer.token_batch;
  args.workers = reinterpret_cast<const cuda::AttentionWorker*>(data + layout.workers);
  args.items = reinterpret_cast<const cuda::AttentionItem*>(data + layout.items);
  args.first_blocks =
      reinterpret_cast<const int32_t*>(data + layout.first_blocks) +
      int64_t{params.kv_group - plan.first_group} * launch.workers * cuda::kAttentionWarps;
  args.partials = reinterpret_cast<float*>(data + layout.partials);
  args.worker_floats = layout.worker_floats;
  args.start_floats = layout.start_floats;
  const int64_t chunk = chunk_elements(cache);
  args.block_stride = static_cast<uint32_t>(cache.block_stride / chunk);
  args.token_stride = static_cast<uint32_t>(cache.token_stride / chunk);
  args.head_stride = static_cast<uint32_t>(cache.head_stride / chunk);
  args.block_size = cache.block_size;
  args.block_divider = cuda::FastDivider(static_cast<uint32_t>(cache.block_size));
  args.max_blocks = ctx.rows.max_blocks;
  args.num_heads = shape.num_heads;
  args.num_kv_heads = shape.num_kv_heads;
  args.group = shape.num_heads / shape.num_kv_heads;
  args.group_divider = cuda::FastDivider(static_cast<uint32_t>(args.group));
  args.head_dim = shape.head_dim;
  args.q_stride = params.q_token_stride();
  args.plan_is_old = params.follows_prepare;
  args.num_tokens = ctx.sizes.num_tokens;
  args.window = params.window;
  args.stages = launch.stages;
  args.tiles = cuda::attention_tiles(plan, ctx);
  args.scale =
      params.softcap > 0.0f
          ? cuda::ScoreScale{2.0f * kLog2e * params.scale / params.softcap, params.softcap * kLog2e}
          : cuda::ScoreScale{params.scale * kLog2e, 0.0f};
  const bool float8 = cache.dtype == DType::kE4M3;
  const auto run =
      launch.dim <= 80    ? (float8 ? cuda::native_attention_e4m3_64 : cuda::native_attention_64)
      : launch.dim <= 128 ? (float8 ? cuda::native_attention_e4m3_128 : cuda::native_attention_128)
                          : (float8 ? cuda::native_attention_e4m3_256 : cuda::native_attention_256);
  run(args, launch, ctx);
}

}  // namespace

void paged_attention_cuda(const PagedAttentionParams& params, const StepContext& ctx) {
  const HeadShape& shape = params.shape;
  check(params.cache != nullptr, kOp, "no cache is given");
  const KvCacheLayer& cache = *params.cache;
  check(shape.num_heads > 0 && shape.num_kv_heads > 0 && shape.num_heads % shape.num_kv_heads == 0,
        kOp, shape.num_heads, " heads and ", shape.num_kv_heads,
        " key/value heads; the first must be a positive multiple of the second");
  check(shape.head_dim > 0 && shape.head_dim % 8 == 0 && shape.head_dim <= kMaxHeadDim, kOp,
        "head_dim is ", shape.head_dim, "; it must be a multiple of 8 up to ", kMaxHeadDim);
  check(cache.dtype == params.dtype || is_float8(cache.dtype), kOp, "the cache is ",
        dtype_name(cache.dtype), " and qkv is ", dtype_name(params.dtype),
        "; they must be equal, or the cache float8_e4m3fn or float8_e5m2");
  const KvScales& scales = cache.scales;
  check(is_float8(cache.dtype) == (scales.kind != KvScaleKind::kNone), kOp, "a cache of ",
        dtype_name(cache.dtype), is_float8(cache.dtype) ? " needs" : " has no", " scales");
  check(scales.kind == KvScaleKind::kNone || (scales.key != nullptr && scales.value != nullptr),
        kOp, "scales of keys and of values must be given");
  check(cache.head_dim == shape.head_dim && cache.num_kv_heads == shape.num_kv_heads, kOp,
        "the cache has ", cache.num_kv_heads, " heads of ", cache.head_dim, ", qkv has ",
        shape.num_kv_heads, " of ", shape.head_dim);
  check(cache.block_size > 0 && cache.block_size == ctx.rows.block_size, kOp,
        "the cache's block_size is ", cache.block_size, " and the block table's ",
        ctx.rows.block_size, "; they must be equal and positive");
  check(params.kv_group >= 0 && params.kv_group < ctx.rows.num_groups, kOp, "kv_group is ",
        params.kv_group, "; it must be in [0, ", ctx.rows.num_groups, ")");
  check(params.window >= 0, kOp, "window is ", params.window, "; it must not be negative");
  check(params.softcap >= 0.0f, kOp, "softcap is ", params.softcap, "; it must not be negative");
  if (ctx.sizes.num_tokens == 0) return;
  if (!is_native(params)) return plain_attention(params, ctx);
  check(params.plan != nullptr && params.plan->data != nullptr &&
            params.plan->serves(shape, params.window, params.softcap) &&
            params.plan->cache_dtype == cache.dtype && params.plan->has_group(params.kv_group),
        kOp, "there is no plan of this geometry");
  const AttentionRoute route = attention_route(*params.plan, ctx);
  if (route.native && ctx.sizes.num_requests > 0) {
    native_attention(params, ctx);
  } else {
    const int32_t row_chunks = shape.q_cols() / 8;
    cuda::launch(kOp, ctx, dead_rows_kernel, dim3(ctx.sizes.num_tokens), dim3(kThreads), 0,
                 static_cast<uint4*>(params.out), ctx.infer.token_batch, row_chunks);
  }
  if (route.flashinfer_decode) flashinfer_decode(params, ctx);
  if (route.flashinfer_prefill) flashinfer_prefill(params, ctx);
}

}  // namespace mrv1
