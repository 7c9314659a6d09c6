// Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
#include "ops/copy_blocks.h"

#include <cstring>

#include "core/thread_pool.h"
#include "state/step_context.h"

namespace mrv1 {

void copy_blocks_cpu(const CopyBlocksParams& params, const StepContext& ctx) {
  const int64_t pieces = int64_t{params.count} * params.num_arrays;
  ctx.pool->parallel_for(pieces, 1, [&](int64_t begin, int64_t end, int) {
    for (int64_t piece = begin; piece < end; ++piece) {
      const CacheArray& array = params.arrays[piece % params.num_arrays];
      const BlockCopy& copy = params.copies[piece / params.num_arrays];
      char* base = static_cast<char*>(array.base);
      std::memcpy(base + copy.target * array.stride, base + copy.source * array.stride,
                  static_cast<size_t>(array.bytes));
    }
  });
}

}  // namespace mrv1
