// Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
//
// Which rows go through which expert, sorted on the device: what the kernels of moe_experts have in
// common.
#pragma once

#include <cstdint>

#include "ops/moe_experts.h"

namespace mrv1::cuda {

constexpr std::string_view kMoeOp = "moe_experts";

// The rows of a pass, by their number among the rows that count: of regions, the first counts[0] of
// the first, then the first counts[1] of the second, and so on.
struct MoeRows {
  const int32_t* experts;
  const int32_t* counts;  // null without regions
  int32_t regions;
  int32_t region_rows;
  int32_t first_row, num_rows;  // of the pass; num_rows at most
  int32_t top_k;
  int32_t first_expert, num_experts;  // of this rank
};

// Rows of one expert, as many as a tile takes at most, at neighbouring places.
struct alignas(16) MoeGroup {
  int32_t expert;  // of this rank's, from 0
  int32_t first_place;
  int32_t count;
  int32_t unused;
};

// Pairs of a row and one of its experts have places, sorted by expert, then by row and choice.
struct MoeSchedule {
  int32_t* place;    // [num_rows * top_k] of each pair; -1 if the expert is not of this rank
  int32_t* row;      // of each place: a row of x
  MoeGroup* groups;  // by place
  int32_t* num_groups;
  int32_t* block_counts;  // scratch: [schedule_blocks][num_experts]
};

// So few pairs each block of the kernels sorts for itself, which saves a launch.
constexpr int32_t kMoeFewPairs = 32;

// Blocks that sort so many pairs.
constexpr int64_t kMoePairsPerBlock = 2048;
constexpr int64_t moe_schedule_blocks(int64_t pairs) {
  return (pairs + kMoePairsPerBlock - 1) / kMoePairsPerBlock;
}

// How a pass is cut: groups have at most tile_rows rows, and an expert that has rows has a multiple
// of `share` groups, next to each other. Of those the last may be empty.
struct MoeCut {
  int32_t tile_rows;
  int32_t share = 1;
};

// Sorts the pairs of a pass.
void moe_schedule(const MoeRows& rows, const MoeSchedule& schedule, const MoeCut& cut,
                  const StepContext& ctx);

// Groups that there may be of so many pairs.
constexpr int64_t moe_max_groups(int64_t pairs, int64_t num_experts, const MoeCut& cut) {
  const int64_t full_and_rest = pairs / (cut.tile_rows * cut.share) + num_experts;
  return (pairs < full_and_rest ? pairs : full_and_rest) * cut.share;
}

// One product of all groups: out[place] = x[row or place] weight_e^T, or with an activation
// activation(gate) * up of it.
struct MoeProduct {
  const void* x;
  bool sorted;  // rows of x lie by place, not as those of the pass
  WeightView weight;
  void* out;  // [places, out_cols] of dtype
  DType dtype;
  Activation activation;
  MoeRows rows;
  MoeSchedule schedule;
  bool few;  // there is no schedule, as each block makes its own; moe_wgmma only
  int64_t max_groups;

