// Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
#include "ops/fill_random.h"

#include "core/device.h"
#include "core/error.h"
#include "ops/kernels.h"
#include "state/step_context.h"

namespace mrv1 {

void check_params(const FillRandomParams& params) {
  check(params.count >= 0, "fill_random", "count is ", params.count, ", must not be negative");
  check(params.data != nullptr || params.count == 0, "fill_random", "data is null");
  check(params.dtype == DType::kF32 || params.dtype == DType::kBF16 || is_float8(params.dtype) ||
            params.dtype == DType::kE2M1,
        "fill_random", "data is float32, bfloat16, FP8 or E2M1, not ", dtype_name(params.dtype));
}

void fill_random(Device& device, const FillRandomParams& params) {
  run_on_stream(device, [&] {
    StepContext ctx;
    ctx.device = &device;
    ctx.pool = device.pool();
    ctx.stream = device.stream();
    device.kernels().fill_random(params, ctx);
  });
}

}  // namespace mrv1
