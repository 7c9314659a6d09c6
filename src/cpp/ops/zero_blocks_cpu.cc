// Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
#include "ops/zero_blocks.h"

#include <cstring>

#include "core/thread_pool.h"
#include "state/step_context.h"

namespace mrv1 {

void zero_blocks_cpu(const ZeroBlocksParams& params, const StepContext& ctx) {
  const int64_t pieces = int64_t{params.count} * params.num_arrays;
  ctx.pool->parallel_for(pieces, 1, [&](int64_t begin, int64_t end, int) {
    for (int64_t piece = begin; piece < end; ++piece) {
      const CacheArray& array = params.arrays[piece % params.num_arrays];
      const int32_t block = params.blocks[piece / params.num_arrays];
      std::memset(static_cast<char*>(array.base) + block * array.stride, 0,
                  static_cast<size_t>(array.bytes));
    }
  });
}

}  // namespace mrv1
