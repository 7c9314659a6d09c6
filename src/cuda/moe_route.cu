// Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
//
// Up to 256 experts and 1,024 tokens a block routes a token, and a thread has an expert: it counts
// how many come before its own in the choice, which is its place, which is quick for a token but
// more work. Else a warp routes a token: lane l has
// experts l, l + 32, ..., in registers, and a choice is two reductions over the warp: the largest
// value among the experts left, and the lowest expert that has it. Sums of the softmax have the
// order that the header states.
#include "block.cuh"
#include "launch.h"
#include "moe_route.cuh"

namespace mrv1 {
namespace {

using cuda::kMaxCounted;
using cuda::order_of;
using cuda::route_by_count;
using cuda::RouteScratch;

constexpr std::string_view kOp = "moe_route";
constexpr int kMaxWarps = 4;  // tokens of a block
constexpr int32_t kMaxCountedTokens = 1024;

static_assert(kRouterLanes == cuda::kWarpSize);

__global__ void __launch_bounds__(kMaxCounted)
    route_by_count_kernel(MoeRouteParams params, const int32_t* token_batch) {
  __shared__ RouteScratch scratch;
  const int e = threadIdx.x;
  const bool exists = e < params.num_experts;
  const float bias = params.bias != nullptr && exists ? params.bias[e] : 0.0f;
  cuda::launch_next();
  cuda::wait_for_previous();
  const int64_t token = blockIdx.x;
  const float logit = exists ? params.logits[token * params.num_experts + e] : 0.0f;
  route_by_count(params, token_batch, token, logit, bias, scratch);
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
  if (params.num_experts <= kMaxCounted && tokens <= kMaxCountedTokens) {
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
  if (per_lane <= 2) return run(route_kernel<2>);
  if (per_lane <= 4) return run(route_kernel<4>);
  if (per_lane <= 8) return run(route_kernel<8>);
  if (per_lane <= 16) return run(route_kernel<16>);
  run(route_kernel<32>);
}

}  // namespace mrv1
