// Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
//
// One block per token and head. The head is read into shared memory as float before anything is
// written, which makes in-place use safe and lets RoPE see both halves. Each part rounds its result
// to the activation dtype, so one launch with all parts equals three launches with one part each,
// bit for bit. Value heads go through unchanged.
#include "block.cuh"
#include "check.h"
#include "ops/qkv_prepare.h"

namespace mrv1 {
namespace {

constexpr std::string_view kOp = "qkv_prepare";
constexpr int kThreads = 128;
constexpr int32_t kMaxHeadDim = 256;

template <typename T>
__device__ float rounded(float value) {
  return to_float(from_float<T>(value));
}

// Part of a packed row that a head belongs to.
enum class HeadKind { kQuery, kKey, kValue };

template <typename T>
__global__ void qkv_prepare_kernel(QkvPrepareParams params, KvCacheLayer cache,
                                   const int32_t* positions, const int32_t* slots) {
  extern __shared__ float values[];  // [head_dim]
  const HeadShape& shape = params.shape;
  const int32_t head_dim = shape.head_dim;
  const int64_t token = blockIdx.x;
  const int32_t head = blockIdx.y;
  const HeadKind kind = head < shape.num_heads                        ? HeadKind::kQuery
                        : head < shape.num_heads + shape.num_kv_heads ? HeadKind::kKey
                                                                      : HeadKind::kValue;
  const int64_t row_cols = int64_t{shape.num_heads + 2 * shape.num_kv_heads} * head_dim;
  const int64_t start = token * row_cols + int64_t{head} * head_dim;

  const T* source = static_cast<const T*>(params.qkv) + start;
  for (int32_t i = threadIdx.x; i < head_dim; i += kThreads) values[i] = to_float(source[i]);

  const float* norm = kind == HeadKind::kQuery ? params.q_norm
                      : kind == HeadKind::kKey ? params.k_norm
                                               : nullptr;
  if (norm != nullptr) {
    float squares = 0.0f;
    for (int32_t i = threadIdx.x; i < head_dim; i += kThreads) {
      squares = fmaf(values[i], values[i], squares);
    }
    const float mean = cuda::block_sum<kThreads>(squares) / static_cast<float>(head_dim);
    const float scale = 1.0f / sqrtf(mean + params.eps);
    for (int32_t i = threadIdx.x; i < head_dim; i += kThreads) {
      values[i] = rounded<T>(values[i] * scale * norm[i]);
    }
  }
  __syncthreads();

  if (params.rope != nullptr && kind != HeadKind::kValue) {
    const int32_t half = head_dim / 2;
    const float* angles = params.rope + int64_t{positions[token]} * head_dim;
    for (int32_t i = threadIdx.x; i < half; i += kThreads) {
      const float c = angles[i];
      const float s = angles[half + i];
      const float first = values[i];
      const float second = values[half + i];
      values[i] = rounded<T>(first * c - second * s);
      values[half + i] = rounded<T>(second * c + first * s);
    }
    __syncthreads();
  }

  if (params.out != nullptr) {
    T* out = static_cast<T*>(params.out) + start;
    for (int32_t i = threadIdx.x; i < head_dim; i += kThreads) out[i] = from_float<T>(values[i]);
  }
  if (params.cache == nullptr || kind == HeadKind::kQuery) return;
  const int32_t slot = slots[token];
  if (slot < 0) return;
  const int32_t kv_head =
      head - shape.num_heads - (kind == HeadKind::kValue ? shape.num_kv_heads : 0);
  T* target = static_cast<T*>(kind == HeadKind::kKey ? cache.key : cache.value) +
              slot / cache.block_size * cache.block_stride +
              slot % cache.block_size * cache.token_stride + kv_head * cache.head_stride;
  for (int32_t i = threadIdx.x; i < head_dim; i += kThreads) target[i] = from_float<T>(values[i]);
}

}  // namespace

void qkv_prepare_cuda(const QkvPrepareParams& params, const StepContext& ctx) {
  const HeadShape& shape = params.shape;
  check(shape.num_heads > 0 && shape.num_kv_heads > 0, kOp, shape.num_heads, " heads and ",
        shape.num_kv_heads, " key/value heads; both must be positive");
  check(shape.head_dim > 0 && shape.head_dim % 8 == 0 && shape.head_dim <= kMaxHeadDim, kOp,
        "head_dim is ", shape.head_dim, "; it must be a multiple of 8 up to ", kMaxHeadDim);
  check((params.q_norm == nullptr) == (params.k_norm == nullptr), kOp,
        "q_norm and k_norm must be given together");
  check(params.out != nullptr || params.cache != nullptr, kOp, "neither out nor cache is given");
  KvCacheLayer cache;
  const int32_t* slots = nullptr;
  if (params.cache != nullptr) {
    cache = *params.cache;
    check(cache.dtype == params.dtype, kOp, "the cache is ", dtype_name(cache.dtype),
          " and qkv is ", dtype_name(params.dtype), "; they must be equal");
    check(cache.head_dim == shape.head_dim && cache.num_kv_heads == shape.num_kv_heads, kOp,
          "the cache has ", cache.num_kv_heads, " heads of ", cache.head_dim, ", qkv has ",
          shape.num_kv_heads, " of ", shape.head_dim);
    check(cache.block_size > 0, kOp, "the cache's block_size is ", cache.block_size,
          "; it must be positive");
    slots = ctx.infer.slot_mapping + int64_t{params.kv_group} * ctx.infer.max_tokens;
  }
  if (ctx.sizes.num_tokens == 0) return;
  const dim3 grid(ctx.sizes.num_tokens, shape.num_heads + 2 * shape.num_kv_heads);
  const size_t shared_bytes = sizeof(float) * shape.head_dim;
  dispatch_activation(params.dtype, kOp, [&](auto tag) {
    using T = typename decltype(tag)::type;
    qkv_prepare_kernel<T><<<grid, kThreads, shared_bytes, cuda::stream_of(ctx)>>>(
        params, cache, ctx.infer.positions, slots);
  });
  cuda::check_launch(kOp);
}

}  // namespace mrv1
