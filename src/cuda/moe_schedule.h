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

// Blocks that sort so many pairs.
constexpr int64_t kMoePairsPerBlock = 2048;
constexpr int64_t moe_schedule_blocks(int64_t pairs) {
  return (pairs + kMoePairsPerBlock - 1) / kMoePairsPerBlock;
}

// A group has at most tile_rows rows.
void moe_schedule(const MoeRows& rows, const MoeSchedule& schedule, int32_t tile_rows,
                  const StepContext& ctx);

// Groups that there may be of so many pairs.
constexpr int64_t moe_max_groups(int64_t pairs, int64_t num_experts, int64_t tile_rows) {
  const int64_t full_and_rest = pairs / tile_rows + num_experts;
  return pairs < full_and_rest ? pairs : full_and_rest;
}

// One product of all groups: out[place] = x[row or place] weight_e^T, or with an activation
// activation(gate) * up of it.
struct MoeProduct {
  const void* x;
  const int32_t* row;  // of x, by place; null: the place itself
  WeightView weight;
  void* out;  // [places, out_cols] of dtype
  DType dtype;
  Activation activation;
  const MoeGroup* groups;
  const int32_t* num_groups;
  int64_t max_groups;

  MRV1_HD bool gated() const { return activation != Activation::kNone; }
  MRV1_HD int64_t weight_rows() const { return weight.rows / weight.matrices; }  // of one expert
  MRV1_HD int64_t out_cols() const { return gated() ? weight_rows() / 2 : weight_rows(); }
};

// The textbook product, for any sizes and both dtypes; groups of at most kMoeTiledRows rows.
constexpr int32_t kMoeTiledRows = 64;
void moe_tiled(const MoeProduct& product, const StepContext& ctx);

// The product on tensor cores, if it is of bfloat16, sizes are multiples of 8 and the GPU is a
// Hopper. Groups have at most tile_rows rows, one of those that moe_wgmma_tile_rows gives for a
// pass of so many rows and pairs of a row and an expert. weights_first: this kernel may read the
// groups and request weights before the kernel before it has ended; that must be another product of
// the same groups by moe_wgmma.
bool moe_wgmma_supports(const MoeProduct& product);
int32_t moe_wgmma_tile_rows(int64_t rows, int64_t pairs, int64_t num_experts);
void moe_wgmma(const MoeProduct& product, int32_t tile_rows, bool weights_first,
               const StepContext& ctx);

#if defined(__CUDACC__)
// How many rows the pass has.
__device__ __forceinline__ int32_t moe_live_rows(const MoeRows& rows) {
  int32_t live = rows.num_rows;
  if (rows.counts != nullptr) {
    int32_t total = -rows.first_row;
    for (int32_t i = 0; i < rows.regions; ++i) total += rows.counts[i];
    live = min(live, max(total, 0));
  }
  return live;
}

// Where row number i of the pass lies.
__device__ __forceinline__ int32_t moe_row_at(const MoeRows& rows, int32_t i) {
  int32_t row = rows.first_row + i;
  if (rows.counts == nullptr) return row;
  int32_t region = 0;
  for (; row >= rows.counts[region]; ++region) row -= rows.counts[region];
  return region * rows.region_rows + row;
}
#endif

}  // namespace mrv1::cuda
