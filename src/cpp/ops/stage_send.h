// Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
#pragma once

#include "core/dtype.h"
#include "dist/stage_link.h"
#include "state/step_context.h"

namespace mrv1 {

// Writes values of a step's tokens, padding included, into the buffers of the next stage
// (StageLink::next_values), once that has let go of those of the step before, and tells it.
struct StageSendParams {
  const void* values[kMaxStageValues];  // [tokens, cols] each
  int64_t row_bytes[kMaxStageValues];   // of each
  int32_t num_values;                   // as the link has them
};

void stage_send_cpu(const StageSendParams& params, const StepContext& ctx);
void stage_send_cuda(const StageSendParams& params, const StepContext& ctx);

}  // namespace mrv1
