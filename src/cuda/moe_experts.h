// Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
#pragma once

#include "ops/kernels.h"

namespace mrv1 {

// Bytes of StepContext::workspace that moe_experts_cuda needs, 0 without experts.
int64_t moe_experts_workspace_cuda(const WorkspaceLimits& limits);

}  // namespace mrv1
