// Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
//
// Up to 256 experts a block routes a token, and a thread has an expert: it counts how many come
// before its own in the choice, which is its place. For more a warp routes a token: lane l has
// experts l, l + 32, ..., in registers, and a choice is two reductions over the warp: the largest
// value among the experts left, and the lowest expert that has it. Sums of the softmax have the
// order that the header states.
#include "block.cuh"
#include "launch.h"
#include "ops/moe_route.h"

namespace mrv1 {
namespace {

constexpr std::string_view kOp = "moe_route";
constexpr int kMaxWarps = 4;  // tokens of a block

static_assert(kRouterLanes == cuda::kWarpSize);

// The upper half of choice_key(), which orders values.
__device__ __forceinline__ uint32_t order_of(float value) {
  return static_cast<uint32_t>(choice_key(value, 0) >> 32);
}

constexpr int kMaxCounted = 256;  // experts of route_by_count_kernel

__global__ void __launch_bounds__(kMaxCounted)
    route_by_count_kernel(MoeRouteParams params, const int32_t* token_batch) {
  constexpr unsigned kAll = cuda::kFullWarp;
  __shared__ uint4 orders4[kMaxCounted / 4];
  __shared__ float powers[kMaxCounted], chosen[kMaxCounted];
  __shared__ uint32_t largest_of_warp[kMaxCounted / cuda::kWarpSize];
  __shared__ int nan_of_warp[kMaxCounted / cuda::kWarpSize];
  uint32_t* orders = reinterpret_cast<uint32_t*>(orders4);
  const int lane = threadIdx.x % cuda::kWarpSize;
  const int warp = threadIdx.x / cuda::kWarpSize;
  const int warps = blockDim.x / cuda::kWarpSize;
  const int e = threadIdx.x;
  const int64_t token = blockIdx.x;
  const bool exists = e < params.num_experts;
  const float bias = params.bias != nullptr && exists ? params.bias[e] : 0.0f;
  cuda::launch_next();
  cuda::wait_for_previous();
  int32_t* experts = params.experts + token * params.top_k;
  float* weights = params.weights + token * params.top_k;
  if (token_batch != nullptr && token_batch[token] < 0) {
    for (int j = e; j < params.top_k; j += blockDim.x) {
      experts[j] = -1;
      weights[j] = 0.0f;
    }
    return;
  }

  // Experts that do not exist are like those of NaN, and have higher ids.
  const float nan = bits_to_float(0x7fc00000u);
  const float logit = exists ? params.logits[token * params.num_experts + e] : nan;
  uint32_t order = order_of(logit);
  orders[e] = order;
  const uint32_t largest = __reduce_max_sync(kAll, order);
  const bool has_nan = __any_sync(kAll, exists && logit != logit);
  if (lane == 0) {
    largest_of_warp[warp] = largest;
    nan_of_warp[warp] = has_nan;
  }
  float score = 0.0f;
  if (params.scores == RouterScores::kSigmoid) score = sigmoid_score(logit);
  __syncthreads();
  if (params.scores == RouterScores::kSoftmax) {
    uint32_t top = 0;
    for (int w = 0; w < warps; ++w) top = max(top, largest_of_warp[w]);
    // NaN alone has no largest logit.
    score =
        top == 0 ? nan : router_exp(logit - logit_of_key(static_cast<int32_t>(top ^ 0x80000000u)));
    powers[e] = score;
    __syncthreads();
    float sum = 0.0f;
    for (int other = lane; other < params.num_experts; other += cuda::kWarpSize) {
      sum += powers[other];
    }
    score /= cuda::warp_sum(sum);
  }
  if (params.bias != nullptr) {
    order = exists ? order_of(score + bias) : 0;
    orders[e] = order;
    __syncthreads();
  }
  int place = 0;
  for (int i = 0; i < static_cast<int>(blockDim.x) / 4; ++i) {
    const uint4 four = orders4[i];
    const int before = e - i * 4;  // how many of them have lower ids
    place += four.x > order || (four.x == order && 0 < before);
    place += four.y > order || (four.y == order && 1 < before);
    place += four.z > order || (four.z == order && 2 < before);
    place += four.w > order || (four.w == order && 3 < before);
  }
  if (place < params.top_k) {
    experts[place] = e;
    chosen[place] = score;
  }
  __syncthreads();
  if (e >= params.top_k) return;
  float sum = 0.0f;
  for (int j = 0; j < params.top_k; ++j) sum += chosen[j];
  const float divisor = sum > params.min_sum ? sum : params.min_sum;
  const float share = params.renormalize ? chosen[e] / divisor : chosen[e];
  bool any_nan = false;
  for (int w = 0; w < warps; ++w) any_nan |= nan_of_warp[w] != 0;
  weights[e] = any_nan ? nan : share * params.scale;
}

// kPerLane experts a lane at most.
template <int kPerLane>
__global__ void __launch_bounds__(kMaxWarps* cuda::kWarpSize)
    route_kernel(MoeRouteParams params, const int32_t* token_batch, int32_t num_tokens) {
  extern __shared__ float chosen_scores[];  // [warps][top_k]
  constexpr unsigned kAll = cuda::kFullWarp;
  const int lane = threadIdx.x % cuda::kWarpSize;
  const int warp = threadIdx.x / cuda::kWarpSize;
  const int token = blockIdx.x * (blockDim.x / cuda::kWarpSize) + warp;
  float bias[kPerLane];
#pragma unroll
  for (int i = 0; i < kPerLane; ++i) {
    const int e = i * cuda::kWarpSize + lane;
    bias[i] = params.bias != nullptr && e < params.num_experts ? params.bias[e] : 0.0f;
  }
  cuda::launch_next();
  cuda::wait_for_previous();
  if (token >= num_tokens) return;
  int32_t* experts = params.experts + int64_t{token} * params.top_k;
  float* weights = params.weights + int64_t{token} * params.top_k;
  if (token_batch != nullptr && token_batch[token] < 0) {
    for (int j = lane; j < params.top_k; j += cuda::kWarpSize) {
      experts[j] = -1;
      weights[j] = 0.0f;
    }
    return;
  }

  const float infinity = bits_to_float(0x7f800000u);
  const float nan = bits_to_float(0x7fc00000u);
  const float* logits = params.logits + int64_t{token} * params.num_experts;
  float scores[kPerLane];
  uint32_t orders[kPerLane];
  uint32_t left = 0;  // a bit for each expert that exists and is not chosen
  float largest = -infinity;
  bool has_nan = false;
#pragma unroll
  for (int i = 0; i < kPerLane; ++i) {
    const int e = i * cuda::kWarpSize + lane;
    const bool exists = e < params.num_experts;
    scores[i] = exists ? logits[e] : -infinity;
    left |= uint32_t{exists} << i;
    largest = scores[i] > largest ? scores[i] : largest;
    has_nan |= scores[i] != scores[i];
  }
  has_nan = __any_sync(kAll, has_nan);
  for (int offset = cuda::kWarpSize / 2; offset > 0; offset /= 2) {
    const float other = __shfl_xor_sync(kAll, largest, offset);
    largest = other > largest ? other : largest;
  }
  if (params.bias == nullptr) {
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) orders[i] = order_of(scores[i]);
  }
  if (params.scores == RouterScores::kSigmoid) {
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) scores[i] = sigmoid_score(scores[i]);
  } else {
    float sum = 0.0f;
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) {
      scores[i] = router_exp(scores[i] - largest);
      if (left >> i & 1) sum += scores[i];
    }
    sum = cuda::warp_sum(sum);
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) scores[i] /= sum;
  }
  if (params.bias != nullptr) {
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) orders[i] = order_of(scores[i] + bias[i]);
  }

  float* mine = chosen_scores + warp * params.top_k;
  float sum = 0.0f;
  for (int j = 0; j < params.top_k; ++j) {
    // Among values above those of NaN; if none is left, any.
    uint32_t best = 0;
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) {
      if (left >> i & 1) best = max(best, orders[i]);
    }
    best = __reduce_max_sync(kAll, best);
    uint32_t expert = 0xffffffffu;
