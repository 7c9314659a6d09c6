// Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
#pragma once

#include <algorithm>
#include <cstdint>

#include "sampling/sample_loops.h"

namespace mrv1 {

// Scratch of one row, carved from one thread's slice of the workspace.
struct RowScratch {
  uint64_t* class_sum;   // [kNumClasses]
  uint64_t* block_sum;   // [blocks], or of draw tiles
  int32_t* class_count;  // [kNumClasses]
  int32_t* block_max;    // [blocks] largest key
  int32_t* block_order;  // [blocks]
  float* candidates;     // [vocab]
  int32_t* ids;          // [vocab]
  float* raw;            // [vocab] logits before they are edited
};

// Bytes of a slice, and the scratch in the index-th one.
int64_t row_scratch_bytes(int64_t vocab_size);
RowScratch carve_row_scratch(void* workspace, int64_t vocab_size, int64_t index);

// One row of logits in blocks, with the largest logit of each.
class RowBlocks {
 public:
  RowBlocks(const float* logits, int64_t vocab_size, const RowScratch& scratch,
            const SampleLoops& loops)
      : logits_(logits),
        vocab_(vocab_size),
        blocks_(num_blocks(vocab_size)),
        block_max_(scratch.block_max),
        block_order_(scratch.block_order),
        loops_(loops) {}

  static int64_t num_blocks(int64_t vocab_size) {
    return (vocab_size + kSampleBlock - 1) / kSampleBlock;
  }

  // Finds the blocks' largest logits, which everything below needs. False if there is nothing to
  // draw: a NaN, or no logit above -inf.
  bool scan();

  int64_t blocks() const { return blocks_; }
  const float* logits(int64_t block) const { return logits_ + block * kSampleBlock; }
  int64_t count(int64_t block) const {
    return std::min(kSampleBlock, vocab_ - block * kSampleBlock);
  }
  static int32_t first_id(int64_t block) { return static_cast<int32_t>(block * kSampleBlock); }

  int32_t max_key() const { return max_key_; }
  int32_t max_key(int64_t block) const { return block_max_[block]; }
  float max_logit() const { return logit_of_key(max_key_); }
  // The lowest id of the largest logit.
  int32_t largest() const;

  // A key at or below that of the n-th logit in descending order: the n-th largest of the blocks'
  // maxima. Blocks whose maximum is lower hold none of the first n logits.
  int32_t key_floor(int64_t n) const;

  // Masses of the draw tiles, and their sum.
  uint64_t weigh_tiles(float scale, uint64_t* masses) const;
  // The token at `target` of what weigh_tiles() found.
  int32_t draw_from_tiles(float scale, const uint64_t* masses, uint64_t target) const;

 private:
  int64_t tile_end(int64_t tile) const;
  WeightRule tile_rule(int64_t tile, float scale) const;
  // The weight of the tile's reference relative to the row's.
  uint64_t tile_share(const WeightRule& rule) const;

  const float* logits_;
  int64_t vocab_;
  int64_t blocks_;
  int32_t* block_max_;
  int32_t* block_order_;
  const SampleLoops& loops_;
  int32_t max_key_ = 0;
};

}  // namespace mrv1
