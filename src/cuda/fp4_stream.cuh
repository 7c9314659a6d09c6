// Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
//
// Products of few rows with NVFP4 weights: what they cost is reading the weights. Weight rows are
// the 16-wide side of m16n8k16 products and rows of x, tokens, the 8-wide side, as in
// linear_skinny_mma.cu.
//
// Work is cut into items: kParts x 16 weight rows of one matrix, and up to 8 kNs tokens. A block
// takes item after item; its kStreamWarps warps split K: warp w takes the tiles of 128 columns w, w
// + kStreamWarps, ... Each warp streams codes and block scales, as they are stored, and x through a
// ring of its own in shared memory (cp.async), takes the codes into registers, where they become
// bfloat16, and meets the others once an item, to add up the partial sums in the order of warps.
// The ring runs on across items. Its first stages of the weight are requested before the kernel
// waits for the one before it, if items are known by then.
//
// Nothing but K decides the order of sums, so that a row's result depends neither on the number of
// rows nor on how the weight's rows are cut.
#pragma once

#include <algorithm>

#include "async_copy.cuh"
#include "fp4.cuh"
#include "linear_skinny_kernels.h"
#include "tensor_cores.cuh"

namespace mrv1::cuda {
namespace {

constexpr int kStreamWarps = 8;
constexpr int kStreamThreads = kStreamWarps * 32;
constexpr int kMaxStages = 4;
constexpr int kLaneBytes = 16;  // of codes, a unit
// Of the ring: a multiprocessor has room for two blocks, and mostly for one of the next kernel.
constexpr size_t kRingBytes = 60 * 1024;

struct StreamArgs {
  const uint4* codes;       // of the first column
  const uint32_t* scales;   // likewise
  const float* row_scales;  // [matrices * n]
  const BFloat16* x;        // rows x_stride apart
  const float* bias;        // [n] or null
  void* out;                // rows of out_cols, bfloat16 or float32
  int n, k;
  int units;      // tiles of 128 columns that k is
  int row_units;  // and those of the weight's rows
  int row_tiles;  // of 16 rows; with an activation those of gate alone
  int out_cols;
  int64_t x_stride;
  Activation activation;
  bool out_f32;
  bool read_once;   // the weight, by the kernel
  int tile_tokens;  // of an item, at most
};

// kParts x 16 rows of a matrix, from tile `tile` of so many on, and `count` tokens, whose results
// are rows first_row, first_row + 1, ... of the output.
struct StreamItem {
  int matrix, tile;
  int first_row, count;
};

// A stage of a warp: kUnits units of 64 columns of kParts tiles, and x.
template <int kParts, int kNs>
struct StreamShape {
  // Short stages where they have much; a warp's columns are the same.
  static constexpr int kUnits = kNs == 1 && kParts <= 3 ? 2 : 1;
  static constexpr int kCodeBytes = kParts * kUnits * kFp4UnitBytes;
  static constexpr int kWeightBytes = kCodeBytes + kParts * kFp4TileScaleBytes;
  static constexpr int kXRowBytes = kUnits * kFp4UnitCols * 2;
  static constexpr int kPartialPairs = kParts * kNs * 2 * 32;  // float2, a warp
  static int stage_bytes(int tokens) { return kWeightBytes + tokens * kXRowBytes; }
  // With two of them, blocks meet once an item instead of twice.
  static constexpr int kPartials = kParts * kNs <= 2 ? 2 : 1;
  static constexpr int kFinishRows = kParts * kFp4TileRows;
  static constexpr int kEndPairs = kStreamWarps * kPartialPairs + kFinishRows;
  static size_t shared_bytes(int stages, int tokens) {
    return static_cast<size_t>(kStreamWarps * stages * stage_bytes(tokens)) +
           kPartials * kEndPairs * sizeof(float2);
  }
};

// Walks the stages of one warp: the columns of an item, then those of the block's next.
template <int kUnits>
struct StreamWalk {
  int item, unit, half;

