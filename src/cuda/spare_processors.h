// Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>

#include "state/step_context.h"

namespace mrv1::cuda {

// Processors that a kernel with a block for each of them leaves to the collective that runs beside
// it, a block on each. Otherwise some of its blocks could begin only after the collective, and the
// kernel would end as late as if nothing had overlapped.
inline int32_t spare_processors(const StepContext& ctx) { return ctx.collective_blocks; }

}  // namespace mrv1::cuda
