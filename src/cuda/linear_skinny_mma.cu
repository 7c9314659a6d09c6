// Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
//
// Linear of few rows with mma.sync. Weight rows are the 16-wide side of the product and tokens the
// 8-wide side, so up to 8 tokens cost one instruction a 16 x 16 piece of the weight.
//
// A block owns tiles of kRows weight rows. Its warps split K: warp w takes the column groups w, w +
// warps, ... of 64 columns and all of the tile's rows, so that each element of weight and x is read
// by one warp only. Each warp streams through a ring of its own in shared memory (cp.async) and
// meets the others once a tile, to add up the partial sums in the order of warps. The ring runs on
// across tiles. The first stages of the weight are requested before the kernel waits for the one
// before it.
//
// K is permuted inside a group of 32 columns, the same way for both operands: a lane reads 16
// contiguous bytes of a row and uses them as its parts of two products.
#include <algorithm>

#include "async_copy.cuh"
#include "linear_skinny_kernels.h"
#include "tensor_cores.cuh"

namespace mrv1::cuda {
namespace {

constexpr int kGroup = 64;      // columns of a stage
constexpr int kRowBytes = 128;  // of a stage
constexpr int kMaxStages = 8;

// Walks the stages of one warp: the groups of a tile, then those of the block's next tile.
struct Walk {
  int tile, group;

