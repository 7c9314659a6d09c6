// Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
//
// FlashInfer's kernels as attention backends: what they can take, the plan, the launches, and the
// merge of split decode rows.
//
// The plan is made on the device, from the batch as infer_params left it, once per step. One thread
// block for each kernel turns lengths into its work list: tiles of query tokens sorted by falling
// cost, or chunks of the keys of decode rows. Grids come from what the host knows (padded sizes);
// the surplus finds no work.
//
// They read bfloat16. From an FP8 cache, what prefill rows see is dequantised into scratch memory
// of fixed size before the launch. Should it not fit, it is cut by key/value heads: each part is
// whole for its heads, so that nothing has to be merged, and parts are as exact as the whole.
//
// On Hopper a step may launch both prefill kernels, and the plan gives each row to one of them. FA3
// has the higher rate, FA2 loses less time at the ends of tiles and has none half empty: rows of
// few tokens or few keys are faster there, if they are many.
#include <cuda_bf16.h>

#include <algorithm>
#include <type_traits>

#include "attention_backends.h"
#include "block.cuh"
#include "check.h"
#include "core/device.h"
#include "flashinfer_kernels.h"
#include "launch.h"

namespace mrv1 {
namespace {

constexpr std::string_view kOp = "paged_attention";
constexpr std::string_view kPlanOp = "plan_attention.flashinfer";
constexpr int kPlanThreads = 1024;
constexpr int kPlanWarps = kPlanThreads / cuda::kWarpSize;
constexpr int32_t kCostBuckets = 1024;
constexpr int32_t kMinPrefillTile = 64;
// The time of a tile of 128 query tokens, as keys: these constants and the keys it sees, where FA2
// takes so many percent of FA3's time for a key. Measured on an H200.
constexpr int32_t kSm90TileKeys = 333;
constexpr int32_t kFa2TileKeys = 33;
constexpr int32_t fa2_percent(int32_t head_dim) { return head_dim == 256 ? 220 : 160; }
// FA3 takes all rows of a step whose tiles fill the GPU at most so often: then the length of the
// longest tile counts, not the sum. It also does if rows have this many tokens on average.
constexpr int32_t kShortStepRounds = 3;
constexpr int32_t kLongRow = 900;
// Decode: a chunk of keys is a multiple of this, the keys that one iteration of a block takes.
constexpr int32_t kChunkUnit = 128;
// Blocks per multiprocessor that splitting rows may add. More even out rows of different lengths,
// and cost partial results.
constexpr int32_t kSplitBlocksPerSm = 3;
// FP8 caches. The scratch that a runner has at most: all heads of a Llama-8B hold 64k positions.
constexpr int64_t kScratchBytes = int64_t{256} << 20;
// Query rows per key from which dequantising, which reads and writes three bytes for an element,
// takes less time than FA3 gains over the native kernel.
constexpr int64_t kMinRowsPerKey = 256;

struct Gpu {
  int32_t compute_capability = 0;
  int32_t multiprocessors = 0;
};

// The runtime answers from memory.
Gpu gpu_at(int ordinal) {
  int major = 0, minor = 0;
  Gpu gpu;
  const auto ask = [&](int* value, cudaDeviceAttr attribute) {
    cuda::check_cuda(cudaDeviceGetAttribute(value, attribute, ordinal), kPlanOp,
                     "cudaDeviceGetAttribute");
  };
  ask(&major, cudaDevAttrComputeCapabilityMajor);
  ask(&minor, cudaDevAttrComputeCapabilityMinor);
  ask(&gpu.multiprocessors, cudaDevAttrMultiProcessorCount);
  gpu.compute_capability = 10 * major + minor;
  return gpu;
}

Gpu current_gpu() {
  int ordinal = 0;
  cuda::check_cuda(cudaGetDevice(&ordinal), kPlanOp, "cudaGetDevice");
  return gpu_at(ordinal);
}

int32_t ceil_div(int32_t value, int32_t by) { return (value + by - 1) / by; }

int32_t group_size(const HeadShape& shape) { return shape.num_heads / shape.num_kv_heads; }

// The tiles of a prefill kernel: how large, and how many a step has at most.
struct Tiling {
  int32_t tile = 0;  // query tokens on Hopper, else query rows; 0: the kernel is not used
  int32_t bound = 0;
};

Tiling sm90_tiling(const HeadShape& shape, const StepSizes& sizes, const Gpu& gpu) {
  Tiling tiling;
#ifdef MRV1_FLASHINFER_SM90
  if (gpu.compute_capability == 90) {
    tiling.tile = cuda::sm90_tile(shape.head_dim);
    tiling.bound = sizes.num_tokens / tiling.tile + sizes.num_requests;
  }
#endif
  return tiling;
}

// Not used where FA3 is sure to take all rows; in most steps only the device knows. Its outputs
// have no stride, so it cannot take a part of the heads.
Tiling fa2_tiling(const HeadShape& shape, const StepSizes& sizes, const Tiling& sm90,
                  bool all_heads, const Gpu& gpu) {
  Tiling tiling;
  if (!all_heads) return tiling;
  const bool is_short =
      int64_t{sm90.bound} * shape.num_heads <= int64_t{kShortStepRounds} * gpu.multiprocessors;
  const bool is_long = sizes.num_tokens >= int64_t{kLongRow} * sizes.num_requests;
  if (sm90.tile > 0 && (is_short || is_long)) return tiling;
  const int64_t rows = int64_t{sizes.num_tokens} * group_size(shape);
  const bool long_rows = rows > int64_t{64} * sizes.num_requests;
  tiling.tile = long_rows && shape.head_dim < 256 ? 128 : kMinPrefillTile;
  tiling.bound = static_cast<int32_t>(rows / tiling.tile) + sizes.num_requests;
  return tiling;
}

int32_t decode_tiles_per_row(const HeadShape& shape) {
  return ceil_div(group_size(shape), cuda::kDecodeTile);
}

// Thread blocks per key/value head that a decode launch of `requests` rows has: each row's own, and
// those that splitting may add.
int32_t decode_bound(const HeadShape& shape, int32_t requests, const Gpu& gpu) {
  return requests * decode_tiles_per_row(shape) +
         ceil_div(gpu.multiprocessors * kSplitBlocksPerSm, shape.num_kv_heads);
}

// Lays out a plan's data; with a null base, for the size.
class PlanLayout {
 public:
  PlanLayout(const AttentionPlan& plan, void* base, const Gpu& gpu) : base_(base) {
    const HeadShape& shape = plan.shape;
    const int32_t sm90_tiles =
        plan.max_tokens / cuda::sm90_tile(shape.head_dim) + plan.max_requests;
    const int32_t fa2_tiles =
        static_cast<int32_t>(int64_t{plan.max_tokens} * group_size(shape) / kMinPrefillTile) +
        plan.max_requests;
    const int32_t decode_blocks = decode_bound(shape, plan.max_requests, gpu);
    // A window can leave a row's last chunk empty, which then has a place and no block.
    const int64_t splits = int64_t{decode_blocks} + (plan.window > 0 ? plan.max_requests : 0);
    flash.num_tiles = take<int32_t>(1);
    flash.page_begin = take<int32_t>(plan.max_requests + 1);
    flash.key_begin = take<int32_t>(plan.max_requests + 1);
    flash.key_count = take<int32_t>(plan.max_requests);
    flash.tiles = take<cuda::FlashTile>(sm90_tiles);
    flash.prefill = blocks(fa2_tiles);
    flash.decode = blocks(decode_blocks);
    flash.split_begin = take<int32_t>(plan.max_requests);
    flash.num_splits = take<int32_t>(plan.max_requests);
    flash.partial_out = take<float>(splits * shape.num_heads * shape.head_dim);
    flash.partial_lse = take<float>(splits * shape.num_heads);
  }

