// Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
//
// The work list of the native attention kernel, and how it lies in AttentionPlan::data.
//
// An item is a tile of query rows of one request: query tokens times the heads that share a
// key/value head, flat. Each item is computed once for every key/value head, over its visible
// positions in units of 64. All this work lies on one line of cells: item by item, in it head by
// head, in that kSegmentCost cells for what a segment costs by itself and then a cell a unit. The
// line is cut evenly between workers, the thread blocks of a fixed grid: all get the same, whatever
// the lengths are. What a worker has of one item and head is a segment; a segment that is not the
// whole stores a partial result, and the worker that has the last of them merges.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "ops/paged_attention.h"

namespace mrv1::cuda {

constexpr int kAttentionWarps = 4;
constexpr int kAttentionThreads = 32 * kAttentionWarps;
constexpr int kWarpPositions = 16;
constexpr int kUnit = kWarpPositions * kAttentionWarps;  // positions of a unit
constexpr int kNarrowRows = 16;
constexpr int kWideRows = 64;
constexpr int kSegmentCost = 1;  // cells
constexpr int kCutCost = 3;      // cells that a worker loses where both its ends are cut
constexpr int kMostPieces = 64;  // of an item and head, as one worker merges them
constexpr int kSplitUnitsLog2 =
    3;                          // batch invariant: units that are summed as one, from position 0
constexpr int kWholeLog2 = 28;  // no item is split

struct alignas(16) AttentionItem {
  int32_t row;      // of the block table
  int32_t token;    // the request's first query token
  int32_t first;    // the tile's first row among the request's (token, head of group) pairs
  int32_t rows;     // of the tile
  int32_t context;  // position of the request's first query token
  int32_t begin;    // first position that a row of the tile sees
  int32_t end;      // past the last
  int32_t cell;     // where the item starts
};

// A worker's part of an item and head.
struct alignas(16) Segment {
  AttentionItem item;
  int32_t head;
  int32_t cell;            // where the item's head starts
  int32_t unit, unit_end;  // of the item
};

// Where a worker starts, whole, so that one load is enough to start.
struct alignas(16) AttentionWorker {
  Segment first;
  int32_t index;  // of the first item; num_items if there is nothing to do
  int32_t num_items;
  int32_t end;  // the cell before which the worker stops
  int32_t reserved;
  // The whole line.
  int32_t num_cells, num_workers;
  int32_t granule_log2;  // items are cut at multiples of this many units, from position 0
  int32_t reserved2;

  // The first cell of a worker, and the worker that has a cell.
  __device__ int32_t start(int32_t worker) const {
    return static_cast<int32_t>((int64_t{worker} * num_cells + num_workers - 1) / num_workers);
  }
  __device__ int32_t owner(int32_t cell) const {
    const int64_t place = int64_t{cell} * num_workers;
    int32_t worker =
        static_cast<int32_t>(__fdividef(static_cast<float>(place), static_cast<float>(num_cells)));
    while (int64_t{worker} * num_cells > place) --worker;
    while (int64_t{worker + 1} * num_cells <= place) ++worker;
    return worker;
  }
};

// Whether a warp's 16 positions of a unit lie in one block of the cache, so that the plan can look
// it up for each worker's first unit.
constexpr bool plans_blocks(int32_t block_size) { return block_size % kWarpPositions == 0; }

// What tiles there are.
enum class AttentionTiles {
  kNarrow,  // up to 16 rows; the warps divide the positions
  kSplits,  // the same, batch invariant: positions are summed in fixed splits
  kWide,    // up to 16 rows, or more and up to 64, where the warps divide the rows
};
AttentionTiles attention_tiles(const AttentionPlan& plan, const StepContext& ctx);

// How the kernel runs on a device for a head_dim. Work lists are the same whatever the caches hold;
// only how many units are in flight differs.
struct AttentionLaunch {
  int dim = 0;      // head_dim rounded up to what there is a kernel for
  int stages = 0;   // units in flight; below 2 the GPU has too little shared memory
  int workers = 0;  // thread blocks
  size_t shared_bytes = 0;
};
// On the current device.
AttentionLaunch attention_launch(int32_t head_dim, DType cache_dtype = DType::kBF16);

// Floats of a row of partial results: its columns, maximum and sum, and for alignment.
constexpr int partial_row_floats(int dim) { return dim + 4; }

// Offsets into AttentionPlan::data.
struct AttentionPlanLayout {
  int64_t workers, items, scratch, partials, bytes;
  int64_t first_blocks;   // [groups, workers, warps] cache block of a warp's first positions
  int64_t worker_floats;  // partial results of a worker
  int64_t start_floats;   // where in them that of the segment starts that others continue
};
AttentionPlanLayout attention_plan_layout(const AttentionPlan& plan, const AttentionLaunch& launch);

// The units of an item, counted from the one that holds its first visible position.
struct ItemUnits {
  int32_t base;  // the first unit, counted from position 0
  int32_t count;
  int32_t cells;  // of one head

  __device__ explicit ItemUnits(const AttentionItem& item)
      : base(item.begin / kUnit),
        count((item.end + kUnit - 1) / kUnit - base),
        cells(count + kSegmentCost) {}

  // The first unit whose granule starts at least `cells` after the first unit's cell.
  __device__ int32_t first_unit(int32_t cells_after, int32_t granule_log2) const {
    if (cells_after <= 0) return 0;
    const int32_t mask = (1 << granule_log2) - 1;
    const int32_t skew = base & mask;
    return min(count, ((cells_after + skew + mask) & ~mask) - skew);
  }
  // The unit at which the granule of `unit` starts.
  __device__ int32_t granule_start(int32_t unit, int32_t granule_log2) const {
    const int32_t mask = (1 << granule_log2) - 1;
    const int32_t skew = base & mask;
    return max(0, ((unit + skew) & ~mask) - skew);
  }
};

}  // namespace mrv1::cuda
