// Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>

#include "ops/copy_blocks.h"

namespace mrv1 {

// Copies blocks of one array into another one that does not overlap it: block copies[i].target of
// the target becomes block copies[i].source of the source, byte by byte. No target is named twice.
// On a GPU either array may lie in pinned host memory that the device addresses; the copy runs in
// stream order, and the host waits for nothing.
struct SwapBlocksParams {
  static constexpr int32_t kMaxCopies = 128;  // parameters travel with the launch

  const void* source;
  void* target;
  int64_t source_stride, target_stride;  // bytes from a block to the next one
  int64_t bytes;                         // of a block
  int32_t count;
  BlockCopy copies[kMaxCopies];  // ids in range
};

void swap_blocks_cpu(const SwapBlocksParams& params, const StepContext& ctx);
void swap_blocks_cuda(const SwapBlocksParams& params, const StepContext& ctx);

}  // namespace mrv1
