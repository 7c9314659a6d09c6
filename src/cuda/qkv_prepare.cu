// Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
//
// A head is spread over head_dim / 8 lanes of a warp, eight neighbouring elements each: it is read
// once, stays in registers, and RoPE gets the other element of a pair from another lane, or from
// this one if pairs are interleaved. Where head_dim / 8 is no power of two some lanes idle.
// Where RoPE turns all of a head in half-split pairs, as most models have it, half as many lanes
// do: each has both elements of its pairs, and reads their angles once. What does not divide into
// lanes takes the last kernel, a block per head. Each part rounds its result to the activation
// dtype, and all kernels compute it in one order, so one launch with all parts equals three
// launches with one part each, bit for bit. Value heads go through unchanged, and a head is read
// before it is written, so in-place use is safe.
#include <algorithm>
#include <type_traits>

#include "block.cuh"
#include "cache_head.cuh"
#include "fast_divider.cuh"
#include "launch.h"
#include "ops/cache_write.h"
#include "ops/qkv_prepare.h"
#include "vector.cuh"

namespace mrv1 {
namespace {

constexpr std::string_view kOp = "qkv_prepare";
constexpr int kThreads = 128;
constexpr int kLaneSize = 8;
constexpr int32_t kMaxHeadDim = 256;

template <typename T>
__device__ float rounded(float value) {
  return to_float(from_float<T>(value));
}

// Of a value that T holds exactly; the bits of a NaN stay, too.
template <typename T>
__device__ T exactly(float value) {
  if constexpr (sizeof(T) == 2) {
    return T{static_cast<uint16_t>(float_to_bits(value) >> 16)};
  } else {
    return value;
  }
}

// Where the tokens' heads go; without a cache no token has a slot.
struct CacheTarget {
  KvCacheLayer cache;
  SlotMapping slots;
  cuda::FastDivider block_size;
};

// A pair after its turn. Written out, so that every kernel rounds alike.
__device__ __forceinline__ float turn_first(float first, float second, float cosine, float sine) {
  return fmaf(-second, sine, __fmul_rn(first, cosine));
}
__device__ __forceinline__ float turn_second(float first, float second, float cosine, float sine) {
  return fmaf(first, sine, __fmul_rn(second, cosine));
}

// Part of a packed row that a head belongs to.
enum class HeadKind { kQuery, kKey, kValue };

__device__ HeadKind head_kind(const HeadShape& shape, int32_t head) {
  return head < shape.num_heads                        ? HeadKind::kQuery
         : head < shape.num_heads + shape.num_kv_heads ? HeadKind::kKey
                                                       : HeadKind::kValue;
}

// Of a key or a value, among the heads of the cache.
__device__ int32_t cache_head(const HeadShape& shape, HeadKind kind, int32_t head) {
  return head - shape.num_heads - (kind == HeadKind::kKey ? 0 : shape.num_kv_heads);
}

// A head of a token on its way to the cache, as each of its lanes has it.
struct CacheHead {
  void* side;
  float* scales;  // of the side
  int32_t head;
  int64_t slot;  // -1 where nothing is written
  float scale = 1.0f;

  __device__ CacheHead(const CacheTarget& target, const HeadShape& shape, HeadKind kind,
                       int32_t head_of_row, int64_t token, bool is_written) {
    const KvCacheLayer& cache = target.cache;
    const bool is_key = kind == HeadKind::kKey;
    side = is_key ? cache.key : cache.value;
    scales = is_key ? cache.scales.key : cache.scales.value;
    head = cache_head(shape, kind, head_of_row);
    slot = is_written ? target.slots[token] : -1;
    const KvScaleKind scale_kind = cache.scales.kind;
    if (is_written && (scale_kind == KvScaleKind::kTensor || scale_kind == KvScaleKind::kHead)) {
      scale = scales[head * cache.scales.head_stride];
    }
  }

  // Of the largest magnitude in a lane, where each token has its own; all of a warp's lanes call
  // this.
  template <int kLanes>
  __device__ void set_token_scale(const CacheTarget& target, float largest) {
#pragma unroll
    for (int offset = kLanes / 2; offset > 0; offset /= 2) {
      largest = fmaxf(largest, __shfl_xor_sync(cuda::kFullWarp, largest, offset));
    }
    scale = target.cache.dtype == DType::kE4M3 ? kv_token_scale<Float8E4M3>(largest)
                                               : kv_token_scale<Float8E5M2>(largest);
  }

