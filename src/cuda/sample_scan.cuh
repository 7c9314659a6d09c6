// Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
//
// The one read of the logits, shared by sample and score: the best of every tile, and where it is
// asked for the tile's weights relative to that.
#pragma once

#include <algorithm>
#include <cstdint>

#include "sample_tile.cuh"

namespace mrv1::cuda {

constexpr int kScanThreads = 128;
constexpr int kScanWarps = kScanThreads / kWarpSize;
// Blocks that fill the largest GPUs in one go; more rows than this take a block each.
constexpr int64_t kScanBlocks = 2112;

// What the scan leaves about a logits row besides its tiles.
struct RowPlan {
  int32_t place;      // by how many tokens the row is longer here
  int32_t row;        // -1 for padding and masked rows
  uint32_t finished;  // blocks of the second kernel that have weighed their tiles
  int32_t reserved;
};

// The workspace, by logits row.
struct Scratch {
  RowPlan* plans;
  unsigned long long* class_sums;  // [kClasses], for top_p
  Best* bests;                     // [tiles] of the edited logits
  unsigned long long* sums;        // [tiles] for rows that are weighed, at their temperature
  Best* raw_bests;                 // [tiles] of the logits before edits, for logprobs
  unsigned long long* raw_sums;    // [tiles] at temperature 1
  unsigned long long* weighed;     // [tiles] relative to the row's best, by the second kernel
  uint32_t* pieces;                // [tiles, kTilePieces] ordered keys of the best, for top_k
  uint32_t* raw_pieces;            // the same before edits, for logprobs
  int32_t tiles;

  __device__ int64_t at(int64_t row) const { return row * tiles; }
  __device__ int64_t piece_at(int64_t row) const { return row * tiles * kTilePieces; }
};

// Classes of logits by the exponent of their weight, from the largest logit down.
constexpr int32_t kClasses = 1024;

inline int64_t scratch_bytes(int64_t vocab_size, int64_t rows) {
  constexpr int64_t kPieceWords = 2 * kTilePieces * sizeof(uint32_t) / sizeof(uint64_t);
  const int64_t words = (5 + kPieceWords) * num_tiles(vocab_size) + kClasses;
  return rows * (static_cast<int64_t>(sizeof(RowPlan)) + words * int64_t{sizeof(uint64_t)});
}

inline Scratch carve_scratch(void* workspace, int64_t vocab_size, int64_t rows) {
  Scratch scratch;
  scratch.tiles = num_tiles(vocab_size);
  scratch.plans = static_cast<RowPlan*>(workspace);
  scratch.class_sums = reinterpret_cast<unsigned long long*>(scratch.plans + rows);
  scratch.bests = scratch.class_sums + rows * kClasses;
  scratch.sums = scratch.bests + rows * scratch.tiles;
  scratch.raw_bests = scratch.sums + rows * scratch.tiles;
  scratch.raw_sums = scratch.raw_bests + rows * scratch.tiles;
  scratch.weighed = scratch.raw_sums + rows * scratch.tiles;
  scratch.pieces = reinterpret_cast<uint32_t*>(scratch.weighed + rows * scratch.tiles);
  scratch.raw_pieces = scratch.pieces + rows * scratch.tiles * kTilePieces;
  return scratch;
}

// Tiles of each of the blocks of a row such that about `blocks` blocks do `rows` rows, each taking
// `at_once` tiles at a time.
inline int32_t tiles_of_split(int32_t tiles, int32_t rows, int64_t blocks, int32_t at_once) {
  const int64_t unit = blocks * at_once;
  const int64_t rounds = std::max<int64_t>((int64_t{tiles} * rows + unit - 1) / unit, 1);
  const int64_t splits = (tiles + rounds * at_once - 1) / (rounds * at_once);
  return static_cast<int32_t>((tiles + splits - 1) / splits);
}

// What a scan of a row is to find, and where it goes.
struct ScanTargets {
  // Sums of weights, at two temperatures.
  struct Sums {
    unsigned long long* sums = nullptr;  // [tiles]; null: none
    float scale = 0.0f;
  };

  Best* bests;                 // [tiles]
  uint32_t* pieces = nullptr;  // [tiles, kTilePieces]; null: none
  bool with_ids = false;       // in bests
  Sums first, second;
};

// What logprobs need to know of a row, with `count` candidates, as the model made it.
__device__ inline ScanTargets raw_targets(const Scratch& scratch, int64_t row, int32_t count) {
  ScanTargets targets{scratch.raw_bests + scratch.at(row)};
  if (count > 0) targets.pieces = scratch.raw_pieces + scratch.piece_at(row);
  targets.second = {scratch.raw_sums + scratch.at(row), Temperature::scale(1.0f)};
  return targets;
}

// Scans the tiles tile, tile + stride, ... before `end` of a row, a warp each. `held` has been
// loaded with the first. A NaN that a mask hides is found all the same.
template <bool kVector>
__device__ __forceinline__ void scan_tiles(Tile<kVector>& held, const float* logits, int32_t vocab,
                                           int32_t tile, int32_t end, int32_t stride,
                                           const uint32_t* mask, const uint32_t* second_mask,
                                           const ScanTargets& targets) {
  const bool is_first_lane = threadIdx.x % kWarpSize == 0;
  while (tile < end) {
    float largest = held.lane_max();
    if (mask != nullptr || second_mask != nullptr) {
      const bool has_nan = largest != largest;
      held.mask(mask_word(mask, second_mask, tile, vocab));
      if (!has_nan) largest = held.lane_max();
    }
    Best best = held.best(largest);
    if (best != kNanBest) {
      if (targets.pieces != nullptr) held.store_pieces(targets.pieces + tile * kTilePieces);
      if (targets.with_ids && best != kNoBest) best = held.with_id(best, tile);
      // A loop, so that the long code of the weights is there once.
#pragma unroll 1
      for (int i = 0; i < 2; ++i) {
        unsigned long long* sums = i == 0 ? targets.first.sums : targets.second.sums;
        if (sums == nullptr) continue;
        const float scale = i == 0 ? targets.first.scale : targets.second.scale;
        const uint64_t sum = held.weight(best, scale);
        if (is_first_lane) sums[tile] = sum;
      }
    }
    if (is_first_lane) targets.bests[tile] = best;
    tile += stride;
    if (tile < end) held.load(logits, tile, vocab);
  }
}

}  // namespace mrv1::cuda
