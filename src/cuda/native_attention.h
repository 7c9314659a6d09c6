// Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
#pragma once

#include "attention_plan.cuh"
#include "ops/paged_attention.h"
#include "state/step_context.h"

namespace mrv1::cuda {

constexpr int kMaxStages = 6;  // units in flight

// Rows of keys and values in shared memory, in chunks of 16 bytes, so that eight rows' chunks of
// one column lie in different banks: swizzled where a row is a multiple of 128 bytes, else an odd
// number of chunks.
constexpr int row_chunks(int dim) { return dim / 8 % 8 == 0 ? dim / 8 : (dim / 8) | 1; }

// Shared memory of a thread block, besides a stage for each unit in flight: the queries of narrow
// tiles, what the warps' results are summed in (four rows at a time, with the maximum and the sum
// of each row), and marks.
constexpr int kQueryTiles = 2;
constexpr int kMergeRows = 4;
struct alignas(16) Marks {
  Segment segments[kAttentionWarps][kQueryTiles];  // that a warp has requested
  Segment merged;                                  // that the worker merges at its end
};
struct AttentionMemory {
  int stage_bytes, fixed_bytes;
};
constexpr AttentionMemory attention_memory(int dim) {
  return {
      2 * kUnit * row_chunks(dim) * 16,
      kQueryTiles * kNarrowRows * row_chunks(dim) * 16 +
          kAttentionWarps * (kMergeRows * dim + 2 * kNarrowRows) * static_cast<int>(sizeof(float)) +
          static_cast<int>(sizeof(Marks))};
}

// From the product of a query and a key to a score in powers of two: product * factor, or with a
// cap that is not 0, cap * tanh of half of ln 2 * product * factor.
struct ScoreScale {
  float factor, cap;
};

// What the native kernel is launched with; strides and offsets of the cache count chunks of 8
// elements (16 bytes).
struct NativeAttentionArgs {
  const uint16_t* qkv;  // bfloat16, as is all that follows
  uint16_t* out;
  const uint16_t* key;
  const uint16_t* value;
  const int32_t* block_table;  // of the group
  const int32_t* token_batch;
  const AttentionWorker* workers;
  const AttentionItem* items;
  const int32_t* first_blocks;  // of the group, [workers, warps]
  float* partials;
  int64_t worker_floats, start_floats;
  int64_t q_stride;  // elements between tokens
  uint32_t block_stride, token_stride, head_stride;
  int32_t block_size, block_shift;  // shift -1: block_size is no power of two
  int32_t max_blocks;
  int32_t num_heads, num_kv_heads, group, head_dim;
  int32_t num_tokens, window;
  int32_t stages;
  AttentionTiles tiles;
  ScoreScale scale;
};

// Launches the kernel for launch.dim, one function a file: 64 and 80, 96 and 128, 256.
void native_attention_64(const NativeAttentionArgs& args, const AttentionLaunch& launch,
                         const StepContext& ctx);
void native_attention_128(const NativeAttentionArgs& args, const AttentionLaunch& launch,
                          const StepContext& ctx);
void native_attention_256(const NativeAttentionArgs& args, const AttentionLaunch& launch,
                          const StepContext& ctx);

}  // namespace mrv1::cuda
