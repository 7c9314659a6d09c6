// Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>

#include "ops/kernels.h"

namespace mrv1 {

// Bytes of StepContext::workspace that an op needs.
int64_t moe_experts_workspace_cpu(const WorkspaceLimits& limits);
int64_t paged_attention_workspace_cpu(const WorkspaceLimits& limits);

}  // namespace mrv1
