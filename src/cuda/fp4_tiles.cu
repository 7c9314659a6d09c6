// Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
#include "ops/fp4_tiles.h"

#include <algorithm>

#include "fp4.cuh"
#include "launch.h"
#include "linear_skinny_kernels.h"

namespace mrv1 {
namespace cuda {
namespace {

constexpr std::string_view kOp = "fp4_tiles";
constexpr int kThreads = 256;
constexpr int64_t kMaxGridY = 65535;

// The codes of a row and a block of 16 columns, and the byte of their scale.
__device__ void pack_block(const Fp4TilesParams& params, int64_t row, int64_t col, uint2* words,
                           uint8_t* scale) {
  *words = {0, 0};
  *scale = 0;
  if (row >= params.rows || col >= params.cols) return;
  const uint8_t e4m3 = params.scales[row * (params.cols / 16) + col / 16];
  *scale = fp4_pack_scale(e4m3);
  if ((e4m3 & 0x7f) == 0) return;  // zeros, whatever the codes
  uint2 codes = *reinterpret_cast<const uint2*>(params.codes + (row * params.cols + col) / 2);
  if ((e4m3 & 0x80) != 0) {
    codes.x ^= 0x88888888u;
    codes.y ^= 0x88888888u;
  }
  *words = {fp4_pack_word(codes.x), fp4_pack_word(codes.y)};
}

// A thread writes what a lane has of a tile; blockIdx.y is a tile's row.
__global__ void __launch_bounds__(kThreads) fp4_tiles_kernel(Fp4TilesParams params) {
  launch_next();
  wait_for_previous();
  const int64_t row_tiles = (params.cols + kFp4TileCols - 1) / kFp4TileCols;
  const int64_t at = int64_t{blockIdx.x} * (kThreads / 32) + threadIdx.x / 32;
  if (at >= row_tiles) return;
  const int lane = threadIdx.x % 32;
  const int64_t row = int64_t{blockIdx.y} * kFp4TileRows + lane / 4;
  const int64_t tile = (params.first_row / kFp4TileRows + blockIdx.y) * row_tiles + at;
  uint8_t scales[4];
#pragma unroll
  for (int unit = 0; unit < 2; ++unit) {
    const int64_t col = at * kFp4TileCols + unit * kFp4UnitCols + lane % 4 * 16;
    uint2 low, high;
    pack_block(params, row, col, &low, &scales[unit * 2]);
    pack_block(params, row + 8, col, &high, &scales[unit * 2 + 1]);
    static_cast<uint4*>(params.tile_codes)[(tile * 2 + unit) * 32 + lane] =
        make_uint4(low.x, low.y, high.x, high.y);
  }
  reinterpret_cast<uint32_t*>(params.tile_scales)[tile * 32 + lane] =
      scales[0] | scales[1] << 8 | scales[2] << 16 | uint32_t{scales[3]} << 24;
}

}  // namespace
}  // namespace cuda

void fp4_tiles_cuda(const Fp4TilesParams& params, const StepContext& ctx) {
  using namespace cuda;
  const int major = device_limits().major;
  if (major < 8) {
    fail(ErrorKind::kDevice, kOp,
         "NVFP4 weights need a GPU of compute capability 8.0 or later, "
         "this one has ",
         major, ".x");
  }
  check(params.cols % 16 == 0 && params.first_row % kFp4TileRows == 0, kOp, "first_row is ",
        params.first_row, " and cols are ", params.cols, "; both must be multiples of 16");
  const int64_t tiles = (params.rows + kFp4TileRows - 1) / kFp4TileRows;
  const int64_t warps = (params.cols + kFp4TileCols - 1) / kFp4TileCols;
  for (int64_t tile = 0; tile < tiles; tile += kMaxGridY) {
    Fp4TilesParams part = params;
    const int64_t done = tile * kFp4TileRows;
    part.codes += done * params.cols / 2;
    part.scales += done * params.cols / 16;
    part.first_row += done;
    part.rows -= done;
    const dim3 grid(static_cast<unsigned>((warps + kThreads / 32 - 1) / (kThreads / 32)),
                    static_cast<unsigned>(std::min(kMaxGridY, tiles - tile)));
    launch(kOp, ctx, fp4_tiles_kernel, grid, kThreads, 0, part);
  }
}

}  // namespace mrv1
