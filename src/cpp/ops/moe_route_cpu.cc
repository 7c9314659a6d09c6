// Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
#include <algorithm>
#include <cmath>
#include <functional>
#include <limits>

#include "core/error.h"
#include "core/thread_pool.h"
#include "ops/moe_route.h"

namespace mrv1 {
namespace {

constexpr int64_t kLogitsPerPiece = 4096;

// Scores of a token's logits; true if one of these is NaN.
bool score_experts(const MoeRouteParams& params, const float* logits, float* scores) {
  const int32_t count = params.num_experts;
  float largest = -std::numeric_limits<float>::infinity();
  bool has_nan = false;
  for (int32_t e = 0; e < count; ++e) {
    largest = logits[e] > largest ? logits[e] : largest;
    has_nan |= std::isnan(logits[e]);
  }
  if (params.scores == RouterScores::kSigmoid) {
    std::transform(logits, logits + count, scores, sigmoid_score);
    return has_nan;
  }
  float lanes[kRouterLanes] = {};
  for (int32_t e = 0; e < count; ++e) {
    scores[e] = router_exp(logits[e] - largest);
    lanes[e % kRouterLanes] += scores[e];
  }
  for (int32_t half = kRouterLanes / 2; half > 0; half /= 2) {
    for (int32_t lane = 0; lane < half; ++lane) lanes[lane] += lanes[lane + half];
  }
  for (int32_t e = 0; e < count; ++e) scores[e] /= lanes[0];
  return has_nan;
}

void route_token(const MoeRouteParams& params, const float* logits, int32_t* experts,
                 float* weights) {
  float scores[kMaxExperts];
  uint64_t keys[kMaxExperts];
  const bool has_nan = score_experts(params, logits, scores);
  for (int32_t e = 0; e < params.num_experts; ++e) {
    keys[e] = choice_key(params.bias == nullptr ? logits[e] : scores[e] + params.bias[e], e);
  }
  std::partial_sort(keys, keys + params.top_k, keys + params.num_experts, std::greater<>());
  float sum = 0.0f;
  for (int32_t j = 0; j < params.top_k; ++j) {
    experts[j] = chosen_expert(keys[j]);
    weights[j] = scores[experts[j]];
    sum += weights[j];
  }
  const float divisor = sum > params.min_sum ? sum : params.min_sum;
  for (int32_t j = 0; j < params.top_k; ++j) {
    const float share = params.renormalize ? weights[j] / divisor : weights[j];
    weights[j] = has_nan ? std::numeric_limits<float>::quiet_NaN() : share * params.scale;
  }
}

}  // namespace

void moe_route_cpu(const MoeRouteParams& params, const StepContext& ctx) {
  check(params.num_experts > 0 && params.num_experts <= kMaxExperts, "moe_route", "num_experts is ",
        params.num_experts, ", must be in [1, ", kMaxExperts, "]");
  check(params.top_k > 0 && params.top_k <= params.num_experts, "moe_route", "top_k is ",
        params.top_k, ", must be in [1, ", params.num_experts, "]");
  ctx.pool->parallel_for(
      ctx.sizes.num_tokens, std::max<int64_t>(kLogitsPerPiece / params.num_experts, 1),
      [&](int64_t begin, int64_t end, int) {
        for (int64_t t = begin; t < end; ++t) {
          int32_t* experts = params.experts + t * params.top_k;
          float* weights = params.weights + t * params.top_k;
          if (ctx.infer.token_batch != nullptr && ctx.infer.token_batch[t] < 0) {
            std::fill_n(experts, params.top_k, -1);
            std::fill_n(weights, params.top_k, 0.0f);
          } else {
            route_token(params, params.logits + t * params.num_experts, experts, weights);
          }
        }
      });
}

}  // namespace mrv1
