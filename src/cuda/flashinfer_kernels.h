// Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
//
// Between flashinfer_attention.cu, which plans and dispatches, and the files that instantiate
// FlashInfer's kernels, one head_dim each. FlashInfer's own headers are seen by the latter only.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <string_view>

#include "check.h"
#include "launch.h"
#include "ops/paged_attention.h"
#include "state/step_context.h"

namespace mrv1::cuda {

// Query tokens of one row that a block of the Hopper kernel attends for, one head at a time.
struct alignas(16) FlashTile {
  int32_t tile;         // which of the row's tiles
  int32_t batch;        // batch position
  int32_t query_begin;  // the row's first token in the step
  int32_t query_len;    // the row's tokens in the step
  int32_t page_begin;   // the row's first entry in the block table
  int32_t kv_len;
  int32_t unused[2];
};

// Work of the FA2 kernels, one entry per thread block of a key/value head.
struct FlashBlocks {
  int32_t* batch;
  int32_t* tile;   // of the row's query rows: tokens times heads per key/value head
  int32_t* chunk;  // of the row's keys
  bool* valid;     // false for the surplus of a grid that the host sized
  int32_t* chunk_size;
};

// Addresses inside of a plan's data, all device memory.
struct FlashPlan {
  int32_t* num_tiles;   // entries of `tiles` in use
  int32_t* page_begin;  // [max_requests + 1] per batch position; last: end of the block table
  int32_t* key_begin;   // [max_requests + 1] FP8 caches: a prefill row's keys in the scratch; total
  int32_t* key_count;   // [max_requests] how many, the last of the row; 0 for other rows
  FlashTile* tiles;     // prefill on Hopper, the longest first
  FlashBlocks prefill;  // prefill elsewhere
  FlashBlocks decode;
  int32_t* split_begin;  // [max_requests] a decode row's first partial result
  int32_t* num_splits;   // [max_requests]
  float* partial_out;    // [splits, heads, head_dim]
  float* partial_lse;    // [splits, heads] log2 of the sum of exponentials
};

// Query tokens (Hopper) or query rows (FA2) of a tile, by head_dim.
constexpr int32_t sm90_tile(int32_t head_dim) { return head_dim == 64 ? 192 : 128; }
constexpr int32_t kDecodeTile = 16;

// Keys and values as a kernel reads them, in bfloat16: the cache itself, or what of an FP8 cache
// lies in scratch memory. There a row's keys follow each other: its block table has one entry, the
// row's first key, and blocks are as long as any row.
struct FlashKeys {
  KvCacheLayer cache;
  const int32_t* block_table;
  const int32_t* lengths;  // [max_requests] keys of a row, of which the step's tokens are the last
};

// What a kernel needs besides its work list. The heads are those of params.shape, from where
// params.qkv and params.out point to.
struct FlashArgs {
  const PagedAttentionParams& params;
  const StepContext& ctx;
  const FlashPlan& plan;
  const FlashKeys& keys;
  int32_t out_stride;  // elements from a token's output to the next one's; FA2: of its heads only
  int32_t grid;        // blocks of an FA2 launch per key/value head; of a Hopper launch in all
};

// Multiplies codes of an FP8 cache by their scales, rounds to bfloat16 and writes them to `to`: of
// key/value heads [first_head, first_head + to.num_kv_heads), the keys and values that the plan's
// key_begin and key_count name. `max_keys` is a bound of how many.
void dequantize_keys(const PagedAttentionParams& params, const StepContext& ctx,
                     const FlashPlan& plan, int32_t first_head, const KvCacheLayer& to,
                     int64_t max_keys);

// FA2: `tile` is 64 or 128 (128 not for head_dim 256). The decode kernel writes partial results.
template <int kHeadDim>
void launch_flash_prefill(const FlashArgs& args, int32_t tile);
template <int kHeadDim>
void launch_flash_decode(const FlashArgs& args);
// Over E4M3 with one scale for all keys and one for all values, which partial results lack.
constexpr int32_t kFloat8DecodeDim = 128;
template <int kHeadDim>
void launch_flash_decode_e4m3(const FlashArgs& args);

// FA3, sm_90a only.
template <int kHeadDim>
void launch_flash_prefill_sm90(const FlashArgs& args);

// Launches a kernel that is not written for overlapped launches: it starts when all work before it
// has ended. What follows may overlap with it as with any other.
template <typename... Params, typename... Args>
void launch_alone(std::string_view op, const StepContext& ctx, void (*kernel)(Params...), dim3 grid,
                  dim3 block, size_t shared_bytes, const Args&... args) {
  static_assert(sizeof...(Params) == sizeof...(Args));
  const OpRange range(op);
  allow_shared_memory(op, kernel, shared_bytes);
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = block;
  config.dynamicSmemBytes = shared_bytes;
  config.stream = stream_of(ctx);
  const cudaError_t status = cudaLaunchKernelEx(&config, kernel, args...);
  check_kernel(op, ctx, status, grid, block, shared_bytes);
}

}  // namespace mrv1::cuda
