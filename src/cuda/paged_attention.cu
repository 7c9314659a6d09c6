// Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
//
// Attention of a step: checks, which backend takes which rows, and a plain kernel for float32,
// which is the precision of tests, and for GPUs with too little shared memory for the native one.
//
// In the plain kernel, one block per token and query head walks the visible positions in chunks of
// 64, in ascending order: the warps take positions in turn and compute scores, then every thread
// folds the chunk into the output columns that it owns (online softmax: a running maximum, a
// running sum, and the output rescaled when the maximum grows). Nothing is split over blocks, so
// the order of the sums depends on the token's position and the window only.
#include <bit>

#include "activation.cuh"
#include "attention_backends.h"
#include "block.cuh"
#include "launch.h"
#include "native_attention.h"
#include "ops/paged_attention.h"
#include "vector.cuh"

namespace mrv1 {
namespace {

constexpr std::string_view kOp = "paged_attention";
constexpr int kThreads = 128;
constexpr int kChunk = 64;  // positions of one softmax update
constexpr int32_t kMaxHeadDim = 256;
constexpr float kLog2e = 1.4426950408889634f;

template <typename T>
__global__ void __launch_bounds__(kThreads)
    plain_attention_kernel(PagedAttentionParams params, KvCacheLayer cache, RowState state,
                           InferParams infer) {
  extern __shared__ float shared[];
  __shared__ float weights[kChunk];  // scores, then their exponentials
  __shared__ int64_t offsets[kChunk];
  cuda::launch_next();
  cuda::wait_for_previous();
  const HeadShape& shape = params.shape;
  const int32_t head_dim = shape.head_dim;
  float* query = shared;              // [head_dim]
  float* result = shared + head_dim;  // [head_dim]; a column belongs to one thread
  const int64_t token = blockIdx.x;
  const int32_t head = blockIdx.y;
  T* out = static_cast<T*>(params.out) + (token * shape.num_heads + head) * head_dim;

  const int32_t batch = infer.token_batch[token];
  if (batch < 0) {
    for (int32_t i = threadIdx.x; i < head_dim; i += kThreads) out[i] = from_float<T>(0.0f);
    return;
  }

  const T* source =
      static_cast<const T*>(params.qkv) + token * params.q_stride + int64_t{head} * head_dim;
  for (int32_t i = threadIdx.x; i < head_dim; i += kThreads) {
    query[i] = to_float(source[i]);
    result[i] = 0.0f;
  }
  const int64_t kv_head = head / (shape.num_heads / shape.num_kv_heads);
  const T* keys = static_cast<const T*>(cache.key) + kv_head * cache.head_stride;
  const T* values = static_cast<const T*>(cache.value) + kv_head * cache.head_stride;
  const int32_t* blocks =
      state.block_table +
      (int64_t{params.kv_group} * state.num_rows + infer.row[batch]) * state.max_blocks;
  const int32_t position = infer.positions[token];
  const int32_t begin = params.window > 0 ? max(0, position - params.window + 1) : 0;
  const int warp = threadIdx.x / cuda::kWarpSize;
  const int lane = threadIdx.x % cuda::kWarpSize;

  float maximum = -INFINITY;
  float sum = 0.0f;
  for (int32_t chunk = begin; chunk <= position; chunk += kChunk) {
    const int count = min(kChunk, position + 1 - chunk);
    if (threadIdx.x < count) {
      const int32_t p = chunk + static_cast<int32_t>(threadIdx.x);
      offsets[threadIdx.x] = blocks[p / cache.block_size] * cache.block_stride +
                             p % cache.block_size * cache.token_stride;
    }
    __syncthreads();  // also: the query is staged
    for (int j = warp; j < count; j += kThreads / cuda::kWarpSize) {
      const T* key = keys + offsets[j];
      float dot = 0.0f;
      for (int32_t i = lane; i < head_dim; i += cuda::kWarpSize) {
        dot = fmaf(query[i], to_float(key[i]), dot);
      }
      dot = cuda::warp_sum(dot);
      if (lane == 0) {
        weights[j] = params.softcap > 0.0f
                         ? cuda::soft_cap(dot, params.scale / params.softcap, params.softcap)
                         : dot * params.scale;
      }
    }
    __syncthreads();
    float new_maximum = maximum;
    for (int j = 0; j < count; ++j) new_maximum = fmaxf(new_maximum, weights[j]);
    __syncthreads();  // every thread has read the scores
    if (threadIdx.x < count) weights[threadIdx.x] = expf(weights[threadIdx.x] - new_maximum);
    __syncthreads();
    const float factor = expf(maximum - new_maximum);
    sum *= factor;
    for (int j = 0; j < count; ++j) sum += weights[j];
    for (int32_t i = threadIdx.x; i < head_dim; i += kThreads) {
      float value = result[i] * factor;
      for (int j = 0; j < count; ++j) {
        value = fmaf(weights[j], to_float(values[offsets[j] + i]), value);
      }
      result[i] = value;
    }
    maximum = new_maximum;
    __syncthreads();  // the next chunk writes weights and offsets
  }

  for (int32_t i = threadIdx.x; i < head_dim; i += kThreads) {
    out[i] = from_float<T>(result[i] / sum);
  }
}

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

void plain_attention(const PagedAttentionParams& params, const StepContext& ctx) {
  const dim3 grid(ctx.sizes.num_tokens, params.shape.num_heads);
  const size_t shared_bytes = 2 * sizeof(float) * params.shape.head_dim;
  PagedAttentionParams strided = params;  // methods are the host's
  strided.q_stride = params.q_token_stride();
  dispatch_activation(params.dtype, kOp, [&](auto tag) {
    using T = typename decltype(tag)::type;
    cuda::launch(kOp, ctx, plain_attention_kernel<T>, grid, dim3(kThreads), shared_bytes, strided,
                 *params.cache, ctx.rows, ctx.infer);
  });
}

void native_attention(const PagedAttentionParams& params, const StepContext& ctx) {
  const HeadShape& shape = params.shape;
  const KvCacheLayer& cache = *params.cache;
  const AttentionPlan& plan = *params.plan;
  constexpr int64_t kChunk = 8;  // elements
  check(cache.block_stride % kChunk == 0 && cache.token_stride % kChunk == 0 &&
            cache.head_stride % kChunk == 0,
        kOp, "the cache's strides are ", cache.block_stride, ", ", cache.token_stride, " and ",
        cache.head_stride, "; they must be multiples of ", kChunk);
  check(params.q_token_stride() % kChunk == 0 && cuda::is_vector_aligned(params.qkv) &&
            cuda::is_vector_aligned(params.out) && cuda::is_vector_aligned(cache.key) &&
            cuda::is_vector_aligned(cache.value),
        kOp,
        "queries, output and cache must begin at multiples of 16 bytes, and so must each token");
  check(cache.elements() / kChunk < UINT32_MAX, kOp, "a layer's keys are ", cache.elements(),
        " elements, more than can be addressed");
  const cuda::AttentionLaunch launch = cuda::attention_launch(shape.head_dim);
  const cuda::AttentionPlanLayout layout = cuda::attention_plan_layout(plan, launch);
  char* data = static_cast<char*>(plan.data);
  cuda::NativeAttentionArgs args{};
  args.qkv = static_cast<const uint16_t*>(params.qkv);
  args.out = static_cast<uint16_t*>(params.out);
  args.key = static_cast<const uint16_t*>(cache.key);
  args.value = static_cast<const uint16_t*>(cache.value);
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
  args.block_stride = static_cast<uint32_t>(cache.block_stride / kChunk);
  args.token_stride = static_cast<uint32_t>(cache.token_stride / kChunk);
  args.head_stride = static_cast<uint32_t>(cache.head_stride / kChunk);
  args.block_size = cache.block_size;
  const auto block_size = static_cast<uint32_t>(cache.block_size);
  args.block_shift = std::has_single_bit(block_size) ? std::countr_zero(block_size) : -1;
  args.max_blocks = ctx.rows.max_blocks;
  args.num_heads = shape.num_heads;
  args.num_kv_heads = shape.num_kv_heads;
  args.group = shape.num_heads / shape.num_kv_heads;
  args.head_dim = shape.head_dim;
  args.q_stride = params.q_token_stride();
  args.num_tokens = ctx.sizes.num_tokens;
  args.window = params.window;
  args.stages = launch.stages;
  args.tiles = cuda::attention_tiles(plan, ctx);
  args.scale =
      params.softcap > 0.0f
          ? cuda::ScoreScale{2.0f * kLog2e * params.scale / params.softcap, params.softcap * kLog2e}
          : cuda::ScoreScale{params.scale * kLog2e, 0.0f};
  if (launch.dim <= 80) {
    cuda::native_attention_64(args, launch, ctx);
  } else if (launch.dim <= 128) {
    cuda::native_attention_128(args, launch, ctx);
  } else {
    cuda::native_attention_256(args, launch, ctx);
  }
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
  check(cache.dtype == params.dtype, kOp, "the cache is ", dtype_name(cache.dtype), " and qkv is ",
        dtype_name(params.dtype), "; they must be equal");
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
  if (params.dtype != DType::kBF16 || cuda::attention_launch(shape.head_dim).stages < 2) {
    return plain_attention(params, ctx);
  }
  check(params.plan != nullptr && params.plan->data != nullptr &&
            params.plan->serves(shape, params.window, params.softcap) &&
            params.plan->has_group(params.kv_group),
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
