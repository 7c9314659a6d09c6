// Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>

#include "ops/kernels.h"

namespace mrv1 {

// Bytes of StepContext::workspace that sample_cuda needs, from vocab_size and max_logits.
int64_t sample_workspace_cuda(const WorkspaceLimits& limits);

}  // namespace mrv1