  // True if the item is another one now.
  __device__ bool next(int warp, int units) {
    if constexpr (kUnits == 1) {
      half ^= 1;
      if (half != 0) return false;
    }
    unit += kStreamWarps;
    if (unit < units) return false;
    unit = warp;
    item += gridDim.x;
    return true;
  }
};

// `Items` has
//   kEarly: whether items are known before the kernel before this one has ended;
//   kSameRows: whether all items have the same rows of x if one has them all;
//   void prepare(): called by all threads, before anything else is;
//   int count(); StreamItem at(int); int x_row(const StreamItem&, int): the row of x of a token.
template <int kParts, int kNs, bool kGated, typename Items>
__global__ void __launch_bounds__(kStreamThreads,
                                  kParts* kNs <= 2 ? 3 : (kParts * kNs <= 8 ? 2 : 1))
    fp4_stream_kernel(const __grid_constant__ StreamArgs args, const __grid_constant__ Items given,
                      int stages) {
  using Shape = StreamShape<kParts, kNs>;
  constexpr int kUnits = Shape::kUnits;
  static_assert(!kGated || kParts % 2 == 0, "tiles of gate and of up go together");
  extern __shared__ __align__(128) char shared[];

  const int warp = threadIdx.x / 32;
  const int lane = threadIdx.x % 32;
  const int stage_bytes = Shape::kWeightBytes + args.tile_tokens * Shape::kXRowBytes;
  const uint32_t ring = shared_address(shared) + warp * stages * stage_bytes;
  // Partial sums of all warps, and behind them scale and bias of an item's rows.
  float2* const ends = reinterpret_cast<float2*>(shared + kStreamWarps * stages * stage_bytes);

  Items items = given;
  if constexpr (!Items::kEarly) wait_for_previous();
  items.prepare();
  const int num_items = items.count();

  // The tile of 16 weight rows that is part `part` of tile `tile`, or a negative number.
  const auto row_tile = [&](int tile, int part) {
    if constexpr (kGated) {
      const int pair = tile * (kParts / 2) + part / 2;
      return pair < args.row_tiles ? pair + part % 2 * args.row_tiles : -1;
    } else {
      const int at = tile * kParts + part;
      return at < args.row_tiles ? at : -1;
    }
  };

  const uint64_t policy = weight_policy(args.read_once);
  const int64_t matrix_tiles = int64_t{(args.n + kFp4TileRows - 1) / kFp4TileRows} * args.row_units;
  const auto load_weight = [&](const StreamWalk<kUnits>& at, const StreamItem& item,
                               uint32_t stage) {
#pragma unroll
    for (int part = 0; part < kParts; ++part) {
      const int row = row_tile(item.tile, part);
      if (row < 0) continue;  // whatever then is there only reaches rows that nobody stores
      const int64_t where = item.matrix * matrix_tiles + int64_t{row} * args.row_units + at.unit;
      const uint4* codes = args.codes + (where * 2 + at.half) * 32 + lane;
#pragma unroll
      for (int u = 0; u < kUnits; ++u) {
        cp_async_16(stage + (part * kUnits + u) * kFp4UnitBytes + lane * kLaneBytes, codes + u * 32,
                    policy);
      }
      cp_async_4(stage + Shape::kCodeBytes + part * kFp4TileScaleBytes + lane * 4,
                 args.scales + where * 32 + lane, policy);
    }
  };
  // A lane copies the same 16 bytes of every kStep-th row. Neighbouring rows have their even and
  // odd pieces swapped, so that reads of two rows meet in no bank.
  constexpr int kChunks = Shape::kXRowBytes / 16;
  constexpr int kStep = 32 / kChunks;
  constexpr int kTurns = kNs * 8 / kStep;
  const int x_row = lane / kChunks, x_chunk = lane % kChunks;
  const uint32_t x_to =
      Shape::kWeightBytes + x_row * Shape::kXRowBytes + (x_chunk ^ (x_row & 1)) * 16;
  const BFloat16* x_from[kTurns];
  const auto find_x = [&](const StreamItem& item) {
#pragma unroll
    for (int i = 0; i < kTurns; ++i) {
      const int row = x_row + i * kStep;
      if (row >= item.count) break;
      x_from[i] = args.x + items.x_row(item, row) * args.x_stride + x_chunk * 8;
    }
  };
  const auto load_x = [&](const StreamWalk<kUnits>& at, const StreamItem& item, uint32_t stage) {
    const int col = at.unit * kFp4TileCols + at.half * kFp4UnitCols;
    const bool valid = col + x_chunk * 8 < args.k;
#pragma unroll
    for (int i = 0; i < kTurns; ++i) {
      if (x_row + i * kStep >= item.count) break;
      cp_async_16(stage + x_to + i * kStep * Shape::kXRowBytes, valid ? x_from[i] + col : args.x,
                  valid);
    }
  };

  const int last_item = warp < args.units ? num_items : 0;  // without columns there is no load
  StreamWalk<kUnits> load{static_cast<int>(blockIdx.x), warp, 0};
  StreamItem loaded{};  // the item of `load`
  if (load.item < last_item) loaded = items.at(load.item);
  if constexpr (Items::kEarly) {
    for (int s = 0; s < stages; ++s) {
      if (load.item < last_item) {
        load_weight(load, loaded, ring + s * stage_bytes);
        if (load.next(warp, args.units) && load.item < last_item) loaded = items.at(load.item);
      }
      cp_async_commit_group();
    }
    launch_next();
    wait_for_previous();
    load = {static_cast<int>(blockIdx.x), warp, 0};
    if (load.item < last_item) loaded = items.at(load.item);
  } else {
    launch_next();
  }
  if (load.item < last_item) find_x(loaded);
  const auto load_next = [&](uint32_t stage, bool weight) {
    if (load.item < last_item) {
      if (weight) load_weight(load, loaded, stage);
      load_x(load, loaded, stage);
      if (load.next(warp, args.units) && load.item < last_item) {
        loaded = items.at(load.item);
        find_x(loaded);
      }
    }
    cp_async_commit_group();
  };
  // Copies arrive in the order in which they were asked for, x after the weights of all stages. Of
  // one or two tokens it comes by way of registers, so that the first stages need not wait.
  if (Items::kSameRows && kNs == 1 && args.tile_tokens <= kStep) {
    uint4 values[kMaxStages];
#pragma unroll
    for (int s = 0; s < kMaxStages; ++s) {
      values[s] = {0, 0, 0, 0};
      if (s >= stages || load.item >= last_item) continue;
      const int col = load.unit * kFp4TileCols + load.half * kFp4UnitCols;
      if (x_row < loaded.count && col + x_chunk * 8 < args.k) {
        values[s] = __ldcg(reinterpret_cast<const uint4*>(x_from[0] + col));
      }
      load.next(warp, args.units);
    }
    if (load.item < last_item) loaded = items.at(load.item);
#pragma unroll
    for (int s = 0; s < kMaxStages; ++s) {
      if (s < stages && x_row < args.tile_tokens) {
        st_shared_v4_u32(ring + s * stage_bytes + x_to, values[s]);
      }
    }
  } else {
    for (int s = 0; s < stages; ++s) load_next(ring + s * stage_bytes, !Items::kEarly);
  }

  const int g = lane / 4, t = lane % 4;
  int slot = 0;
  int turn = 0;  // of the partial sums
  for (int index = blockIdx.x; index < num_items; index += gridDim.x) {
    const StreamItem item = items.at(index);
    // Where a lane's token lies, of each eight; beyond the last it is the last again.
    uint32_t x_at[kNs];
#pragma unroll
    for (int n = 0; n < kNs; ++n) {
      const int row = min(n * 8 + g, item.count - 1);
      x_at[n] = Shape::kWeightBytes + row * Shape::kXRowBytes + ((t * 2) ^ (row & 1)) * 16;
    }
    // Requested now, so that the end need not wait for them.
    float2 row_finish = {0.0f, 0.0f};
    if (threadIdx.x < kParts * kFp4TileRows) {
      const int in_tile = threadIdx.x % kFp4TileRows;
      const int at = row_tile(item.tile, threadIdx.x / kFp4TileRows);
      // The tiles of up follow those of gate, whose rows are whole tiles.
      const int row = at * kFp4TileRows + in_tile;
      if (at >= 0 && row < args.n) {
        row_finish.x = args.row_scales[int64_t{item.matrix} * args.n + row] * kFp4Unscale;
        if (args.bias != nullptr) row_finish.y = args.bias[row];
      }
    }

    float sums[kParts][kNs][4] = {};
    for (int unit = warp; unit < args.units; unit += kStreamWarps) {
#pragma unroll
      for (int half = 0; half < 2; half += kUnits) {
        const uint32_t stage = ring + slot * stage_bytes;
        cp_async_wait_group<kMaxStages - 1>(stages - 1);
        __syncwarp();
        // All of a stage goes to registers, so that it can be filled again at once.
        uint32_t scales[kParts];
        uint4 codes[kUnits][kParts];
        uint4 x[kUnits][kNs][2];
#pragma unroll
        for (int u = 0; u < kUnits; ++u) {
#pragma unroll
          for (int part = 0; part < kParts; ++part) {
            codes[u][part] =
                ld_shared_v4_u32(stage + (part * kUnits + u) * kFp4UnitBytes + lane * kLaneBytes);
          }
#pragma unroll
          for (int n = 0; n < kNs; ++n) {
            const uint32_t at = stage + u * kFp4UnitCols * 2 + x_at[n];
            x[u][n][0] = ld_shared_v4_u32(at);
            x[u][n][1] = ld_shared_v4_u32(at ^ 16);
          }
        }
#pragma unroll
        for (int part = 0; part < kParts; ++part) {
          scales[part] =
              ld_shared_u32(stage + Shape::kCodeBytes + part * kFp4TileScaleBytes + lane * 4);
        }
        __syncwarp();
        load_next(stage, true);
        slot = slot + 1 == stages ? 0 : slot + 1;
#pragma unroll
        for (int u = 0; u < kUnits; ++u) {
#pragma unroll
          for (int word = 0; word < 2; ++word) {
#pragma unroll
            for (int part = 0; part < kParts; ++part) {
              const uint4& both = codes[u][part];
              const uint32_t low_scale = fp4_decode_scale(scales[part], (half + u) * 2);
              const uint32_t high_scale = fp4_decode_scale(scales[part], (half + u) * 2 + 1);
              uint32_t low[4], high[4];
              fp4_dequantize(word == 0 ? both.x : both.y, low_scale, low);
              fp4_dequantize(word == 0 ? both.z : both.w, high_scale, high);
#pragma unroll
              for (int n = 0; n < kNs; ++n) {
                const uint4& token = x[u][n][word];
                mma_m16n8k16_bf16(sums[part][n], low[0], high[0], low[1], high[1], token.x,
                                  token.y);
              }
#pragma unroll
              for (int n = 0; n < kNs; ++n) {
                const uint4& token = x[u][n][word];
                mma_m16n8k16_bf16(sums[part][n], low[2], high[2], low[3], high[3], token.z,
                                  token.w);
              }
            }
          }
        }
      }
    }

    float2* const partial = ends + turn * Shape::kEndPairs;
    float2* const finish = partial + kStreamWarps * Shape::kPartialPairs;
    // partial[warp][part][n][half][lane]: two tokens of one weight row.
    float2* mine = partial + warp * Shape::kPartialPairs + lane;
#pragma unroll
    for (int part = 0; part < kParts; ++part) {
#pragma unroll
      for (int n = 0; n < kNs; ++n) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          mine[((part * kNs + n) * 2 + half) * 32] =
              make_float2(sums[part][n][half * 2], sums[part][n][half * 2 + 1]);
        }
      }
    }
    if (threadIdx.x < kParts * kFp4TileRows) finish[threadIdx.x] = row_finish;
    __syncthreads();
    const auto total = [&](int at, int row) {
      float2 sum = partial[at];
#pragma unroll
      for (int w = 1; w < kStreamWarps; ++w) {
        const float2 more = partial[w * Shape::kPartialPairs + at];
        sum.x += more.x;
        sum.y += more.y;
      }
      const float2 of_row = finish[row];
      // Rounded twice, as by other kernels, which add the bias later.
      sum.x = __fmul_rn(sum.x, of_row.x);
      sum.y = __fmul_rn(sum.y, of_row.x);
      if (args.bias != nullptr) {
        sum.x += of_row.y;
        sum.y += of_row.y;
      }
      return sum;
    };
    const auto store = [&](int row, int col, float value) {
      const int64_t at = int64_t{row} * args.out_cols + col;
      if (args.out_f32) {
        static_cast<float*>(args.out)[at] = value;
      } else {
        static_cast<BFloat16*>(args.out)[at] = from_float<BFloat16>(value);
      }
    };
    constexpr int kSums = kGated ? 2 : 1;  // of an output
    for (int i = threadIdx.x; i < Shape::kPartialPairs / kSums; i += kStreamThreads) {
      const int part = i / (64 * kNs);  // of outputs: of gate with an activation
      const int row = i / 32 % 2 * 8 + i % 32 / 4;
      const int col = (item.tile * (kParts / kSums) + part) * kFp4TileRows + row;
      const int at = i / 64 % kNs * 8 + i % 4 * 2;
      if (col >= args.out_cols || at >= item.count) continue;
      float2 result;
      if constexpr (kGated) {
        const int gate_at = part * (128 * kNs) + i % (64 * kNs);
        const float2 gate = total(gate_at, part * 2 * kFp4TileRows + row);
        const float2 up = total(gate_at + 64 * kNs, (part * 2 + 1) * kFp4TileRows + row);
        result.x = skinny_gated_mul(args.activation, gate.x, up.x);
        result.y = skinny_gated_mul(args.activation, gate.y, up.y);
      } else {
        result = total(i, part * kFp4TileRows + row);
      }
      store(item.first_row + at, col, result.x);
      if (at + 1 < item.count) store(item.first_row + at + 1, col, result.y);
    }
    if constexpr (Shape::kPartials == 2) {
      turn ^= 1;
    } else if (index + static_cast<int>(gridDim.x) < num_items) {
      __syncthreads();  // partial sums come again
    }
  }
  cp_async_wait_group<0>();
}

