// Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>

#include "core/portable.h"
#include "state/step_context.h"

namespace mrv1 {

// How a router's logits become scores of experts.
enum class RouterScores : int32_t { kSoftmax, kSigmoid };

// Experts that one router chooses among at most.
constexpr int32_t kMaxExperts = 1024;

// The experts of each token: the top_k of largest score + bias, by falling score + bias, ties to
// lower ids, NaN below everything. Their weights are the scores without the bias; with
// `renormalize` they are divided by their sum, or by min_sum if that is larger; then times scale.
// Without a bias experts are chosen by their logits, which order them as the scores do, so that
// all backends choose alike. Tokens of padding and of masked rows have experts -1 and weights 0.
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

void moe_route_cpu(const MoeRouteParams& params, const StepContext& ctx);
void moe_route_cuda(const MoeRouteParams& params, const StepContext& ctx);

}  // namespace mrv1
