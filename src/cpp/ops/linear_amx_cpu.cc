// Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
// The bfloat16 linear on AMX tiles. A kPanel16 panel is a row of B tiles as TDPBF16PS takes them:
// 32 of its columns are 1,024 contiguous bytes, 16 rows of 16 x 2 elements. An A tile is up to 16
// rows of x by 32 columns, read in place, and a C tile is 16 rows by one panel of float32 sums that
// stays in its register over all columns. Up to 2 x 2 C tiles are computed together, so that a load
// of a tile serves two products. An element of C is summed over ascending groups of 32 columns, in
// the same order whatever the number of rows in its tile and of tiles beside it, so a row's bits do
// not depend on the batch. Sums are rounded to nearest, subnormals are taken and given as zero.
#include "ops/vector_ops.h"
#include "ops/weight_view.h"

#if defined(__x86_64__)

#include <immintrin.h>

// From here to the end of the file: only code in this file's own namespace may follow.
#pragma GCC target("amx-tile,amx-bf16")

namespace mrv1::amx {
namespace {

constexpr int64_t kTileRows = 16;
constexpr int64_t kTileRowBytes = 64;
constexpr int64_t kTileBytes = kTileRows * kTileRowBytes;
// How far ahead of its use a panel is asked for.
constexpr int64_t kPrefetchBytes = 4096;

// The operand of LDTILECFG.
struct alignas(64) TileConfig {
  uint8_t palette;
  uint8_t start_row;
  uint8_t reserved[14];
  uint16_t row_bytes[16];
  uint8_t rows[16];
};

// Tiles 0 to 3 are C (row tile times 2, plus panel), 4 and 5 are A, 6 and 7 are B.
void configure_tiles(int64_t first_rows, int64_t second_rows) {
  const auto first = static_cast<uint8_t>(first_rows);
  const auto second = static_cast<uint8_t>(second_rows);
  const TileConfig config = {1,
                             0,
                             {},
                             {64, 64, 64, 64, 64, 64, 64, 64},
                             {first, first, second, second, first, second, 16, 16}};
  // The intrinsic does not tell the compiler that it reads all of its operand.
  asm volatile("" ::"r"(&config) : "memory");
  _tile_loadconfig(&config);
}

template <int kRowTiles, int kPanels>
void linear_tiles(const LinearBlock& block, int64_t row, int panel) {
  const int64_t x_bytes = block.x_stride * 2;
  const int64_t out_bytes = block.out_stride * 4;
  const char* x0 = static_cast<const char*>(block.x) + row * x_bytes;
  const char* x1 = x0 + kTileRows * x_bytes;
  const char* w0 = static_cast<const char*>(block.panels[panel]);
  const char* w1 = static_cast<const char*>(block.panels[panel + kPanels - 1]);
  _tile_zero(0);
  if constexpr (kPanels > 1) _tile_zero(1);
  if constexpr (kRowTiles > 1) _tile_zero(2);
  if constexpr (kRowTiles > 1 && kPanels > 1) _tile_zero(3);
  const int64_t steps = block.cols / kAmxCols;
  for (int64_t i = 0; i < steps; ++i) {
    // The block's later rows find the panels in cache.
    if (row == 0) {
#pragma GCC unroll 16
      for (int64_t line = 0; line < kTileBytes; line += 64) {
        __builtin_prefetch(w0 + kPrefetchBytes + line);
        if constexpr (kPanels > 1) __builtin_prefetch(w1 + kPrefetchBytes + line);
      }
    }
    _tile_loadd(6, w0, kTileRowBytes);
    if constexpr (kPanels > 1) _tile_loadd(7, w1, kTileRowBytes);
    _tile_loadd(4, x0, x_bytes);
    _tile_dpbf16ps(0, 4, 6);
    if constexpr (kPanels > 1) _tile_dpbf16ps(1, 4, 7);
    if constexpr (kRowTiles > 1) {
      _tile_loadd(5, x1, x_bytes);
      _tile_dpbf16ps(2, 5, 6);
      if constexpr (kPanels > 1) _tile_dpbf16ps(3, 5, 7);
    }
    w0 += kTileBytes;
    w1 += kTileBytes;
    x0 += kTileRowBytes;
    x1 += kTileRowBytes;
  }
  float* out0 = block.out + row * block.out_stride + panel * kPanelRows;
  float* out1 = out0 + kTileRows * block.out_stride;
  _tile_stored(0, out0, out_bytes);
  if constexpr (kPanels > 1) _tile_stored(1, out0 + kPanelRows, out_bytes);
  if constexpr (kRowTiles > 1) _tile_stored(2, out1, out_bytes);
  if constexpr (kRowTiles > 1 && kPanels > 1) _tile_stored(3, out1 + kPanelRows, out_bytes);
}

template <int kRowTiles>
void linear_panels(const LinearBlock& block, int64_t row) {
  int panel = 0;
  for (; panel + 2 <= block.num_panels; panel += 2) linear_tiles<kRowTiles, 2>(block, row, panel);
  if (panel < block.num_panels) linear_tiles<kRowTiles, 1>(block, row, panel);
}

}  // namespace

void linear(const LinearBlock& block) {
  int64_t configured = 0;
  for (int64_t row = 0; row < block.rows; row += 2 * kTileRows) {
    const int64_t left = block.rows - row;
    const int64_t rows = left < 2 * kTileRows ? left : 2 * kTileRows;
    const int64_t first = rows < kTileRows ? rows : kTileRows;
    if (rows != configured) configure_tiles(first, rows > first ? rows - first : first);
    configured = rows;
    if (rows > kTileRows) {
      linear_panels<2>(block, row);
    } else {
      linear_panels<1>(block, row);
    }
  }
  _tile_release();
}

}  // namespace mrv1::amx

#endif
