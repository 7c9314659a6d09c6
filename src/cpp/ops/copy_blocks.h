// Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>
#include <span>

namespace mrv1 {

struct StepContext;

// One KV block becomes what another one is.
struct BlockCopy {
  int32_t source, target;
};

// The keys or the values of one layer: block b lies at base + b * block_bytes.
struct CacheArray {
  void* base;
  int64_t block_bytes;
};

// Copies whole blocks in every array, keys and values of all layers: array[target] = array[source]
// byte by byte. Copies of one call run in any order, so no target may be another one's source or
// target. Launched between steps, in stream order.
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