  // Writes pieces of kLaneSize elements, the first at `within` and each next one `step` beyond; the
  // first lane writes the scale.
  template <typename T, int kPieces>
  __device__ void write(const CacheTarget& target, const float (&values)[kPieces][kLaneSize],
                        int within, int step) const {
    if (slot < 0) return;
    const KvCacheLayer& cache = target.cache;
    uint32_t place;
    const uint32_t block = target.block_size.divide(static_cast<uint32_t>(slot), place);
    const int64_t index = cuda::cache_index(cache, block, place, head) + within;
    const float inverse = 1.0f / scale;
#pragma unroll
    for (int i = 0; i < kPieces; ++i) {
      const int64_t at = index + i * step;
      if (cache.dtype == DType::kE4M3) {
        *reinterpret_cast<uint2*>(static_cast<char*>(side) + at) =
            cuda::encode<Float8E4M3>(values[i], inverse);
      } else if (cache.dtype == DType::kE5M2) {
        *reinterpret_cast<uint2*>(static_cast<char*>(side) + at) =
            cuda::encode<Float8E5M2>(values[i], inverse);
      } else {
        cuda::store_exact(static_cast<T*>(side) + at, values[i]);
      }
    }
    if (cache.scales.kind == KvScaleKind::kToken && within == 0) {
      scales[cache.scales.index(block, place, head)] = scale;
    }
  }
};

__device__ void load_half(const float* from, float (&values)[kLaneSize]) {
  static_assert(kLaneSize == 8);
  const float4 half = *reinterpret_cast<const float4*>(from);
  values[0] = half.x;
  values[1] = half.y;
  values[2] = half.z;
  values[3] = half.w;
}

// kLanes: head_dim / 8 if kWhole, else the next power of two; from 2 to 32.
template <typename T, int kLanes, bool kWhole>
__global__ void __launch_bounds__(kThreads)
    qkv_prepare_kernel(const __grid_constant__ QkvPrepareParams params,
                       const __grid_constant__ CacheTarget target, const int32_t* positions) {
  constexpr int kHeads = kThreads / kLanes;  // of a block
  const HeadShape& shape = params.shape;
  const int head_dim = kWhole ? kLanes * kLaneSize : shape.head_dim;
  const int32_t num_heads = shape.num_heads + 2 * shape.num_kv_heads;
  const int lane = threadIdx.x % kLanes;
  const int64_t token = blockIdx.x;
  // Lanes without a part of a head stay for the shuffles.
  const int32_t head = blockIdx.y * kHeads + threadIdx.x / kLanes;
  const bool active = head < num_heads && (kWhole || lane * kLaneSize < head_dim);
  const HeadKind kind = head_kind(shape, head);
  const bool is_turned = active && kind != HeadKind::kValue;
  const int64_t start = (token * num_heads + head) * head_dim + lane * kLaneSize;

  float norm[kLaneSize];
  if (params.q_norm != nullptr && is_turned) {
    cuda::load_values((kind == HeadKind::kQuery ? params.q_norm : params.k_norm) + lane * kLaneSize,
                      norm);
  }
  cuda::wait_for_previous();
  cuda::launch_next();  // not before: see PagedAttentionParams::follows_prepare

  // First, since angles wait for it.
  const int64_t position = params.rope != nullptr ? positions[token] : 0;
  float pieces[1][kLaneSize] = {};
  float (&values)[kLaneSize] = pieces[0];
  if (active) {
    cuda::load_values(static_cast<const T*>(params.qkv) + start, values);
  }
  CacheHead cached(target, shape, kind, head, token,
                   params.cache != nullptr && active && kind != HeadKind::kQuery);
  // Lanes of the elements that RoPE turns, and those of the first elements of half-split pairs.
  const int pairs = params.rope_pairs;
  const int pair_lanes = pairs / kLaneSize;
  const bool rotates = is_turned && lane * kLaneSize < 2 * pairs;
  float cosines[kLaneSize];  // the first half of them if pairs are interleaved
  float sines[kLaneSize];
  if (params.rope != nullptr && rotates) {
    const float* angles = params.rope + position * (2 * pairs);
    if (params.interleaved) {
      load_half(angles + lane * (kLaneSize / 2), cosines);
      load_half(angles + pairs + lane * (kLaneSize / 2), sines);
    } else {
      const int first = (lane < pair_lanes ? lane : lane - pair_lanes) * kLaneSize;
      cuda::load_values(angles + first, cosines);
      cuda::load_values(angles + pairs + first, sines);
    }
  }

  if (params.q_norm != nullptr) {
    float squares = 0.0f;
#pragma unroll
    for (int i = 0; i < kLaneSize; ++i) squares = fmaf(values[i], values[i], squares);
#pragma unroll
    for (int offset = kLanes / 2; offset > 0; offset /= 2) {
      squares += __shfl_xor_sync(cuda::kFullWarp, squares, offset);
    }
    if (is_turned) {
      const float scale = 1.0f / sqrtf(squares / static_cast<float>(head_dim) + params.eps);
#pragma unroll
      for (int i = 0; i < kLaneSize; ++i) values[i] = values[i] * scale * norm[i];
      cuda::round_values<T>(values);
    }
  }

  if (params.rope != nullptr) {
    if (params.interleaved) {
      if (rotates) {
#pragma unroll
        for (int i = 0; i < kLaneSize; i += 2) {
          const float first = values[i];
          const float second = values[i + 1];
          values[i] = turn_first(first, second, cosines[i / 2], sines[i / 2]);
          values[i + 1] = turn_second(first, second, cosines[i / 2], sines[i / 2]);
        }
      }
    } else {
      const bool is_first = lane < pair_lanes;
      const int partner = is_first ? lane + pair_lanes : rotates ? lane - pair_lanes : lane;
#pragma unroll
      for (int i = 0; i < kLaneSize; ++i) {
        const float other = __shfl_sync(cuda::kFullWarp, values[i], partner, kLanes);
        if (!rotates) continue;
        const float first = is_first ? values[i] : other;
        const float second = is_first ? other : values[i];
        values[i] = is_first ? turn_first(first, second, cosines[i], sines[i])
                             : turn_second(first, second, cosines[i], sines[i]);
      }
    }
    if (rotates) cuda::round_values<T>(values);
  }

  if (target.cache.scales.kind == KvScaleKind::kToken) {
    cached.set_token_scale<kLanes>(target, cuda::largest_finite(values));
  }
  if (!active) return;
  const bool stays = kind == HeadKind::kValue && params.out == params.qkv;
  if (!stays) cuda::store_exact(static_cast<T*>(params.out) + start, values);
  cached.write<T>(target, pieces, lane * kLaneSize, 0);
}

// Heads of 2 * kLanes * kLaneSize elements, all of which RoPE turns in half-split pairs.
template <typename T, int kLanes, bool kNorms>
__global__ void __launch_bounds__(kThreads)
    qkv_prepare_paired_kernel(const __grid_constant__ QkvPrepareParams params,
                              const __grid_constant__ CacheTarget target,
                              const int32_t* positions) {
  constexpr int kHeads = kThreads / kLanes;  // of a block
  constexpr int kHalf = kLanes * kLaneSize;
  const HeadShape& shape = params.shape;
  const int32_t num_heads = shape.num_heads + 2 * shape.num_kv_heads;
  const int within = threadIdx.x % kLanes * kLaneSize;
  const int64_t token = blockIdx.x;
  // Lanes without a head stay for the shuffles.
  const int32_t head = blockIdx.y * kHeads + threadIdx.x / kLanes;
  const bool active = head < num_heads;
  const HeadKind kind = head_kind(shape, head);
  const bool is_turned = active && kind != HeadKind::kValue;
  const int64_t start = (token * num_heads + head) * (2 * kHalf) + within;

  float norm[kNorms ? 2 : 1][kLaneSize];
  if (kNorms && is_turned) {
    const float* from = (kind == HeadKind::kQuery ? params.q_norm : params.k_norm) + within;
#pragma unroll
    for (int half = 0; half < (kNorms ? 2 : 0); ++half) {
      cuda::load_values(from + half * kHalf, norm[half]);
    }
  }
  cuda::wait_for_previous();
  cuda::launch_next();

  const int64_t position = positions[token];  // first, since angles wait for it
  float values[2][kLaneSize] = {};
  if (active) {
    const T* from = static_cast<const T*>(params.qkv) + start;
    cuda::load_values(from, values[0]);
    cuda::load_values(from + kHalf, values[1]);
  }
  CacheHead cached(target, shape, kind, head, token,
                   params.cache != nullptr && active && kind != HeadKind::kQuery);
  float cosines[kLaneSize];
  float sines[kLaneSize];
  if (is_turned) {
    const float* angles = params.rope + position * (2 * kHalf) + within;
    cuda::load_values(angles, cosines);
    cuda::load_values(angles + kHalf, sines);
  }

  if constexpr (kNorms) {
    // In the other kernel's order, whose first exchange is between the halves.
    float squares[2] = {};
#pragma unroll
    for (int half = 0; half < 2; ++half) {
#pragma unroll
      for (int i = 0; i < kLaneSize; ++i) {
        squares[half] = fmaf(values[half][i], values[half][i], squares[half]);
      }
    }
    float sum = squares[0] + squares[1];
#pragma unroll
    for (int offset = kLanes / 2; offset > 0; offset /= 2) {
      sum += __shfl_xor_sync(cuda::kFullWarp, sum, offset);
    }
    if (is_turned) {
      const float scale = 1.0f / sqrtf(sum / static_cast<float>(2 * kHalf) + params.eps);
#pragma unroll
      for (int half = 0; half < 2; ++half) {
#pragma unroll
        for (int i = 0; i < kLaneSize; ++i) {
          values[half][i] = values[half][i] * scale * norm[half][i];
        }
        cuda::round_values<T>(values[half]);
      }
    }
  }
  if (is_turned) {
#pragma unroll
    for (int i = 0; i < kLaneSize; ++i) {
      const float first = values[0][i];
      const float second = values[1][i];
      values[0][i] = turn_first(first, second, cosines[i], sines[i]);
      values[1][i] = turn_second(first, second, cosines[i], sines[i]);
    }
    cuda::round_values<T>(values[0]);
    cuda::round_values<T>(values[1]);
  }
  if (target.cache.scales.kind == KvScaleKind::kToken) {
    cached.set_token_scale<kLanes>(
        target, fmaxf(cuda::largest_finite(values[0]), cuda::largest_finite(values[1])));
  }
  if (!active) return;
  const bool stays = kind == HeadKind::kValue && params.out == params.qkv;
  if (!stays) {
    T* to = static_cast<T*>(params.out) + start;
    cuda::store_exact(to, values[0]);
    cuda::store_exact(to + kHalf, values[1]);
  }
  cached.write<T>(target, values, within, kHalf);
}

// A block writes the codes of a head, and its scale if the token has one.
template <typename F>
__device__ void write_codes(const KvCacheLayer& cache, bool is_key, uint32_t block, uint32_t place,
                            int32_t head, int64_t index, const float* values) {
  const KvScales& scales = cache.scales;
  float* const stored = (is_key ? scales.key : scales.value) + scales.index(block, place, head);
  float scale;
  if (scales.kind == KvScaleKind::kToken) {
    float largest = 0.0f;
    for (int32_t i = threadIdx.x; i < cache.head_dim; i += kThreads) {
      largest = fmaxf(largest, cuda::finite_magnitude(values[i]));
    }
    scale = kv_token_scale<F>(cuda::block_max<kThreads>(largest));
    if (threadIdx.x == 0) *stored = scale;
  } else {
    scale = *stored;
  }
  const float inverse = 1.0f / scale;
  F* codes = static_cast<F*>(is_key ? cache.key : cache.value) + index;
  for (int32_t i = threadIdx.x; i < cache.head_dim; i += kThreads) {
    codes[i] = F{static_cast<uint8_t>(cuda::encode_pair<F>(values[i] * inverse, 0.0f))};
  }
}

// Any head_dim: a block per token and head, which lies in shared memory as float.
template <typename T>
__global__ void __launch_bounds__(kThreads)
    qkv_prepare_any_kernel(const __grid_constant__ QkvPrepareParams params,
                           const __grid_constant__ CacheTarget target, const int32_t* positions) {
  __shared__ float values[kMaxHeadDim];
  cuda::wait_for_previous();
  cuda::launch_next();
  const HeadShape& shape = params.shape;
  const int32_t head_dim = shape.head_dim;
  const int64_t token = blockIdx.x;
  const int32_t head = blockIdx.y;
  const HeadKind kind = head_kind(shape, head);
  const int64_t num_heads = shape.num_heads + 2 * shape.num_kv_heads;
  const int64_t start = (token * num_heads + head) * head_dim;

  const T* source = static_cast<const T*>(params.qkv) + start;
  for (int32_t i = threadIdx.x; i < head_dim; i += kThreads) values[i] = to_float(source[i]);

  const float* norm = kind == HeadKind::kQuery ? params.q_norm
                      : kind == HeadKind::kKey ? params.k_norm
                                               : nullptr;
  if (norm != nullptr) {
    // In the other kernel's order: it takes the norm where RoPE is launched by itself.
    __shared__ float sum;
    __syncthreads();
    if (threadIdx.x < cuda::kWarpSize) {
      float squares = 0.0f;
      const int32_t first = static_cast<int32_t>(threadIdx.x) * kLaneSize;
      for (int32_t i = first; i < min(first + kLaneSize, head_dim); ++i) {
        squares = fmaf(values[i], values[i], squares);
      }
#pragma unroll
      for (int offset = cuda::kWarpSize / 2; offset > 0; offset /= 2) {
        squares += __shfl_xor_sync(cuda::kFullWarp, squares, offset);
      }
      if (threadIdx.x == 0) sum = squares;
    }
    __syncthreads();
    const float scale = 1.0f / sqrtf(sum / static_cast<float>(head_dim) + params.eps);
    for (int32_t i = threadIdx.x; i < head_dim; i += kThreads) {
      values[i] = rounded<T>(values[i] * scale * norm[i]);
    }
  }
  __syncthreads();

  if (params.rope != nullptr && kind != HeadKind::kValue) {
    const int32_t pairs = params.rope_pairs;
    const float* angles = params.rope + int64_t{positions[token]} * (2 * pairs);
    for (int32_t i = threadIdx.x; i < pairs; i += kThreads) {
      const float c = angles[i];
      const float s = angles[pairs + i];
      float& low = values[params.interleaved ? 2 * i : i];
      float& high = values[params.interleaved ? 2 * i + 1 : pairs + i];
      const float first = low;
      const float second = high;
      low = rounded<T>(turn_first(first, second, c, s));
      high = rounded<T>(turn_second(first, second, c, s));
    }
    __syncthreads();
  }

  T* out = static_cast<T*>(params.out) + start;
  for (int32_t i = threadIdx.x; i < head_dim; i += kThreads) out[i] = exactly<T>(values[i]);
  if (params.cache == nullptr || kind == HeadKind::kQuery) return;
  const int64_t slot = target.slots[token];
  if (slot < 0) return;
  const KvCacheLayer& cache = target.cache;
  const bool is_key = kind == HeadKind::kKey;
  const int32_t kv_head = cache_head(shape, kind, head);
  uint32_t place;
  const uint32_t block = target.block_size.divide(static_cast<uint32_t>(slot), place);
  const int64_t index = cuda::cache_index(cache, block, place, kv_head);
  if (cache.dtype == DType::kE4M3) {
    write_codes<Float8E4M3>(cache, is_key, block, place, kv_head, index, values);
  } else if (cache.dtype == DType::kE5M2) {
    write_codes<Float8E5M2>(cache, is_key, block, place, kv_head, index, values);
  } else {
    T* to = static_cast<T*>(is_key ? cache.key : cache.value) + index;
    for (int32_t i = threadIdx.x; i < head_dim; i += kThreads) to[i] = exactly<T>(values[i]);
  }
}

// Whether every address that the first kernel touches is that of a vector.
bool all_aligned(const QkvPrepareParams& params, const KvCacheLayer& cache) {
  const void* vectors[] = {params.qkv, params.out, params.q_norm, params.k_norm, params.rope};
  // A lane writes eight elements of the cache, of a byte or of two or more.
  const int64_t bytes = is_float8(cache.dtype) ? kLaneSize : cuda::kVectorBytes;
  const void* targets[] = {cache.key, cache.value};
  const int64_t strides[] = {cache.block_stride, cache.token_stride, cache.head_stride};
  return std::all_of(std::begin(vectors), std::end(vectors), cuda::is_vector_aligned) &&
         std::all_of(
             std::begin(targets), std::end(targets),
             [&](const void* target) { return reinterpret_cast<intptr_t>(target) % bytes == 0; }) &&
         std::all_of(std::begin(strides), std::end(strides),
                     [](int64_t stride) { return stride % kLaneSize == 0; });
}

template <typename T>
void launch_qkv_prepare(const QkvPrepareParams& params, const CacheTarget& target,
                        const StepContext& ctx) {
  const HeadShape& shape = params.shape;
  const int32_t lanes = shape.head_dim / kLaneSize;
  // Half-split pairs are in two lanes at the same place, interleaved ones in one.
  const bool divides = params.rope == nullptr ||
                       params.rope_pairs % (params.interleaved ? kLaneSize / 2 : kLaneSize) == 0;
  const int32_t heads = shape.num_heads + 2 * shape.num_kv_heads;
  const auto run = [&](auto* kernel, int32_t block_heads) {
    const dim3 grid(ctx.sizes.num_tokens, (heads + block_heads - 1) / block_heads);
    cuda::launch(kOp, ctx, kernel, grid, kThreads, 0, params, target, ctx.infer.positions);
  };
  if (!divides || lanes < 2 || !all_aligned(params, target.cache)) {
    return run(qkv_prepare_any_kernel<T>, 1);
  }
  // Half as many lanes where each can have both elements of its pairs.
  const auto run_paired = [&](auto half) {
    constexpr int kLanes = decltype(half)::value;
    run(params.q_norm != nullptr ? qkv_prepare_paired_kernel<T, kLanes, true>
                                 : qkv_prepare_paired_kernel<T, kLanes, false>,
        kThreads / kLanes);
  };
  if (params.rope != nullptr && !params.interleaved && 2 * params.rope_pairs == shape.head_dim) {
    switch (lanes) {
      case 8:
        return run_paired(std::integral_constant<int, 4>{});
      case 16:
        return run_paired(std::integral_constant<int, 8>{});
      case 32:
        return run_paired(std::integral_constant<int, 16>{});
    }
  }
  switch (lanes) {
    case 2:
      return run(qkv_prepare_kernel<T, 2, true>, kThreads / 2);
    case 4:
      return run(qkv_prepare_kernel<T, 4, true>, kThreads / 4);
    case 8:
      return run(qkv_prepare_kernel<T, 8, true>, kThreads / 8);
    case 16:
      return run(qkv_prepare_kernel<T, 16, true>, kThreads / 16);
    case 32:
      return run(qkv_prepare_kernel<T, 32, true>, kThreads / 32);
  }
  if (lanes < 8) return run(qkv_prepare_kernel<T, 8, false>, kThreads / 8);
  if (lanes < 16) return run(qkv_prepare_kernel<T, 16, false>, kThreads / 16);
  run(qkv_prepare_kernel<T, 32, false>, kThreads / 32);
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
  check(params.out != nullptr, kOp, "out is not given");
  check(
      params.rope == nullptr || (params.rope_pairs > 0 && 2 * params.rope_pairs <= shape.head_dim),
      kOp, "rope_pairs is ", params.rope_pairs, "; it must be in [1, ", shape.head_dim / 2, "]");
  CacheTarget target;
  if (params.cache != nullptr) {
    check_cache_write(kOp, *params.cache, shape, params.dtype);
    target.cache = *params.cache;
    target.slots = slots_of(params.slots, params.kv_group, ctx);
    target.block_size = cuda::FastDivider(static_cast<uint32_t>(target.cache.block_size));
  }
  if (ctx.sizes.num_tokens == 0) return;
  dispatch_activation(params.dtype, kOp, [&](auto tag) {
    launch_qkv_prepare<typename decltype(tag)::type>(params, target, ctx);
  });
}

}  // namespace mrv1