// How many stages a ring has, and the shared memory of a block with it.
template <typename Shape>
int fp4_stream_stages(int tile_tokens, const DeviceLimits& limits) {
  const int stage_bytes = Shape::stage_bytes(tile_tokens) * kStreamWarps;
  int stages = std::clamp(static_cast<int>(kRingBytes) / stage_bytes, 2, kMaxStages);
  while (stages > 1 && Shape::shared_bytes(stages, tile_tokens) > limits.shared_bytes) --stages;
  return stages;
}

template <int kParts, int kNs, bool kGated, typename Items>
void launch_fp4_stream(std::string_view op, const StreamArgs& args, const Items& items,
                       int64_t num_items, const DeviceLimits& limits, const StepContext& ctx) {
  using Shape = StreamShape<kParts, kNs>;
  const int stages = fp4_stream_stages<Shape>(args.tile_tokens, limits);
  const size_t shared_bytes = Shape::shared_bytes(stages, args.tile_tokens);
  // While the warps of one block meet, or wait for what they have asked of each other, those of
  // another compute.
  constexpr size_t kSystemBytes = 1024;  // of a block, besides
  const bool two = 2 * (shared_bytes + kSystemBytes) <= limits.shared_bytes + kSystemBytes;
  const int64_t blocks = std::min<int64_t>(num_items, int64_t{limits.sms} * (two ? 2 : 1));
  auto* kernel = fp4_stream_kernel<kParts, kNs, kGated, Items>;
  allow_shared_memory(op, kernel, shared_bytes);
  launch(op, ctx, kernel, dim3(static_cast<unsigned>(blocks)), dim3(kStreamThreads), shared_bytes,
         args, items, stages);
}

}  // namespace
}  // namespace mrv1::cuda
