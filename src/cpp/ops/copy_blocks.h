// Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "ops/kv_cache.h"

namespace mrv1 {

struct StepContext;

// One KV block becomes what another one is.
struct BlockCopy {
  int32_t source, target;
};

// Contiguous bytes that each block has: those of block b begin at base + b * stride.
struct CacheArray {
  void* base;
  int64_t stride, bytes;
};

// Where the blocks of a layer lie, its keys, values and, where tokens have them, the scales of
// both, in as few arrays as its strides allow.
std::vector<CacheArray> block_arrays(const KvCacheLayer& layer);

// Copies whole blocks in every array, those of all layers: target becomes source byte by byte.
// Copies of one call run in any order, so no target may be another one's source or target. Launched
// between steps, in stream order.
struct CopyBlocksParams {
  static constexpr int32_t kMaxCopies = 64;  // parameters travel with the launch

  const CacheArray* arrays;  // [num_arrays], device memory
  int32_t num_arrays;
  int32_t num_blocks;  // ids are in [0, num_blocks)
  int32_t count;
  BlockCopy copies[kMaxCopies];
};

// Throws kInvalidArgument if an id is out of range or a target is named twice or is a source.
void check_copies(std::span<const BlockCopy> copies, int32_t num_blocks);

void copy_blocks_cpu(const CopyBlocksParams& params, const StepContext& ctx);
void copy_blocks_cuda(const CopyBlocksParams& params, const StepContext& ctx);

}  // namespace mrv1
