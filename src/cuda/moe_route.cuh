// Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
//
// The choice of a token's experts by a block, a thread for each expert.
#pragma once

#include "block.cuh"
#include "ops/moe_route.h"

namespace mrv1::cuda {

// The upper half of choice_key(), which orders values.
__device__ __forceinline__ uint32_t order_of(float value) {
  return static_cast<uint32_t>(choice_key(value, 0) >> 32);
}

constexpr int kMaxCounted = 256;  // experts

struct RouteScratch {
  uint4 orders[kMaxCounted / 4];
  float powers[kMaxCounted], chosen[kMaxCounted];
  uint32_t largest[kMaxCounted / kWarpSize];
  int has_nan[kMaxCounted / kWarpSize];
};

// Routes a token, with at least num_experts threads, of which the first have the experts' logits
// and biases. Every thread of the block must call it.
__device__ __forceinline__ void route_by_count(const MoeRouteParams& params,
                                               const int32_t* token_batch, int64_t token,
                                               float logit, float bias, RouteScratch& scratch) {
  constexpr unsigned kAll = kFullWarp;
  const int e = threadIdx.x;
  const int lane = e % kWarpSize;
  const int warp = e / kWarpSize;
  const int warps = (params.num_experts + kWarpSize - 1) / kWarpSize;
  const bool exists = e < params.num_experts;
  const bool has_place = warp < warps;
  int32_t* experts = params.experts + token * params.top_k;
  float* weights = params.weights + token * params.top_k;
  if (token_batch != nullptr && token_batch[token] < 0) {
    if (e < params.top_k) {
      experts[e] = -1;
      weights[e] = 0.0f;
    }
    return;
  }

  // Experts that do not exist are like those of NaN, and have higher ids.
  const float nan = bits_to_float(0x7fc00000u);
  uint32_t* orders = reinterpret_cast<uint32_t*>(scratch.orders);
  uint32_t order = exists ? order_of(logit) : 0;
  const uint32_t largest = __reduce_max_sync(kAll, order);
  const bool has_nan = __any_sync(kAll, exists && logit != logit);
  if (has_place) {
    orders[e] = order;
    if (lane == 0) {
      scratch.largest[warp] = largest;
      scratch.has_nan[warp] = has_nan;
    }
  }
  float score = 0.0f;
  if (params.scores == RouterScores::kSigmoid) score = sigmoid_score(logit);
  __syncthreads();
  if (params.scores == RouterScores::kSoftmax) {
    uint32_t top = 0;
    for (int w = 0; w < warps; ++w) top = max(top, scratch.largest[w]);
    // NaN alone has no largest logit.
    score =
        top == 0 ? nan : router_exp(logit - logit_of_key(static_cast<int32_t>(top ^ 0x80000000u)));
    if (has_place) scratch.powers[e] = score;
    __syncthreads();
    float sum = 0.0f;
    for (int other = lane; other < params.num_experts; other += kWarpSize) {
      sum += scratch.powers[other];
    }
    score /= warp_sum(sum);
  }
  if (params.bias != nullptr) {
    order = exists ? order_of(score + bias) : 0;
    if (has_place) orders[e] = order;
    __syncthreads();
  }
  if (exists) {
    int place = 0;
    for (int i = 0; i < warps * kWarpSize / 4; ++i) {
      const uint4 four = scratch.orders[i];
      const int before = e - i * 4;  // how many of them have lower ids
      place += four.x > order || (four.x == order && 0 < before);
      place += four.y > order || (four.y == order && 1 < before);
      place += four.z > order || (four.z == order && 2 < before);
      place += four.w > order || (four.w == order && 3 < before);
    }
    if (place < params.top_k) {
      experts[place] = e;
      scratch.chosen[place] = score;
    }
  }
  __syncthreads();
  if (e < params.top_k) {
    float sum = 0.0f;
    for (int j = 0; j < params.top_k; ++j) sum += scratch.chosen[j];
    const float divisor = sum > params.min_sum ? sum : params.min_sum;
    const float share = params.renormalize ? scratch.chosen[e] / divisor : scratch.chosen[e];
    bool any_nan = false;
    for (int w = 0; w < warps; ++w) any_nan |= scratch.has_nan[w] != 0;
    weights[e] = any_nan ? nan : share * params.scale;
  }
  __syncthreads();  // the scratch may be written again by the next call
}

}  // namespace mrv1::cuda
