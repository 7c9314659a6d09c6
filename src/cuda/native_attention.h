// Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
#pragma once

#include "attention_plan.cuh"
#include "fast_divider.cuh"
#include "ops/paged_attention.h"
#include "state/step_context.h"

namespace mrv1::cuda {

constexpr int kMaxStages = 8;  // units in flight

// Rows of queries, keys and values in shared memory, in chunks of 16 bytes, so that eight rows'
// chunks of one column lie in different banks: swizzled where a row is a multiple or the half of
// 128 bytes, else an odd number of chunks.
constexpr int kChunkBytes = 16;
constexpr bool swizzles(int chunks) { return chunks % 8 == 0 || chunks == 4; }
constexpr int row_chunks(int dim, int element_bytes) {
  const int chunks = dim * element_bytes / kChunkBytes;
  return swizzles(chunks) ? chunks : chunks | 1;
}

// What the kernel reads: elements of the cache, and whether each token has scales.
struct BF16Cache {
  static constexpr int kElementBytes = 2;
  static constexpr bool kScaled = false;
};
struct E4M3Cache {
  static constexpr int kElementBytes = 1;
  static constexpr bool kScaled = true;
};
// Scales of keys and values of the positions that a warp has of a unit.
constexpr int kScaleBytes = 2 * kWarpPositions * static_cast<int>(sizeof(float));

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
template <typename Cache>
constexpr AttentionMemory attention_memory(int dim) {
  return {
      2 * kUnit * row_chunks(dim, Cache::kElementBytes) * kChunkBytes +
          (Cache::kScaled ? kAttentionWarps * kScaleBytes : 0),
      kQueryTiles * kNarrowRows * row_chunks(dim, 2) * kChunkBytes +
          kAttentionWarps * (kMergeRows * dim + 2 * kNarrowRows) * static_cast<int>(sizeof(float)) +
          static_cast<int>(sizeof(Marks))};
}

// From the product of a query and a key to a score in powers of two: product * factor, or with a
// cap that is not 0, cap * tanh of half of ln 2 * product * factor.
struct ScoreScale {
  float factor, cap;
};

// What the native kernel is launched with; strides of the cache count chunks, those of the scales
// floats.
struct NativeAttentionArgs {
  const uint16_t* qkv;  // bfloat16, as is the output
  uint16_t* out;
  const char* key;
  const char* value;
  KvScales scales;
  const int32_t* block_table;  // of the group
  const int32_t* token_batch;
  const AttentionWorker* workers;
  const AttentionItem* items;
  const int32_t* first_blocks;  // of the group, [workers, warps]
  float* partials;
  int64_t worker_floats, start_floats;
  int64_t q_stride;  // elements between tokens
  uint32_t block_stride, token_stride, head_stride;
  int32_t block_size;
  int32_t max_blocks;
  int32_t num_heads, num_kv_heads, group, head_dim;
  int32_t num_tokens, window;
  int32_t stages;
  AttentionTiles tiles;
  ScoreScale scale;
  FastDivider group_divider, block_divider;  // group and block_size
  bool plan_is_old;                          // written before the launch before this one

  // The query token that one of the (token, head of group) pairs belongs to.
  __device__ int32_t token_of(int32_t row) const {
    return static_cast<int32_t>(group_divider.divide(static_cast<uint32_t>(row)));
  }
  // The entry of a row's block table for a position.
  __device__ int32_t table_index(int32_t position) const {
    return static_cast<int32_t>(block_divider.divide(static_cast<uint32_t>(position)));
  }
};

// Launches the kernel for launch.dim, one function a file: 64 and 80, 96 and 128, 256.
void native_attention_64(const NativeAttentionArgs& args, const AttentionLaunch& launch,
                         const StepContext& ctx);
void native_attention_128(const NativeAttentionArgs& args, const AttentionLaunch& launch,
                          const StepContext& ctx);
void native_attention_256(const NativeAttentionArgs& args, const AttentionLaunch& launch,
                          const StepContext& ctx);
// The same over caches of E4M3.
void native_attention_e4m3_64(const NativeAttentionArgs& args, const AttentionLaunch& launch,
                              const StepContext& ctx);
void native_attention_e4m3_128(const NativeAttentionArgs& args, const AttentionLaunch& launch,
                               const StepContext& ctx);
void native_attention_e4m3_256(const NativeAttentionArgs& args, const AttentionLaunch& launch,
                               const StepContext& ctx);

}  // namespace mrv1::cuda