  __device__ void next(int warp, int warps, int groups) {
    group += warps;
    if (group >= groups) {
      group = warp;
      tile += gridDim.x;
    }
  }
};

template <int kRows, int kTokens>
struct MmaShape {
  static constexpr int kStageBytes = (kRows + kTokens) * kRowBytes;
  static constexpr int kParts = (kRows + 15) / 16;         // pieces of 16 rows
  static constexpr int kHalves = kRows % 16 == 0 ? 2 : 1;  // a lone half piece leaves 8 rows zero
  static constexpr int kNs = kTokens / 8;
  static constexpr int kPartialPairs = kParts * kNs * kHalves * 32;  // float2, a warp
  // Two kernels of a step should fit a multiprocessor side by side.
  static constexpr int kMaxThreads = kParts * kNs > 8 ? 256 : 512;
  static size_t shared_bytes(int warps, int stages) {
    return static_cast<size_t>(warps) * (stages * kStageBytes + kPartialPairs * sizeof(float2));
  }
};

template <int kRows, int kTokens>
__global__ void __launch_bounds__(MmaShape<kRows, kTokens>::kMaxThreads)
    mma_kernel(SkinnyArgs args, int stages, int tiles) {
  using Shape = MmaShape<kRows, kTokens>;
  constexpr int kStageBytes = Shape::kStageBytes;
  constexpr int kParts = Shape::kParts;
  constexpr int kHalves = Shape::kHalves;
  constexpr int kNs = Shape::kNs;
  extern __shared__ __align__(128) char shared[];

  const int warps = blockDim.x / 32;
  const int warp = threadIdx.x / 32;
  const int lane = threadIdx.x % 32;
  const int groups = (args.k + kGroup - 1) / kGroup;
  const uint32_t ring = shared_address(shared) + warp * stages * kStageBytes;
  float2* partial = reinterpret_cast<float2*>(shared + warps * stages * kStageBytes);
  const int first_token = blockIdx.y * kTokens;

  // Loading: a lane copies 16 bytes of every fourth row. With an activation the 16 rows of a piece
  // are 8 of gate and the 8 of up that go with them.
  const int load_row = lane / 8;
  const int load_col = lane % 8 * 8;
  const uint32_t load_to = load_row * kRowBytes + ((lane % 8) ^ ((load_row & 1) << 2)) * 16;
  const int piece_stride = args.gated() ? 8 : 16;
  const int half_stride = args.gated() ? args.out_cols : 8;
  const int tile_stride = args.gated() ? kRows / 2 : kRows;

  const uint64_t policy = weight_policy(gridDim.y == 1);
  const auto load_weight = [&](const Walk& at, uint32_t stage) {
    const int col = at.group * kGroup + load_col;
    const int first = at.tile * tile_stride + load_row;
    const BFloat16* source = args.weight + col;
#pragma unroll
    for (int i = 0; i < kRows / 4; ++i) {
      const int in_half = i / 4 * piece_stride + i % 2 * 4 + first;
      const int row = in_half + i / 2 % 2 * half_stride;
      const bool valid = col < args.k && (args.gated() ? in_half < args.out_cols : row < args.n);
      cp_async_16(stage + load_to + i * 4 * kRowBytes,
                  valid ? source + int64_t{row} * args.stride : args.weight, valid, policy);
    }
  };
  const auto load_x = [&](const Walk& at, uint32_t stage) {
    const int col = at.group * kGroup + load_col;
#pragma unroll
    for (int i = 0; i < kTokens / 4; ++i) {
      const int token = first_token + i * 4 + load_row;
      const bool valid = col < args.k && token < args.tokens;
      cp_async_16(stage + load_to + (kRows + i * 4) * kRowBytes,
                  valid ? args.x + int64_t{token} * args.stride + col : args.x, valid);
    }
  };

  const int last_tile = warp < groups ? tiles : 0;  // a warp without columns loads nothing
  Walk load{static_cast<int>(blockIdx.x), warp};
  for (int s = 0; s < stages && load.tile < last_tile; ++s) {
    load_weight(load, ring + s * kStageBytes);
    load.next(warp, warps, groups);
  }
  launch_next();
  wait_for_previous();
  load = {static_cast<int>(blockIdx.x), warp};
  for (int s = 0; s < stages; ++s) {
    if (load.tile < last_tile) {
      load_x(load, ring + s * kStageBytes);
      load.next(warp, warps, groups);
    }
    cp_async_commit_group();
  }

  const int g = lane / 4;
  const uint32_t read_at[2] = {
      static_cast<uint32_t>(g * kRowBytes + ((lane % 4) ^ ((g & 1) << 2)) * 16),
      static_cast<uint32_t>(g * kRowBytes + ((lane % 4 + 4) ^ ((g & 1) << 2)) * 16)};

  int slot = 0;
  for (int tile = blockIdx.x; tile < tiles; tile += gridDim.x) {
    float sums[kParts][kNs][4] = {};
    for (int group = warp; group < groups; group += warps) {
      const uint32_t stage = ring + slot * kStageBytes;
      cp_async_wait_group<kMaxStages - 1>(stages - 1);
      __syncwarp();
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        uint4 b[kNs];
#pragma unroll
        for (int n = 0; n < kNs; ++n) {
          b[n] = ld_shared_v4_u32(stage + (kRows + n * 8) * kRowBytes + read_at[half]);
        }
#pragma unroll
        for (int part = 0; part < kParts; ++part) {
          const uint4 low = ld_shared_v4_u32(stage + part * 16 * kRowBytes + read_at[half]);
          uint4 high = {0, 0, 0, 0};
          if constexpr (kHalves == 2) {
            high = ld_shared_v4_u32(stage + (part * 16 + 8) * kRowBytes + read_at[half]);
          }
#pragma unroll
          for (int n = 0; n < kNs; ++n) {
            mma_m16n8k16_bf16(sums[part][n], low.x, high.x, low.y, high.y, b[n].x, b[n].y);
          }
#pragma unroll
          for (int n = 0; n < kNs; ++n) {
            mma_m16n8k16_bf16(sums[part][n], low.z, high.z, low.w, high.w, b[n].z, b[n].w);
          }
        }
      }
      __syncwarp();
      if (load.tile < last_tile) {
        load_weight(load, stage);
        load_x(load, stage);
        load.next(warp, warps, groups);
      }
      cp_async_commit_group();
      slot = slot + 1 == stages ? 0 : slot + 1;
    }

    // partial[warp][part][n][half][lane]: two tokens of one weight row.
    float2* mine = partial + warp * Shape::kPartialPairs + lane;
#pragma unroll
    for (int part = 0; part < kParts; ++part) {
#pragma unroll
      for (int n = 0; n < kNs; ++n) {
#pragma unroll
        for (int half = 0; half < kHalves; ++half) {
          mine[((part * kNs + n) * kHalves + half) * 32] =
              make_float2(sums[part][n][half * 2], sums[part][n][half * 2 + 1]);
        }
      }
    }
    __syncthreads();
    const auto total = [&](int at) {
      float2 sum = partial[at];
#pragma unroll 4
      for (int w = 1; w < warps; ++w) {
        const float2 more = partial[w * Shape::kPartialPairs + at];
        sum.x += more.x;
        sum.y += more.y;
      }
      return sum;
    };
    if (args.gated()) {
      for (int i = threadIdx.x; i < kParts * kNs * 32; i += blockDim.x) {
        const int col = tile * tile_stride + i / (32 * kNs) * 8 + i % 32 / 4;
        if (col >= args.out_cols) continue;
        float2 gate = total(i / 32 * kHalves * 32 + i % 32);
        float2 up = total((i / 32 * kHalves + 1) * 32 + i % 32);
        if (args.bias != nullptr) {
          gate.x += args.bias[col];
          gate.y += args.bias[col];
          up.x += args.bias[args.out_cols + col];
          up.y += args.bias[args.out_cols + col];
        }
        const int token = first_token + i / 32 % kNs * 8 + i % 4 * 2;
        if (token < args.tokens)
          skinny_store(args, token, col, skinny_gated_mul(args.activation, gate.x, up.x));
        if (token + 1 < args.tokens) {
          skinny_store(args, token + 1, col, skinny_gated_mul(args.activation, gate.y, up.y));
        }
      }
    } else {
      for (int i = threadIdx.x; i < Shape::kPartialPairs; i += blockDim.x) {
        const int part = i / (32 * kHalves * kNs);
        const int half = i / 32 % kHalves;
        const int col = tile * tile_stride + part * 16 + half * 8 + i % 32 / 4;
        const int token = first_token + i / (32 * kHalves) % kNs * 8 + i % 4 * 2;
        if (col >= args.n || token >= args.tokens) continue;
        float2 sum = total(i);
        if (args.bias != nullptr) {
          sum.x += args.bias[col];
          sum.y += args.bias[col];
        }
        skinny_store(args, token, col, sum.x);
        if (token + 1 < args.tokens) skinny_store(args, token + 1, col, sum.y);
      }
    }
    if (tile + static_cast<int>(gridDim.x) < tiles) __syncthreads();  // `partial` is written again
  }
  cp_async_wait_group<0>();
}

template <int kRows, int kTokens>
void launch_mma(const SkinnyArgs& args, const SkinnyConfig& config, const DeviceLimits& limits,
                const StepContext& ctx) {
  using Shape = MmaShape<kRows, kTokens>;
  const int warps = config.warps;
  const size_t limit = limits.shared_bytes;
  // A smaller tile of tokens gives the same bits.
  if constexpr (kTokens > 8) {
    if (Shape::shared_bytes(warps, 2) > limit || warps * 32 > Shape::kMaxThreads) {
      return launch_mma<kRows, kTokens / 2>(args, config, limits, ctx);
    }
  }
  const int tile_outputs = args.gated() ? kRows / 2 : kRows;
  const int tiles = (args.out_cols + tile_outputs - 1) / tile_outputs;
  int stages = std::clamp<int>(config.stages, 1, kMaxStages);
  while (stages > 1 && Shape::shared_bytes(warps, stages) > limit) --stages;
  const size_t shared_bytes = Shape::shared_bytes(warps, stages);
  allow_shared_memory(kSkinnyOp, mma_kernel<kRows, kTokens>, shared_bytes);
  // One block a multiprocessor walks over tiles; the next kernel takes the rest of the room.
  const dim3 grid(std::min(tiles, limits.sms), (args.tokens + kTokens - 1) / kTokens);
  launch(kSkinnyOp, ctx, mma_kernel<kRows, kTokens>, grid, dim3(warps * 32), shared_bytes, args,
         stages, tiles);
}

template <int kRows>
void launch_mma(const SkinnyArgs& args, const SkinnyConfig& config, const DeviceLimits& limits,
                const StepContext& ctx) {
  if (args.tokens <= 8) return launch_mma<kRows, 8>(args, config, limits, ctx);
  if (args.tokens <= 16) return launch_mma<kRows, 16>(args, config, limits, ctx);
  if (args.tokens <= 32) return launch_mma<kRows, 32>(args, config, limits, ctx);
  launch_mma<kRows, 64>(args, config, limits, ctx);
}

}  // namespace

void skinny_mma(const SkinnyArgs& args, const SkinnyConfig& config, const DeviceLimits& limits,
                const StepContext& ctx) {
  check(config.warps >= 1 && config.warps <= 16, kSkinnyOp, "config.warps is ", +config.warps,
        "; it must be in [1, 16]");
  check(!args.gated() || config.tile_rows >= 16, kSkinnyOp, "config.tile_rows is ",
        config.tile_rows, "; with an activation it must be at least 16");
  switch (config.tile_rows) {
    case 8:
      return launch_mma<8>(args, config, limits, ctx);
    case 16:
      return launch_mma<16>(args, config, limits, ctx);
    case 32:
      return launch_mma<32>(args, config, limits, ctx);
    case 48:
      return launch_mma<48>(args, config, limits, ctx);
    case 64:
      return launch_mma<64>(args, config, limits, ctx);
    default:
      fail(ErrorKind::kInvalidArgument, kSkinnyOp, "config.tile_rows is ", config.tile_rows,
           "; kMma takes 8, 16, 32, 48 or 64");
  }
}

}  // namespace mrv1::cuda
