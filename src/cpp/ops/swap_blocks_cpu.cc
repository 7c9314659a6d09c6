// Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
#include "ops/swap_blocks.h"

#include <cstring>

#include "core/thread_pool.h"
#include "state/step_context.h"

namespace mrv1 {

void swap_blocks_cpu(const SwapBlocksParams& params, const StepContext& ctx) {
  ctx.pool->parallel_for(params.count, 1, [&](int64_t begin, int64_t end, int) {
    for (int64_t i = begin; i < end; ++i) {
      const BlockCopy& copy = params.copies[i];
      std::memcpy(static_cast<char*>(params.target) + copy.target * params.target_stride,
                  static_cast<const char*>(params.source) + copy.source * params.source_stride,
                  static_cast<size_t>(params.bytes));
    }
  });
}

}  // namespace mrv1
