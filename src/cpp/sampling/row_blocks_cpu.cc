// Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
#include "sampling/row_blocks_cpu.h"

#include <functional>

namespace mrv1 {
namespace {

constexpr int64_t kTileBlocks = kDrawTile / kSampleBlock;
static_assert(kTileBlocks * kSampleBlock == kDrawTile);

}  // namespace

int64_t row_scratch_bytes(int64_t vocab_size) {
  const int64_t bytes = kNumClasses * (8 + 4) + RowBlocks::num_blocks(vocab_size) * (8 + 4 + 4) +
                        vocab_size * (4 + 4 + 4);
  return (bytes + 63) / 64 * 64;
}

RowScratch carve_row_scratch(void* workspace, int64_t vocab_size, int64_t index) {
  char* at = static_cast<char*>(workspace) + index * row_scratch_bytes(vocab_size);
  const int64_t blocks = RowBlocks::num_blocks(vocab_size);
  RowScratch scratch;
  scratch.class_sum = reinterpret_cast<uint64_t*>(at);
  scratch.block_sum = scratch.class_sum + kNumClasses;
  scratch.class_count = reinterpret_cast<int32_t*>(scratch.block_sum + blocks);
  scratch.block_max = scratch.class_count + kNumClasses;
  scratch.block_order = scratch.block_max + blocks;
  scratch.candidates = reinterpret_cast<float*>(scratch.block_order + blocks);
  scratch.ids = reinterpret_cast<int32_t*>(scratch.candidates + vocab_size);
  scratch.raw = reinterpret_cast<float*>(scratch.ids + vocab_size);
  return scratch;
}

bool RowBlocks::scan() {
  int32_t low = INT32_MAX;
  int32_t high = INT32_MIN;
  for (int64_t block = 0; block < blocks_; ++block) {
    const KeyRange range = loops_.key_range(logits(block), count(block));
    block_max_[block] = range.high;
    low = std::min(low, range.low);
    high = std::max(high, range.high);
  }
  max_key_ = high;
  return low >= kMinusInfKey && high <= kPlusInfKey && high > kMinusInfKey;
}

int32_t RowBlocks::largest() const {
  const int64_t block = std::find(block_max_, block_max_ + blocks_, max_key_) - block_max_;
  int64_t id = block * kSampleBlock;
  while (logit_key(logits_[id]) != max_key_) {
    ++id;
  }
  return static_cast<int32_t>(id);
}

int32_t RowBlocks::key_floor(int64_t n) const {
  if (n > blocks_) {
    return INT32_MIN;
  }
  std::copy(block_max_, block_max_ + blocks_, block_order_);
  std::nth_element(block_order_, block_order_ + n - 1, block_order_ + blocks_,
                   std::greater<int32_t>());
  return block_order_[n - 1];
}

int64_t RowBlocks::tile_end(int64_t tile) const {
  return std::min((tile + 1) * kTileBlocks, blocks_);
}

WeightRule RowBlocks::tile_rule(int64_t tile, float scale) const {
  const int32_t key =
      *std::max_element(block_max_ + tile * kTileBlocks, block_max_ + tile_end(tile));
  return WeightRule{logit_of_key(key), scale, 1};
}

uint64_t RowBlocks::tile_share(const WeightRule& rule) const {
  return token_weight(rule.reference, WeightRule{max_logit(), rule.scale, 1});
}

uint64_t RowBlocks::weigh_tiles(float scale, uint64_t* masses) const {
  const int64_t num_tiles = (blocks_ + kTileBlocks - 1) / kTileBlocks;
  uint64_t total = 0;
  for (int64_t tile = 0; tile < num_tiles; ++tile) {
    const WeightRule rule = tile_rule(tile, scale);
    const uint64_t share = tile_share(rule);
    uint64_t sum = 0;
    for (int64_t block = tile * kTileBlocks; share > 0 && block < tile_end(tile); ++block) {
      sum += loops_.weight_sum(logits(block), count(block), rule);
    }
    masses[tile] = scale_weight(sum, share);
    total += masses[tile];
  }
  return total;
}

int32_t RowBlocks::draw_from_tiles(float scale, const uint64_t* masses, uint64_t target) const {
  int64_t tile = 0;
  while (target >= masses[tile]) {
    target -= masses[tile++];
  }
  const WeightRule rule = tile_rule(tile, scale);
  const uint64_t share = tile_share(rule);
  uint64_t weights[kSampleBlock];
  uint64_t running = 0;
  for (int64_t block = tile * kTileBlocks;; ++block) {
    loops_.weights(logits(block), count(block), rule, weights);
    for (int64_t i = 0; i < count(block); ++i) {
      running += weights[i];
      if (scale_weight(running, share) > target) {
        return first_id(block) + static_cast<int32_t>(i);
      }
    }
  }
}

}  // namespace mrv1
