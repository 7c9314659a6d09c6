// Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
#include "ops/router.h"

namespace mrv1 {

void router_cpu(const RouterParams& params, const StepContext& ctx) {
  linear_cpu(params.linear, ctx);
  moe_route_cpu(params.route, ctx);
}

}  // namespace mrv1
