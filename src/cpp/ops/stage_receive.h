// Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
#pragma once

#include "state/step_context.h"

namespace mrv1 {

// Waits until the stage before has written this step's values into the buffers that this rank
// showed it: the op moves nothing.
void stage_receive_cpu(const StepContext& ctx);
void stage_receive_cuda(const StepContext& ctx);

// After the last op that reads them: lets go of the values, so that the stage before may write
// those of the next step.
void stage_release_cpu(const StepContext& ctx);
void stage_release_cuda(const StepContext& ctx);

}  // namespace mrv1