  MRV1_HD bool gated() const { return activation != Activation::kNone; }
  MRV1_HD int64_t weight_rows() const { return weight.rows / weight.matrices; }  // of one expert
  MRV1_HD int64_t out_cols() const { return gated() ? weight_rows() / 2 : weight_rows(); }
};

// The textbook product, for any sizes and both dtypes; groups of at most kMoeTiledRows rows.
constexpr int32_t kMoeTiledRows = 64;
void moe_tiled(const MoeProduct& product, const StepContext& ctx);

// The product on tensor cores, if it is of bfloat16, sizes are multiples of 8 and the GPU is a
// Hopper. moe_wgmma_cut says how a pass of so many rows that choose top_k of the experts each is to
// be cut. weights_first: this kernel may read the
// choices or the schedule, and request weights, before the kernel before it has ended; that must be
// another product of the same pass by moe_wgmma.
bool moe_wgmma_supports(const MoeProduct& product);
MoeCut moe_wgmma_cut(int64_t rows, int64_t top_k, int64_t num_experts);
void moe_wgmma(const MoeProduct& product, const MoeCut& cut, bool weights_first,
               const StepContext& ctx);

// The product of down and the weighted sums of a pass of at most kMoeDownFewPairs pairs, where
// moe_wgmma_supports it and has just made the product before it.
constexpr int64_t kMoeDownFewPairs = 8;
void moe_down_few(const MoeProduct& product, const float* weights, void* out, DType out_dtype,
                  const StepContext& ctx);

// The product of bfloat16 rows with NVFP4 weights, if the GPU can; cut as by moe_fp4_cut. follows:
// as weights_first above, the other product being by moe_fp4.
bool moe_fp4_supports(const MoeProduct& product);
MoeCut moe_fp4_cut(int64_t rows, int64_t top_k, int64_t num_experts);
void moe_fp4(const MoeProduct& product, const MoeCut& cut, bool follows, const StepContext& ctx);

// The same by moe_wgmma, and cut for it, of copies of the weights in bfloat16, some experts at a
// time: for so many rows that experts are worth copying. The product's sums are scaled by row.
bool moe_fp4_copies(int64_t rows, int64_t top_k, int64_t num_experts);
// Scratch for experts whose larger matrices have so many elements, and passes of so many pairs.
int64_t moe_fp4_copy_bytes(int64_t elements, int64_t num_experts, int64_t pairs);
void moe_fp4_copied(const MoeProduct& product, const MoeCut& cut, void* scratch, int64_t bytes,
                    const StepContext& ctx);

#if defined(__CUDACC__)
// Device code. All of these read past the first cache, whose lines another kernel may have filled:
// some kernels read the choices before the kernel before them has ended.

// How many rows the pass has.
__device__ __forceinline__ int32_t moe_live_rows(const MoeRows& rows) {
  int32_t live = rows.num_rows;
  if (rows.counts != nullptr) {
    int32_t total = -rows.first_row;
    for (int32_t i = 0; i < rows.regions; ++i) total += __ldcg(rows.counts + i);
    live = min(live, max(total, 0));
  }
  return live;
}

// Where row number i of the pass lies.
__device__ __forceinline__ int32_t moe_row_at(const MoeRows& rows, int32_t i) {
  int32_t row = rows.first_row + i;
  if (rows.counts == nullptr) return row;
  int32_t region = 0;
  for (int32_t count; row >= (count = __ldcg(rows.counts + region)); ++region) row -= count;
  return region * rows.region_rows + row;
}

// The expert of pair `pair` of the pass among those of this rank, or -1.
__device__ __forceinline__ int32_t moe_expert_of(const MoeRows& rows, int32_t pair) {
  const int32_t row = moe_row_at(rows, pair / rows.top_k);
  const int32_t expert =
      __ldcg(rows.experts + int64_t{row} * rows.top_k + pair % rows.top_k) - rows.first_expert;
  return expert >= 0 && expert < rows.num_experts ? expert : -1;
}

// A schedule of at most 32 pairs, in shared memory. Its groups lie in the order of their first
// pairs.
struct MoeFewPairs {
  MoeGroup groups[kMoeFewPairs];
  int32_t row[kMoeFewPairs];
  int32_t place[kMoeFewPairs];
  int32_t num_groups;
};

// Makes it; to be called by a whole warp. A group has all rows of its expert.
__device__ __forceinline__ void moe_schedule_few(const MoeRows& rows, MoeFewPairs* few) {
  constexpr unsigned kAll = 0xffffffffu;
  static_assert(kMoeFewPairs == 32, "a lane for each pair");
  const int lane = threadIdx.x % 32;
  const unsigned below = (1u << lane) - 1;
  const int32_t expert = lane < moe_live_rows(rows) * rows.top_k ? moe_expert_of(rows, lane) : -1;
  const unsigned alike = __match_any_sync(kAll, expert);
  const int32_t rank = __popc(alike & below);
  const bool is_first = expert >= 0 && rank == 0;
  const unsigned firsts = __ballot_sync(kAll, is_first);
  const int32_t count = is_first ? __popc(alike) : 0;
  int32_t end = count;
  for (int offset = 1; offset < 32; offset *= 2) {
    const int32_t before = __shfl_up_sync(kAll, end, offset);
    if (lane >= offset) end += before;
  }
  const int32_t first_place = __shfl_sync(kAll, end - count, __ffs(alike) - 1);
  if (is_first) few->groups[__popc(firsts & below)] = {expert, first_place, count, 0};
  few->place[lane] = expert >= 0 ? first_place + rank : -1;
  if (expert >= 0) few->row[first_place + rank] = moe_row_at(rows, lane / rows.top_k);
  if (lane == 0) few->num_groups = __popc(firsts);
  __syncwarp();
}
#endif

}  // namespace mrv1::cuda