#pragma unroll
    for (int i = kPerLane - 1; i >= 0; --i) {
      if ((left >> i & 1) && orders[i] == best) expert = i * cuda::kWarpSize + lane;
    }
    expert = __reduce_min_sync(kAll, expert);
    float score = 0.0f;
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) {
      if (i == expert / cuda::kWarpSize) score = scores[i];
    }
    score = __shfl_sync(kAll, score, expert % cuda::kWarpSize);
    sum += score;
    if (lane == expert % cuda::kWarpSize) {
      left &= ~(1u << expert / cuda::kWarpSize);
      experts[j] = static_cast<int32_t>(expert);
      mine[j] = score;
    }
  }
  __syncwarp();
  const float divisor = sum > params.min_sum ? sum : params.min_sum;
  for (int j = lane; j < params.top_k; j += cuda::kWarpSize) {
    const float share = params.renormalize ? mine[j] / divisor : mine[j];
    weights[j] = has_nan ? nan : share * params.scale;
  }
}

}  // namespace

void moe_route_cuda(const MoeRouteParams& params, const StepContext& ctx) {
  check(params.num_experts > 0 && params.num_experts <= kMaxExperts, kOp, "num_experts is ",
        params.num_experts, ", must be in [1, ", kMaxExperts, "]");
  check(params.top_k > 0 && params.top_k <= params.num_experts, kOp, "top_k is ", params.top_k,
        ", must be in [1, ", params.num_experts, "]");
  const int32_t tokens = ctx.sizes.num_tokens;
  if (tokens == 0) return;
  if (params.num_experts <= kMaxCounted) {
    const int threads =
        (params.num_experts + cuda::kWarpSize - 1) / cuda::kWarpSize * cuda::kWarpSize;
    cuda::launch(kOp, ctx, route_by_count_kernel, tokens, threads, 0, params,
                 ctx.infer.token_batch);
    return;
  }
  const int warps = tokens < kMaxWarps ? tokens : kMaxWarps;
  const size_t shared_bytes = sizeof(float) * warps * params.top_k;
  const auto run = [&](auto* kernel) {
    cuda::launch(kOp, ctx, kernel, (tokens + warps - 1) / warps, warps * cuda::kWarpSize,
                 shared_bytes, params, ctx.infer.token_batch, tokens);
  };
  const int32_t per_lane = (params.num_experts + cuda::kWarpSize - 1) / cuda::kWarpSize;
  if (per_lane <= 16) return run(route_kernel<16>);
  run(route_kernel<32>);
}

}  // namespace mrv1
