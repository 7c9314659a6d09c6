// Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
#pragma once

#include "ops/linear.h"
#include "ops/moe_route.h"

namespace mrv1 {

// A router whole: the linear that makes the logits, and the choice of experts by these. On a GPU a
// token's logits may be summed in another order than by linear, but not in a batch-invariant step.
struct RouterParams {
  LinearParams linear;   // out: logits, float32
  MoeRouteParams route;  // of these logits
};

void router_cpu(const RouterParams& params, const StepContext& ctx);
void router_cuda(const RouterParams& params, const StepContext& ctx);

}  // namespace mrv1
