// Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>

#include "core/portable.h"
#include "sampling/math.h"
#include "state/step_context.h"

namespace mrv1 {

// How a router's logits become scores of experts.
enum class RouterScores : int32_t { kSoftmax, kSigmoid };

// Experts that one router chooses among at most.
constexpr int32_t kMaxExperts = 1024;

// The experts of each token: the top_k of largest score + bias, by falling score + bias, ties to
// lower ids, NaN below everything. Their weights are the scores without the bias; with
// `renormalize` they are divided by their sum, or by min_sum if that is larger; then times scale.
// A NaN among a token's logits makes all its weights NaN. Without a bias experts are chosen by
// their logits, which order them as the scores do. Tokens of padding and of masked rows have
// experts -1 and weights 0.
//
// All backends give the same bits: they share the functions below, a sum of weights is made by
// ascending j, and the softmax's sum by kRouterLanes lanes, lane l of experts l, l + kRouterLanes,
// ..., which are then added by halves: lane l and lane l + 16, then l + 8, and so on.
struct MoeRouteParams {
  const float* logits;  // [tokens, num_experts]
  const float* bias;    // [num_experts] or null: DeepSeek-V3's correction of the choice
  int32_t* experts;     // [tokens, top_k]
  float* weights;       // [tokens, top_k]
  int32_t num_experts;  // at most kMaxExperts
  int32_t top_k;        // at most num_experts
  RouterScores scores;
  bool renormalize;
  float min_sum;
  float scale;
};

constexpr int32_t kRouterLanes = 32;

// Order of an expert in the choice, never 0: larger value, larger key; of equal values the lower
// expert's is larger.
MRV1_HD uint64_t choice_key(float value, int32_t expert) {
  const bool is_nan = value != value;
  const uint32_t order = is_nan ? 0u : static_cast<uint32_t>(logit_key(value)) ^ 0x80000000u;
  return uint64_t{order} << 32 | (0xffffffffu - static_cast<uint32_t>(expert));
}
MRV1_HD int32_t chosen_expert(uint64_t key) {
  return static_cast<int32_t>(0xffffffffu - static_cast<uint32_t>(key));
}

// e^x for x <= 0, with a relative error below 2^-21; 0 below -87, NaN for NaN.
MRV1_HD float router_exp(float x) {
  constexpr float kLog2e = 0x1.715476p+0f;
  constexpr float kLn2High = 0x1.62e4p-1f, kLn2Low = 0x1.7f7d1cp-20f;
  constexpr float kRounder = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer
  if (x < -87.0f) return 0.0f;
  if (x != x) return x;
  const float rounded = fmaf(x, kLog2e, kRounder);
  const float n = rounded - kRounder;
  const float rest = fmaf(n, -kLn2Low, fmaf(n, -kLn2High, x));
  const float power = exp2_fraction(rest * kLog2e);
  return bits_to_float(float_to_bits(power) + (float_to_bits(rounded) << 23));
}

MRV1_HD float sigmoid_score(float logit) {
  const float power = router_exp(logit < 0.0f ? logit : -logit);
  return (logit < 0.0f ? power : 1.0f) / (1.0f + power);
}

void moe_route_cpu(const MoeRouteParams& params, const StepContext& ctx);
void moe_route_cuda(const MoeRouteParams& params, const StepContext& ctx);

}  // namespace mrv1