  cuda::FlashPlan flash{};
  int64_t bytes() const { return bytes_; }

 private:
  cuda::FlashBlocks blocks(int32_t count) {
    cuda::FlashBlocks list{};
    list.batch = take<int32_t>(count);
    list.tile = take<int32_t>(count);
    list.chunk = take<int32_t>(count);
    list.valid = take<bool>(count);
    list.chunk_size = take<int32_t>(1);
    return list;
  }

  template <typename T>
  T* take(int64_t count) {
    const int64_t begin = bytes_;
    bytes_ = (begin + count * static_cast<int64_t>(sizeof(T)) + 255) / 256 * 256;
    return base_ == nullptr ? nullptr : reinterpret_cast<T*>(static_cast<char*>(base_) + begin);
  }

  void* base_;
  int64_t bytes_ = 0;
};

// What the plan kernel needs to know about the launches that follow.
struct PlanArgs {
  cuda::FlashPlan flash;
  int32_t window;
  int32_t group_size;
  Tiling sm90, fa2;
  int32_t short_step;  // FA3 tiles up to which it takes all rows
  int32_t fa2_percent;
  int32_t decode_bound;
  int32_t decode_tiles;
  bool prefill, decode;  // what FlashInfer takes
  int32_t scratch_keys;  // prefill rows read scratch memory that has room for so many keys, or 0
};

// Order of a tile that sees `keys` keys: falling, 32 steps an octave.
__device__ int32_t cost_bucket(int32_t keys) {
  const int32_t bits = static_cast<int32_t>(__float_as_uint(static_cast<float>(keys)) >> 18);
  const int32_t one = static_cast<int32_t>(__float_as_uint(1.0f) >> 18);
  return kCostBuckets - 1 - max(0, min(kCostBuckets - 1, bits - one));
}

__device__ int32_t query_length(const InferParams& infer, int32_t batch) {
  return infer.query_start_loc[batch + 1] - infer.query_start_loc[batch];
}

// Keys of a row's cache that its tokens in the step see: the last ones.
__device__ int32_t seen_keys(const PlanArgs& args, int32_t query_len, int32_t kv_len) {
  return args.window > 0 ? min(kv_len, args.window - 1 + query_len) : kv_len;
}

// Gives the keys of prefill rows their places in the scratch, one row after the other. A row that
// does not fit gets none and is left out: one that the host counts as decoding, after a step that
// failed.
__device__ void place_keys(const PlanArgs& args, const InferParams& infer) {
  const int32_t num_decodes = infer.counts->num_decodes;
  const int32_t num_requests = infer.counts->num_requests;
  int32_t begin = 0;
  for (int32_t first = 0; first <= infer.max_requests; first += kPlanThreads) {
    const int32_t batch = first + static_cast<int32_t>(threadIdx.x);
    int32_t count = 0;
    if (batch >= num_decodes && batch < num_requests) {
      count = seen_keys(args, query_length(infer, batch), infer.seq_lens[batch]);
    }
    int32_t total = 0;
    const int32_t before = cuda::block_exclusive_scan<kPlanThreads>(count, &total);
    const int32_t place = begin + before;
    if (batch <= infer.max_requests) args.flash.key_begin[batch] = min(place, args.scratch_keys);
    if (batch < infer.max_requests) {
      args.flash.key_count[batch] = place + count <= args.scratch_keys ? count : 0;
    }
    begin += total;
  }
  __syncthreads();
}

// Whether one kernel takes all prefill rows.
enum class Taker { kSm90, kFa2, kByRow };

__device__ Taker taker_of_step(const PlanArgs& args, const InferParams& infer) {
  if (args.sm90.tile == 0) return Taker::kFa2;
  if (args.fa2.tile == 0) return Taker::kSm90;
  int32_t tiles = 0;
  for (int32_t batch = infer.counts->num_decodes + threadIdx.x; batch < infer.counts->num_requests;
       batch += kPlanThreads) {
    tiles += (query_length(infer, batch) + args.sm90.tile - 1) / args.sm90.tile;
  }
  tiles = cuda::block_sum<kPlanThreads>(tiles);
  return tiles <= args.short_step ? Taker::kSm90 : Taker::kByRow;
}

__device__ bool is_for_sm90(const PlanArgs& args, Taker taker, int32_t query_len, int32_t kv_len) {
  if (taker != Taker::kByRow) return taker == Taker::kSm90;
  int64_t keys = kv_len - query_len / 2;
  if (args.window > 0) keys = min(keys, int64_t{args.window});
  const int64_t padded = (query_len + args.sm90.tile - 1) / args.sm90.tile * args.sm90.tile;
  return padded * (kSm90TileKeys + keys) * 100 <
         query_len * (kFa2TileKeys + keys) * args.fa2_percent;
}

// Calls visit(batch, tile, bucket) for every tile of a kernel's prefill rows, a warp each row.
// Masked rows have no keys.
template <bool kSm90, typename Visit>
__device__ void for_each_tile(const PlanArgs& args, const InferParams& infer, Taker taker,
                              Visit&& visit) {
  const int lane = threadIdx.x % cuda::kWarpSize, warp = threadIdx.x / cuda::kWarpSize;
  const int32_t pack = kSm90 ? 1 : args.group_size;
  const int32_t size = kSm90 ? args.sm90.tile : args.fa2.tile;
  const int32_t num_requests = infer.counts->num_requests;
  for (int32_t batch = infer.counts->num_decodes + warp; batch < num_requests;
       batch += kPlanWarps) {
    const int32_t kv_len = infer.seq_lens[batch];
    const int32_t query_len = query_length(infer, batch);
    if (kv_len == 0 || is_for_sm90(args, taker, query_len, kv_len) != kSm90) continue;
    if (args.scratch_keys > 0 && args.flash.key_count[batch] == 0) continue;
    const int32_t tiles = (query_len * pack + size - 1) / size;
    for (int32_t tile = lane; tile < tiles; tile += cuda::kWarpSize) {
      const int32_t begin = tile * size / pack;
      const int32_t end = min(query_len, ((tile + 1) * size + pack - 1) / pack);
      int32_t keys = kv_len - query_len + end;
      if (args.window > 0) keys = min(keys, args.window + end - begin);
      visit(batch, tile, cost_bucket(keys));
    }
  }
}

template <bool kSm90>
__device__ void plan_prefill(const PlanArgs& args, const RowState& state,
                             const InferParams& infer) {
  __shared__ int32_t buckets[kCostBuckets];  // counts, then where the next tile goes
  static_assert(kCostBuckets == kPlanThreads);
  const Taker taker = taker_of_step(args, infer);
  buckets[threadIdx.x] = 0;
  __syncthreads();
  for_each_tile<kSm90>(args, infer, taker,
                       [&](int32_t, int32_t, int32_t bucket) { atomicAdd(&buckets[bucket], 1); });
  __syncthreads();
  int32_t total = 0;
  const int32_t begin = cuda::block_exclusive_scan<kPlanThreads>(buckets[threadIdx.x], &total);
  buckets[threadIdx.x] = begin;
  __syncthreads();
  // Tiles of one cost land in any order; a tile's result does not depend on its place.
  for_each_tile<kSm90>(args, infer, taker, [&](int32_t batch, int32_t tile, int32_t bucket) {
    const int32_t place = atomicAdd(&buckets[bucket], 1);
    if constexpr (kSm90) {
      const int32_t query_len = query_length(infer, batch);
      const int32_t kv_len = infer.seq_lens[batch];
      args.flash.tiles[place] = {
          tile,
          batch,
          infer.query_start_loc[batch],
          query_len,
          args.scratch_keys > 0 ? batch : infer.row[batch] * state.max_blocks,
          args.scratch_keys > 0 ? args.flash.key_count[batch] : kv_len,
          {0, 0}};
    } else {
      args.flash.prefill.batch[place] = batch;
      args.flash.prefill.tile[place] = tile;
      args.flash.prefill.chunk[place] = 0;
    }
  });
  if constexpr (kSm90) {
    if (threadIdx.x == 0) *args.flash.num_tiles = total;
  } else {
    for (int32_t i = threadIdx.x; i < args.fa2.bound; i += kPlanThreads) {
      args.flash.prefill.valid[i] = i < total;
    }
    if (threadIdx.x == 0) *args.flash.prefill.chunk_size = 1;  // read, not used
  }
}

// Keys that a decode row attends to.
__device__ int32_t visible_keys(const PlanArgs& args, int32_t kv_len) {
  return args.window > 0 ? min(kv_len, args.window) : kv_len;
}

// Blocks that chunks of `size` keys would take; the same for all lanes of the warp.
__device__ int32_t count_blocks(const PlanArgs& args, const InferParams& infer, int32_t size) {
  const int32_t num_decodes = infer.counts->num_decodes;
  int32_t blocks = 0;
#pragma unroll 8
  for (int32_t batch = threadIdx.x % cuda::kWarpSize; batch < num_decodes;
       batch += cuda::kWarpSize) {
    blocks += (visible_keys(args, infer.seq_lens[batch]) + size - 1) / size;
  }
  return __reduce_add_sync(cuda::kFullWarp, blocks) * args.decode_tiles;
}

// The smallest of 32 sizes, which rise with the warp's number, whose blocks fit into the grid. The
// largest always does.
__device__ int32_t smallest_fitting_warp(const PlanArgs& args, const InferParams& infer,
                                         int32_t size, int32_t* shared) {
  const int lane = threadIdx.x % cuda::kWarpSize, warp = threadIdx.x / cuda::kWarpSize;
  const int32_t blocks = count_blocks(args, infer, size);
  if (lane == 0) shared[warp] = blocks <= args.decode_bound || warp == kPlanWarps - 1;
  __syncthreads();
  const unsigned fits = __ballot_sync(cuda::kFullWarp, shared[lane] != 0);
  __syncthreads();
  return __ffs(static_cast<int>(fits)) - 1;
}

__device__ void plan_decode(const PlanArgs& args, const RowState& state, const InferParams& infer) {
  __shared__ int32_t shared[kPlanWarps];
  __shared__ int32_t next_block, next_split;
  const int lane = threadIdx.x % cuda::kWarpSize, warp = threadIdx.x / cuda::kWarpSize;
  // First in steps of the 32nd part of the longest row, then in 32 steps of that step.
  const int32_t units = (state.max_model_len + kChunkUnit - 1) / kChunkUnit;
  const int32_t coarse = (units + kPlanWarps - 1) / kPlanWarps;
  const int32_t base =
      coarse * smallest_fitting_warp(args, infer, coarse * (warp + 1) * kChunkUnit, shared);
  const int32_t fine = (coarse + kPlanWarps - 1) / kPlanWarps;
  const int32_t step =
      smallest_fitting_warp(args, infer, (base + fine * (warp + 1)) * kChunkUnit, shared);
  const int32_t chunk_size = (base + fine * (step + 1)) * kChunkUnit;
  if (threadIdx.x == 0) {
    *args.flash.decode.chunk_size = chunk_size;
    next_block = 0;
    next_split = 0;
  }
  __syncthreads();

  const int32_t num_decodes = infer.counts->num_decodes;
  for (int32_t batch = warp; batch < num_decodes; batch += kPlanWarps) {
    const int32_t kv_len = infer.seq_lens[batch];
    if (kv_len == 0) continue;
    const int32_t chunks = (visible_keys(args, kv_len) + chunk_size - 1) / chunk_size;
    // FlashInfer spaces a row's partial results by this count, which ignores that a window of a
    // single token needs no room for the others of its tile.
    const int32_t most =
        args.window > 0 ? min(kv_len, args.window - 1 + cuda::kDecodeTile) : kv_len;
    const int32_t places = (most + chunk_size - 1) / chunk_size;
    int32_t block = 0;
    if (lane == 0) {
      block = atomicAdd(&next_block, chunks * args.decode_tiles);
      args.flash.split_begin[batch] = atomicAdd(&next_split, places);
      args.flash.num_splits[batch] = chunks;
    }
    block = __shfl_sync(cuda::kFullWarp, block, 0);
    for (int32_t i = lane; i < chunks * args.decode_tiles; i += cuda::kWarpSize) {
      args.flash.decode.batch[block + i] = batch;
      args.flash.decode.tile[block + i] = i % args.decode_tiles;
      args.flash.decode.chunk[block + i] = i / args.decode_tiles;
    }
  }
  __syncthreads();
  for (int32_t i = threadIdx.x; i < args.decode_bound; i += kPlanThreads) {
    args.flash.decode.valid[i] = i < next_block;
  }
}

__global__ void __launch_bounds__(kPlanThreads)
    plan_kernel(PlanArgs args, RowState state, InferParams infer) {
  cuda::launch_next();
  cuda::wait_for_previous();
  // Both blocks of prefill kernels read it, so both write it, and the same.
  if (args.scratch_keys > 0 && blockIdx.x < 2) place_keys(args, infer);
  if (blockIdx.x == 0) {
    if (args.prefill && args.sm90.tile > 0) plan_prefill<true>(args, state, infer);
    const int32_t num_requests = infer.counts->num_requests;
    const int32_t num_decodes = infer.counts->num_decodes;
    for (int32_t batch = threadIdx.x; batch <= infer.max_requests; batch += kPlanThreads) {
      // Prefill rows may have a block table of one entry each; decode rows read the cache.
      const bool in_scratch = args.scratch_keys > 0 && batch >= num_decodes;
      const int32_t begin = batch < num_requests ? max(0, infer.row[batch]) * state.max_blocks
                                                 : state.num_rows * state.max_blocks;
      args.flash.page_begin[batch] = in_scratch && batch < infer.max_requests ? batch : begin;
    }
  } else if (blockIdx.x == 1) {
    if (args.prefill && args.fa2.tile > 0) plan_prefill<false>(args, state, infer);
  } else {
    plan_decode(args, state, infer);
  }
}

// Joins the partial results of a decode row, a warp per token and head.
template <int kHeadDim>
__global__ void __launch_bounds__(128)
    merge_kernel(cuda::FlashPlan flash, InferParams infer, __nv_bfloat16* out, int32_t num_tokens,
                 int32_t num_heads, const float* value_scale) {
  cuda::launch_next();
  cuda::wait_for_previous();
  constexpr int kPerLane = kHeadDim / cuda::kWarpSize;
  const int lane = threadIdx.x % cuda::kWarpSize;
  const int64_t index = (int64_t{blockIdx.x} * blockDim.x + threadIdx.x) / cuda::kWarpSize;
  const int64_t token = index / num_heads;
  if (token >= num_tokens) return;
  const int32_t batch = infer.token_batch[token];
  if (batch < 0 || batch >= infer.counts->num_decodes) return;
  const int32_t head = static_cast<int32_t>(index % num_heads);
  const int32_t splits = flash.num_splits[batch];
  const int64_t first = int64_t{flash.split_begin[batch]} * num_heads + head;

  float largest = -INFINITY;
  for (int32_t i = lane; i < splits; i += cuda::kWarpSize) {
    largest = fmaxf(largest, flash.partial_lse[first + int64_t{i} * num_heads]);
  }
  for (int offset = cuda::kWarpSize / 2; offset > 0; offset /= 2) {
    largest = fmaxf(largest, __shfl_xor_sync(cuda::kFullWarp, largest, offset));
  }
  float sum = 0.0f;
  float result[kPerLane] = {};
  for (int32_t i = 0; i < splits; ++i) {
    const int64_t split = first + int64_t{i} * num_heads;
    const float weight = exp2f(flash.partial_lse[split] - largest);
    const float* source = flash.partial_out + split * kHeadDim + lane * kPerLane;
    sum += weight;
#pragma unroll
    for (int j = 0; j < kPerLane; j += 2) {
      const float2 part = *reinterpret_cast<const float2*>(source + j);
      result[j] = fmaf(weight, part.x, result[j]);
      result[j + 1] = fmaf(weight, part.y, result[j + 1]);
    }
  }
  const float scale = value_scale != nullptr ? *value_scale : 1.0f;
  __nv_bfloat16* target = out + (token * num_heads + head) * kHeadDim + lane * kPerLane;
#pragma unroll
  for (int j = 0; j < kPerLane; j += 2) {
    *reinterpret_cast<__nv_bfloat162*>(target + j) =
        __floats2bfloat162_rn(result[j] / sum * scale, result[j + 1] / sum * scale);
  }
}

template <typename Fn>
void dispatch_head_dim(int32_t head_dim, Fn&& fn) {
  switch (head_dim) {
    case 64:
      return fn(std::integral_constant<int, 64>());
    case 128:
      return fn(std::integral_constant<int, 128>());
    case 256:
      return fn(std::integral_constant<int, 256>());
    default:
      fail(ErrorKind::kInternal, kOp, "FlashInfer has no kernel for head_dim ", head_dim);
  }
}

// Whether there are kernels for the element type and the head_dim. There are none with a soft cap:
// they would double the time that FlashInfer takes to compile, for few models.
bool is_compiled(const AttentionPlan& plan) {
  const int32_t head_dim = plan.shape.head_dim;
  return plan.dtype == DType::kBF16 && (head_dim == 64 || head_dim == 128 || head_dim == 256) &&
         plan.softcap == 0.0f;
}

// What both uses need: kernels, and indices that fit into FlashInfer's 32 bits.
bool geometry_fits(const AttentionPlan& plan, const StepContext& ctx) {
  constexpr int64_t kLimit = int64_t{1} << 31;
  const HeadShape& shape = plan.shape;
  return is_compiled(plan) && shape.num_kv_heads > 0 && shape.num_heads % shape.num_kv_heads == 0 &&
         int64_t{ctx.rows.num_rows} * ctx.rows.max_blocks * ctx.rows.block_size < kLimit &&
         int64_t{plan.max_tokens} * shape.qkv_cols() < kLimit &&
         int64_t{ctx.rows.block_size} * shape.num_kv_heads * shape.head_dim < kLimit;
}

void check_cache(const KvCacheLayer& cache) {
  constexpr int64_t kLimit = int64_t{1} << 32;
  const int64_t align = 16 / static_cast<int64_t>(dtype_size(cache.dtype));  // of a load
  for (const int64_t stride : {cache.block_stride, cache.token_stride, cache.head_stride}) {
    check(stride > 0 && stride < kLimit && stride % align == 0, kOp, "a stride of the cache is ",
          stride, "; FlashInfer takes multiples of ", align, " below 2^32");
  }
}

cuda::FlashPlan flash_plan(const AttentionPlan& plan, const Gpu& gpu) {
  return PlanLayout(plan, flashinfer_plan_data(plan), gpu).flash;
}

// Of a key and value of one head, dequantised.
int64_t scratch_bytes_per_key(int32_t head_dim) {
  return 2 * static_cast<int64_t>(sizeof(__nv_bfloat16)) * head_dim;
}

// The scratch of a step with an FP8 cache: room for `keys` keys of `heads` heads.
struct Scratch {
  int64_t keys = 0;   // that prefill rows see, at most
  int32_t heads = 0;  // at a time; 0: not even one fits, or dequantising would not pay
};

Scratch scratch_of(const AttentionPlan& plan, const StepContext& ctx) {
  const HeadShape& shape = plan.shape;
  Scratch scratch;
  scratch.keys = ctx.prefill.keys;
  if (plan.window > 0) {
    const int64_t seen = ctx.sizes.num_tokens + int64_t{ctx.sizes.num_requests} * (plan.window - 1);
    scratch.keys = std::min(scratch.keys, seen);
  }
  if (scratch.keys == 0 ||
      ctx.prefill.scores / ctx.prefill.keys * group_size(shape) < kMinRowsPerKey) {
    return scratch;
  }
  const auto capacity =
      static_cast<int64_t>(ctx.workspace_bytes) / scratch_bytes_per_key(shape.head_dim);
  const int64_t most = std::min<int64_t>(capacity / scratch.keys, shape.num_kv_heads);
  if (most == 0) return scratch;
  const auto passes = ceil_div(shape.num_kv_heads, static_cast<int32_t>(most));
  scratch.heads = ceil_div(shape.num_kv_heads, passes);
  return scratch;
}

// Whether a launch of prefill kernels is for all heads.
bool takes_all_heads(const AttentionPlan& plan, const StepContext& ctx) {
  return !is_float8(plan.cache_dtype) || scratch_of(plan, ctx).heads == plan.shape.num_kv_heads;
}

cuda::FlashKeys cached_keys(const PagedAttentionParams& params, const StepContext& ctx) {
  const int64_t group_blocks = int64_t{ctx.rows.num_rows} * ctx.rows.max_blocks;
  return {*params.cache, ctx.rows.block_table + params.kv_group * group_blocks, ctx.infer.seq_lens};
}

// Keys [heads, keys, head_dim] from the beginning of the workspace, then values. A block has room
// for any row, so that a row has one; they overlap, and begin wherever a key does.
cuda::FlashKeys scratch_keys(const PagedAttentionParams& params, const StepContext& ctx,
                             const cuda::FlashPlan& flash, const Scratch& scratch, int32_t heads) {
  KvCacheLayer layer;
  layer.dtype = DType::kBF16;
  layer.num_kv_heads = heads;
  layer.head_dim = params.shape.head_dim;
  layer.block_size = ctx.rows.max_blocks * ctx.rows.block_size;
  layer.block_stride = layer.token_stride = layer.head_dim;
  layer.head_stride = scratch.keys * layer.head_dim;
  layer.key = ctx.workspace;
  layer.value = static_cast<__nv_bfloat16*>(ctx.workspace) + heads * layer.head_stride;
  return {layer, flash.key_begin, flash.key_count};
}

void launch_prefill(const PagedAttentionParams& params, const StepContext& ctx,
                    const cuda::FlashPlan& flash, const cuda::FlashKeys& keys, bool all_heads,
                    int32_t out_stride) {
  check_cache(keys.cache);
  const Gpu gpu = current_gpu();
  const Tiling sm90 = sm90_tiling(params.shape, ctx.sizes, gpu);
  const Tiling fa2 = fa2_tiling(params.shape, ctx.sizes, sm90, all_heads, gpu);
  dispatch_head_dim(params.shape.head_dim, [&](auto head_dim) {
#ifdef MRV1_FLASHINFER_SM90
    if (sm90.tile > 0) {
      const int64_t items = int64_t{sm90.bound} * params.shape.num_heads;
      const auto grid = static_cast<int32_t>(std::min<int64_t>(items, gpu.multiprocessors));
      cuda::launch_flash_prefill_sm90<head_dim()>({params, ctx, flash, keys, out_stride, grid});
    }
#endif
    if (fa2.tile > 0) {
      cuda::launch_flash_prefill<head_dim()>({params, ctx, flash, keys, out_stride, fa2.bound},
                                             fa2.tile);
    }
  });
}

}  // namespace

bool flashinfer_prefill_supports(const AttentionPlan& plan, const StepContext& ctx) {
  if (!geometry_fits(plan, ctx)) return false;
  if (plan.cache_dtype != DType::kE4M3) return plan.cache_dtype == plan.dtype;
  const int32_t heads = scratch_of(plan, ctx).heads;
  return heads == plan.shape.num_kv_heads ||
         (heads > 0 && sm90_tiling(plan.shape, ctx.sizes, current_gpu()).tile > 0);
}

bool flashinfer_decode_supports(const AttentionPlan& plan, const StepContext& ctx) {
  const bool float8 = plan.cache_dtype == DType::kE4M3 &&
                      plan.cache_scales == KvScaleKind::kTensor &&
                      plan.shape.head_dim == cuda::kFloat8DecodeDim;
  return (plan.cache_dtype == plan.dtype || float8) && geometry_fits(plan, ctx);
}

int64_t flashinfer_workspace_bytes(const WorkspaceLimits& limits) {
  const int64_t elements = limits.float8_kv_heads * limits.head_dim;
  if (elements == 0) return 0;
  const int64_t most = kScratchBytes / (2 * static_cast<int64_t>(sizeof(__nv_bfloat16)) * elements);
  return std::min(limits.float8_keys, most) * 2 * static_cast<int64_t>(sizeof(__nv_bfloat16)) *
         elements;
}

int64_t flashinfer_plan_bytes(const AttentionPlan& plan, Device& device) {
  if (!is_compiled(plan)) return 0;
  return PlanLayout(plan, nullptr, gpu_at(device.ordinal())).bytes();
}

void flashinfer_plan(const AttentionPlan& plan, const StepContext& ctx) {
  const AttentionRoute route = attention_route(plan, ctx);
  const Gpu gpu = current_gpu();
  PlanArgs args{};
  args.flash = flash_plan(plan, gpu);
  args.window = plan.window;
  args.group_size = group_size(plan.shape);
  args.sm90 = sm90_tiling(plan.shape, ctx.sizes, gpu);
  args.fa2 = fa2_tiling(plan.shape, ctx.sizes, args.sm90, takes_all_heads(plan, ctx), gpu);
  args.fa2_percent = fa2_percent(plan.shape.head_dim);
  args.short_step = kShortStepRounds * gpu.multiprocessors / plan.shape.num_heads;
  args.decode_bound = decode_bound(plan.shape, ctx.sizes.num_requests, gpu);
  args.decode_tiles = decode_tiles_per_row(plan.shape);
  args.prefill = route.flashinfer_prefill;
  args.decode = route.flashinfer_decode;
  if (is_float8(plan.cache_dtype) && route.flashinfer_prefill) {
    args.scratch_keys = static_cast<int32_t>(scratch_of(plan, ctx).keys);
  }
  cuda::launch(kPlanOp, ctx, plan_kernel, dim3(args.decode ? 3 : 2), dim3(kPlanThreads), 0, args,
               ctx.rows, ctx.infer);
}

void flashinfer_prefill(const PagedAttentionParams& params, const StepContext& ctx) {
  if (ctx.sizes.num_tokens == 0) return;
  const cuda::FlashPlan flash = flash_plan(*params.plan, current_gpu());
  const HeadShape& shape = params.shape;
  if (!is_float8(params.cache->dtype)) {
    const cuda::FlashKeys keys = cached_keys(params, ctx);
    return launch_prefill(params, ctx, flash, keys, /*all_heads=*/true, shape.q_cols());
  }
  const Scratch scratch = scratch_of(*params.plan, ctx);
  check_internal(scratch.heads > 0, kOp, "no room to dequantise keys and values");
  const bool all_heads = scratch.heads == shape.num_kv_heads;
  for (int32_t first = 0; first < shape.num_kv_heads; first += scratch.heads) {
    const int32_t heads = std::min(scratch.heads, shape.num_kv_heads - first);
    const cuda::FlashKeys keys = scratch_keys(params, ctx, flash, scratch, heads);
    cuda::dequantize_keys(params, ctx, flash, first, keys.cache, scratch.keys);
    PagedAttentionParams part = params;
    part.shape.num_kv_heads = heads;
    part.shape.num_heads = heads * group_size(shape);
    part.q_stride = params.q_token_stride();
    const int64_t first_column = int64_t{first} * group_size(shape) * shape.head_dim;
    part.qkv = static_cast<const __nv_bfloat16*>(params.qkv) + first_column;
    part.out = static_cast<__nv_bfloat16*>(params.out) + first_column;
    launch_prefill(part, ctx, flash, keys, all_heads, shape.q_cols());
  }
}

void flashinfer_decode(const PagedAttentionParams& params, const StepContext& ctx) {
  if (ctx.sizes.num_requests == 0) return;
  check_cache(*params.cache);
  const Gpu gpu = current_gpu();
  const cuda::FlashPlan flash = flash_plan(*params.plan, gpu);
  const HeadShape& shape = params.shape;
  constexpr int kWarpsPerBlock = 4;
  // Decode rows come first and have one token each.
  const int32_t tokens = std::min(ctx.sizes.num_requests, ctx.sizes.num_tokens);
  const int64_t warps = int64_t{tokens} * shape.num_heads;
  const bool float8 = is_float8(params.cache->dtype);
  check_internal(!float8 || params.cache->scales.kind == KvScaleKind::kTensor, kOp,
                 "the plan is for a cache with one scale");
  const cuda::FlashKeys keys = cached_keys(params, ctx);
  const cuda::FlashArgs args{
      params, ctx, flash, keys, shape.q_cols(), decode_bound(shape, ctx.sizes.num_requests, gpu)};
  dispatch_head_dim(shape.head_dim, [&](auto head_dim) {
    if (float8) {
      cuda::launch_flash_decode_e4m3<cuda::kFloat8DecodeDim>(args);
    } else {
      cuda::launch_flash_decode<head_dim()>(args);
    }
    cuda::launch("paged_attention.merge", ctx, merge_kernel<head_dim()>,
                 dim3(static_cast<unsigned>((warps + kWarpsPerBlock - 1) / kWarpsPerBlock)),
                 dim3(kWarpsPerBlock * cuda::kWarpSize), 0, flash, ctx.infer,
                 static_cast<__nv_bfloat16*>(params.out), tokens, shape.num_heads,
                 static_cast<const float*>(params.cache->scales.value));
  });
}

}  // namespace mrv1
