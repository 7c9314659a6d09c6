// Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
//
// NVFP4 weights as CUDA kernels read them, WeightLayout::kTile16.
//
// A tile is 16 rows and 128 columns. Its codes are two units of 64 columns, of 16 bytes for each
// lane of a warp: lane 4 g + t has columns 16 t to 16 t + 15 of rows g and g + 8, which are the
// lane's part of four m16n8k16 products whose columns are permuted so that all 16 of a lane share
// their block scales. A row's 16 codes are two words; a word is two halves of 16 bits, of even and
// of odd columns, in which each of the four pairs of columns has a sign and a magnitude:
//
//   pair        0      1      2      3
//   sign       15     12     14     13
//   magnitude  8..6   5..3   2..0   11..9
//
// A sign in bit 15 and a magnitude in bits 8 to 6 are a bfloat16, of 2^-126 times the value that
// the code stands for: both are 0, a half of the smallest exponent, or 1.m times a power of two. So
// pairs come out by shifts and masks.
//
// The block scales of a tile are 4 bytes for each lane, for rows g and g + 8 of the first unit and
// of the second. A byte is five bits of exponent and three of mantissa, 2^(exponent - 22) * 1.m:
// the magnitude of a E4M3 value whose subnormals are normal here. Signs are part of the codes, and
// codes of blocks whose scale is 0 are 0; E4M3's NaN has the exponent 31. Placed in a bfloat16 it
// is 2^119 times its value, and its product with a code 2^-7 times what it should be, which is
// exact.
#pragma once

#include "core/portable.h"
#include "ops/weight_view.h"
#include "state/step_context.h"

namespace mrv1 {

constexpr int kFp4TileRows = static_cast<int>(kPanelRows);
constexpr int kFp4TileCols = static_cast<int>(kTileCols);
constexpr int kFp4UnitCols = 64;
constexpr int kFp4UnitBytes = kFp4TileRows * kFp4UnitCols / 2;  // of codes
constexpr int kFp4TileScaleBytes = kFp4TileRows * kFp4TileCols / 16;
// What products of the codes and scales below are to be multiplied by.
constexpr float kFp4Unscale = 128.0f;

// Two words for the 16 codes of a row of a unit, of which byte i of `codes` has two, the even
// column in the low nibble.
MRV1_HD uint32_t fp4_pack_word(uint32_t codes) {
  constexpr int kSigns[] = {15, 12, 14, 13};
  constexpr int kMagnitudes[] = {6, 3, 0, 9};
  uint32_t word = 0;
  for (int i = 0; i < 8; ++i) {
    const uint32_t code = codes >> (4 * i) & 15u;
    word |= ((code >> 3) << kSigns[i / 2] | (code & 7u) << kMagnitudes[i / 2]) << (i % 2 * 16);
  }
  return word;
}

// The way back.
MRV1_HD uint32_t fp4_unpack_word(uint32_t word) {
  constexpr int kSigns[] = {15, 12, 14, 13};
  constexpr int kMagnitudes[] = {6, 3, 0, 9};
  uint32_t codes = 0;
  for (int i = 0; i < 8; ++i) {
    const uint32_t half = word >> (i % 2 * 16);
    codes |= ((half >> kSigns[i / 2] & 1u) << 3 | (half >> kMagnitudes[i / 2] & 7u)) << (4 * i);
  }
  return codes;
}

// The byte for the magnitude of an E4M3 scale; that of 0 stands for what is multiplied by zeros.
MRV1_HD uint8_t fp4_pack_scale(uint8_t e4m3) {
  int exponent = e4m3 >> 3 & 15;
  int mantissa = e4m3 & 7;
  if (exponent == 15 && mantissa == 7) return 0xff;
  if (exponent == 0) {
    if (mantissa == 0) return 0;
    exponent = 1;
    while (mantissa < 8) {
      mantissa <<= 1;
      --exponent;
    }
    mantissa &= 7;
  }
  return static_cast<uint8_t>((exponent + 15) << 3 | mantissa);
}

// The way back, to a magnitude.
MRV1_HD uint8_t fp4_unpack_scale(uint8_t packed) {
  const int exponent = (packed >> 3) - 15;
  const int mantissa = packed & 7;
  if (packed == 0) return 0;
  if (exponent > 15) return 0x7f;
  if (exponent >= 1) return static_cast<uint8_t>(exponent << 3 | mantissa);
  return static_cast<uint8_t>((8 | mantissa) >> (1 - exponent));
}

// Four pairs of a word in bfloat16, times 2^-126.
MRV1_HD void fp4_decode(uint32_t word, uint32_t (&pairs)[4]) {
  constexpr uint32_t kSign = 0x80008000u, kMagnitude = 0x01c001c0u;
  pairs[0] = word & (kSign | kMagnitude);
  pairs[1] = word << 3 & (kSign | kMagnitude);
  pairs[2] = (word << 1 & kSign) | (word << 6 & kMagnitude);
  pairs[3] = (word << 2 & kSign) | (word >> 3 & kMagnitude);
}

// Byte `index` of a lane's scales, twice, in bfloat16, times 2^119.
MRV1_HD uint32_t fp4_decode_scale(uint32_t scales, int index) {
  return (scales >> (8 * index) & 0xffu) * 0x00100010u + 0x70007000u;
}

// Brings rows [first_row, first_row + rows) of an NVFP4 matrix, as checkpoints have them, into
// WeightLayout::kTile16. The first is a multiple of kTileRows, and so is their number but for those
// that end the matrix: what their last tile has beyond becomes zeros, as do columns beyond the
// last.
struct Fp4TilesParams {
  const uint8_t* codes;   // [rows, cols / 2], the even column in the low nibble
  const uint8_t* scales;  // [rows, cols / 16] of E4M3
  void* tile_codes;       // of the whole matrix
  uint8_t* tile_scales;   // likewise
  int64_t first_row, rows, cols;
};

// kDevice on a GPU that has no kernels for the layout.
void fp4_tiles_cuda(const Fp4TilesParams& params, const StepContext& ctx);

}  // namespace mrv1
