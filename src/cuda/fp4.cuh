// Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
#pragma once

#include "ops/fp4_tiles.h"

namespace mrv1::cuda {

// Products of pairs of bfloat16. Subnormals count.
__device__ __forceinline__ uint32_t multiply_pairs(uint32_t a, uint32_t b) {
  uint32_t product;
  asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(product) : "r"(a), "r"(b), "r"(0x80008000u));
  return product;
}

// Four pairs of a word times the row's scale.
__device__ __forceinline__ void fp4_dequantize(uint32_t word, uint32_t scale,
                                               uint32_t (&pairs)[4]) {
  fp4_decode(word, pairs);
#pragma unroll
  for (uint32_t& pair : pairs) pair = multiply_pairs(pair, scale);
}

// The words of 16 codes, and the byte of their scale, of a row and a block of 16 columns.
struct Fp4Block {
  uint2 words;
  uint32_t scale;
};

__device__ __forceinline__ Fp4Block fp4_block(const WeightView& weight, int64_t row,
                                              int64_t block) {
  const int64_t row_tiles = (weight.cols + kFp4TileCols - 1) / kFp4TileCols;
  const int64_t tile = row / kFp4TileRows * row_tiles + block / 8;
  const int64_t lane = row % 8 * 4 + block % 4;
  const int64_t unit = tile * 2 + block / 4 % 2;
  const int64_t high = row / 8 % 2;
  return {static_cast<const uint2*>(weight.data)[(unit * 32 + lane) * 2 + high],
          weight.scales[(tile * 32 + lane) * 4 + block / 4 % 2 * 2 + high]};
}

// matrix() in device code.
__device__ __forceinline__ WeightView fp4_matrix(const WeightView& weight, int64_t index) {
  WeightView one = weight;
  one.rows = weight.rows / weight.matrices;
  one.matrices = 1;
  const int64_t tiles = (one.rows + kFp4TileRows - 1) / kFp4TileRows *
                        ((one.cols + kFp4TileCols - 1) / kFp4TileCols) * index;
  one.data = static_cast<const char*>(weight.data) + tiles * 2 * kFp4UnitBytes;
  one.scales = weight.scales + tiles * kFp4TileScaleBytes;
  one.row_scales = weight.row_scales + index * one.rows;
  return one;
}

// code * block scale of one element: for kernels that have no speed to lose.
__device__ __forceinline__ float fp4_element(const WeightView& weight, int64_t row, int64_t col) {
  const Fp4Block block = fp4_block(weight, row, col / 16);
  uint32_t pairs[4];
  fp4_dequantize(col / 8 % 2 == 0 ? block.words.x : block.words.y, fp4_decode_scale(block.scale, 0),
                 pairs);
  const int pair = col / 2 % 4;
  const uint32_t both = pair == 0   ? pairs[0]
                        : pair == 1 ? pairs[1]
                        : pair == 2 ? pairs[2]
                                    : pairs[3];
  return __uint_as_float(col % 2 == 0 ? both << 16 : both & 0xffff0000u) * kFp4Unscale;
}

}  // namespace mrv1::cuda
