// Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>

namespace mrv1 {

struct WorkspaceLimits;  // ops/kernels.h

// Bytes of StepContext::workspace that sample_cpu needs: one slice for each thread.
int64_t sample_workspace_cpu(const WorkspaceLimits& limits);

}  // namespace mrv1
