// Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
#pragma once

#include "ops/linear.h"

namespace mrv1::cuda {

// Any linear that linear_cuda accepts, of any size, in one kernel. Each output is one chain of
// fused multiply-adds over the columns in ascending order, whatever the number of rows. Rows of x
// and of the weight lie `stride` elements apart, weight.cols at least.
void linear_tiled(const LinearParams& params, int64_t rows, int64_t stride, const StepContext& ctx);

}  // namespace mrv1::cuda
