// Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>

#include "ops/copy_blocks.h"

namespace mrv1 {

// Makes all bytes of blocks 0 in every array: keys, values and scales of tokens are then 0. Static
// scales are no part of a block.
struct ZeroBlocksParams {
  static constexpr int32_t kMaxBlocks = 128;  // parameters travel with the launch

  const CacheArray* arrays;  // [num_arrays], device memory
  int32_t num_arrays;
  int32_t count;
  int32_t blocks[kMaxBlocks];  // ids in range
};

void zero_blocks_cpu(const ZeroBlocksParams& params, const StepContext& ctx);
void zero_blocks_cuda(const ZeroBlocksParams& params, const StepContext& ctx);

}  // namespace mrv1
