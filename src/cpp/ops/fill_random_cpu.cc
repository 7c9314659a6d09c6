// Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
#include "ops/fill_random.h"

#include "core/error.h"
#include "core/thread_pool.h"
#include "state/step_context.h"

namespace mrv1 {

void fill_random_cpu(const FillRandomParams& params, const StepContext& ctx) {
  check_params(params);
  if (params.dtype == DType::kE2M1) {
    auto* bytes = static_cast<uint8_t*>(params.data);
    ctx.pool->parallel_for(params.count, 1 << 16, [&](int64_t begin, int64_t end, int) {
      for (int64_t i = begin; i < end; ++i) {
        bytes[i] = random_byte(params.key, params.first + static_cast<uint64_t>(i));
      }
    });
    return;
  }
  dispatch_cache(params.dtype, "fill_random", [&](auto tag) {
    using T = typename decltype(tag)::type;
    T* data = static_cast<T*>(params.data);
    ctx.pool->parallel_for(params.count, 1 << 16, [&](int64_t begin, int64_t end, int) {
      for (int64_t i = begin; i < end; ++i) {
        const float unit = random_unit(params.key, params.first + static_cast<uint64_t>(i));
        const BFloat16 rounded = from_float<BFloat16>(params.center + params.width * unit);
        data[i] = from_float<T>(to_float(rounded));
      }
    });
  });
}

}  // namespace mrv1
