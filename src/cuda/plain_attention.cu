// Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
//
// Attention over every cache that there is: any activations, storage, scales and strides. It is
// what float32 runs on, the precision of tests, and whatever the native kernel does not take.
//
// One block per token and query head walks the visible positions in chunks of 64, in ascending
// order: the warps take positions in turn and compute scores, then every thread folds the chunk
// into the output columns that it owns (online softmax: a running maximum, a running sum, and the
// output rescaled when the maximum grows). Nothing is split over blocks, so the order of the sums
// depends on the token's position and the window only.
#include <type_traits>

#include "activation.cuh"
#include "attention_backends.h"
#include "block.cuh"
#include "launch.h"

namespace mrv1 {
namespace {

constexpr std::string_view kOp = "paged_attention";
constexpr int kThreads = 128;
constexpr int kChunk = 64;  // positions of one softmax update

// T: activations; S: what the cache stores, T or FP8 with scales.
template <typename T, typename S>
__global__ void __launch_bounds__(kThreads)
    plain_attention_kernel(PagedAttentionParams params, KvCacheLayer cache, RowState state,
                           InferParams infer) {
  constexpr bool kScaled = !std::is_same_v<T, S>;
  extern __shared__ float shared[];
  __shared__ float weights[kChunk];  // scores, then their exponentials
  __shared__ float parts[kChunk];    // what values are multiplied by: times their scales
  __shared__ int64_t offsets[kChunk];
  __shared__ int64_t scale_offsets[kChunk];
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
  const S* keys = static_cast<const S*>(cache.key) + kv_head * cache.head_stride;
  const S* values = static_cast<const S*>(cache.value) + kv_head * cache.head_stride;
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
      const int64_t block = blocks[p / cache.block_size];
      const int32_t in_block = p % cache.block_size;
      offsets[threadIdx.x] = block * cache.block_stride + in_block * cache.token_stride;
      if constexpr (kScaled) {
        scale_offsets[threadIdx.x] = cache.scales.index(block, in_block, kv_head);
      }
    }
    __syncthreads();  // also: the query is staged
    for (int j = warp; j < count; j += kThreads / cuda::kWarpSize) {
      const S* key = keys + offsets[j];
      float dot = 0.0f;
      for (int32_t i = lane; i < head_dim; i += cuda::kWarpSize) {
        dot = fmaf(query[i], to_float(key[i]), dot);
      }
      dot = cuda::warp_sum(dot);
      if (lane == 0) {
        if constexpr (kScaled) dot *= cache.scales.key[scale_offsets[j]];
        weights[j] = params.softcap > 0.0f
                         ? cuda::soft_cap(dot, params.scale / params.softcap, params.softcap)
                         : dot * params.scale;
      }
    }
    __syncthreads();
    float new_maximum = maximum;
    for (int j = 0; j < count; ++j) new_maximum = fmaxf(new_maximum, weights[j]);
    __syncthreads();  // every thread has read the scores
    if (threadIdx.x < count) {
      const float weight = expf(weights[threadIdx.x] - new_maximum);
      weights[threadIdx.x] = weight;
      if constexpr (kScaled) {
        parts[threadIdx.x] = weight * cache.scales.value[scale_offsets[threadIdx.x]];
      }
    }
    __syncthreads();
    const float* factors = kScaled ? parts : weights;
    const float factor = expf(maximum - new_maximum);
    sum *= factor;
    for (int j = 0; j < count; ++j) sum += weights[j];
    for (int32_t i = threadIdx.x; i < head_dim; i += kThreads) {
      float value = result[i] * factor;
      for (int j = 0; j < count; ++j) {
        value = fmaf(factors[j], to_float(values[offsets[j] + i]), value);
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

template <typename Fn>
void dispatch_query(DType dtype, Fn&& fn) {
  if (dtype == DType::kF16) return fn(TypeTag<Float16>{});
  dispatch_activation(dtype, kOp, fn);
}

// Of the cache's storage; its dtype is that of the queries, T, or FP8.
template <typename T, typename Fn>
void dispatch_storage(DType dtype, Fn&& fn) {
  if (dtype == DType::kE4M3) return fn(TypeTag<Float8E4M3>{});
  if (dtype == DType::kE5M2) return fn(TypeTag<Float8E5M2>{});
  fn(TypeTag<T>{});
}

}  // namespace

void plain_attention(const PagedAttentionParams& params, const StepContext& ctx) {
  const dim3 grid(ctx.sizes.num_tokens, params.shape.num_heads);
  const size_t shared_bytes = 2 * sizeof(float) * params.shape.head_dim;
  PagedAttentionParams strided = params;  // methods are the host's
  strided.q_stride = params.q_token_stride();
  dispatch_query(params.dtype, [&](auto query) {
    using T = typename decltype(query)::type;
    dispatch_storage<T>(params.cache->dtype, [&](auto storage) {
      using S = typename decltype(storage)::type;
      cuda::launch(kOp, ctx, plain_attention_kernel<T, S>, grid, dim3(kThreads), shared_bytes,
                   strided, *params.cache, ctx.rows, ctx.infer);
    });
  });
}

}  // namespace mrv1
