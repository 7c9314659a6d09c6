// Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
//
// What a warp of the native attention kernel does with 16 query rows and positions in shared
// memory: scores, softmax and the weighted sum of values, on bfloat16 tensor cores
// (attention_rows_e4m3.cuh: the same over an FP8 cache).
#pragma once

#include <cuda_bf16.h>

#include <cstdint>

#include "async_copy.cuh"
#include "native_attention.h"
#include "tensor_cores.cuh"

namespace mrv1::cuda {
namespace native {

constexpr int kBlock = 16;  // positions of a matrix instruction's tile
constexpr uint32_t kNowhere = 0xffffffffu;
constexpr unsigned kAllLanes = 0xffffffffu;

// Rows of D elements in shared memory.
template <int D, int kElementBytes>
struct Layout {
  static constexpr int kChunks = D * kElementBytes / kChunkBytes;
  static constexpr int kRowBytes = row_chunks(D, kElementBytes) * kChunkBytes;
  static constexpr int kMatrixBytes = kBlock * kRowBytes;

  __device__ static uint32_t offset(int row, int chunk) {
    if constexpr (swizzles(kChunks)) chunk ^= kChunks == 4 ? row >> 1 & 3 : row & 7;
    return static_cast<uint32_t>(row * kRowBytes + chunk * kChunkBytes);
  }
};
template <int D>
using QueryLayout = Layout<D, sizeof(uint16_t)>;

// A warp's part of a unit: keys, values and, where there are any, scales of a block of positions.
template <int D, typename Cache>
struct CacheLayout : Layout<D, Cache::kElementBytes> {
  using Matrix = Layout<D, Cache::kElementBytes>;
  static constexpr int kBlockBytes = 2 * Matrix::kMatrixBytes + (Cache::kScaled ? kScaleBytes : 0);
  static constexpr int kStageBytes = kAttentionWarps * kBlockBytes;
  static_assert(kStageBytes == attention_memory<Cache>(D).stage_bytes);
};

// This thread's place in its warp, as a value of its own each time: what follows from it is
// computed again in every unit, which is cheaper than to keep it all in registers between units.
__device__ __forceinline__ int lane_id() {
  int lane;
  asm volatile("mov.u32 %0, %%laneid;" : "=r"(lane));
  return lane;
}

__device__ __forceinline__ float exp2_fast(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// The score of a product that ScoreScale::factor has been applied to. tanh(y) is 1 - 2 / (1 +
// exp(2 y)): closer than tanh.approx, whose error of 2^-11 a cap of 50 would multiply.
__device__ __forceinline__ float capped(float product, const ScoreScale& scale) {
  const float part = __fdividef(2.0f, 1.0f + exp2_fast(product));
  return fmaf(-scale.cap, part, scale.cap);
}

// Asks for a line of the second cache: nothing waits for it, and nothing is read.
__device__ __forceinline__ void prefetch_line(const void* address) {
  asm volatile("prefetch.global.L2 [%0];" ::"l"(address));
}

// Waits until all but the `pending` newest groups have arrived. No table of jumps: it would come
// from memory.
__device__ __forceinline__ void wait_copies(int pending) {
  if (pending <= 1) return pending <= 0 ? cp_async_wait_group<0>() : cp_async_wait_group<1>();
  if (pending <= 3) return pending <= 2 ? cp_async_wait_group<2>() : cp_async_wait_group<3>();
  if (pending <= 5) return pending <= 4 ? cp_async_wait_group<4>() : cp_async_wait_group<5>();
  cp_async_wait_group<6>();
}
static_assert(kMaxStages - 2 <= 6);

__device__ __forceinline__ uint32_t pack(float low, float high) {
  const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
  return *reinterpret_cast<const uint32_t*>(&pair);
}

// A row's softmax over some positions: the largest score, the sum of exponentials, and four of the
// output's columns, not divided by the sum yet. Scores are in powers of two.
struct Partial {
  float maximum, sum;
  float4 out;
};

// What -infinity, the maximum of no positions, is replaced by where it is subtracted.
__device__ __forceinline__ float finite(float maximum) {
  return maximum == -INFINITY ? 0.0f : maximum;
}

// Adds `next`, of later positions. Batch invariant: wherever results are added, it is by this, in
// ascending order.
__device__ __forceinline__ void fold(Partial& into, const Partial& next) {
  const float maximum = fmaxf(into.maximum, next.maximum);
  const float old_factor = exp2_fast(into.maximum - finite(maximum));
  const float factor = exp2_fast(next.maximum - finite(maximum));
  into.maximum = maximum;
  into.sum = fmaf(next.sum, factor, into.sum * old_factor);
  into.out.x = fmaf(next.out.x, factor, into.out.x * old_factor);
  into.out.y = fmaf(next.out.y, factor, into.out.y * old_factor);
  into.out.z = fmaf(next.out.z, factor, into.out.z * old_factor);
  into.out.w = fmaf(next.out.w, factor, into.out.w * old_factor);
}

// A warp's 16 rows: what they see, and their sums. Lane l has a part in rows l / 4 ([0]) and
// l / 4 + 8 ([1]).
template <int D>
struct TileRows {
  float out[D / 8][4];
  float maximum[2], sum[2];
  int32_t low[2], high[2];          // positions that the row sees
  int32_t common_low, common_high;  // positions that every row sees

  __device__ void clear() {
#pragma unroll
    for (int t = 0; t < D / 8; ++t) {
#pragma unroll
      for (int i = 0; i < 4; ++i) out[t][i] = 0.0f;
    }
    maximum[0] = maximum[1] = -INFINITY;
    sum[0] = sum[1] = 0.0f;
  }

  // Rows [first, first + 16) of the item's tile; those past its end repeat the last.
  __device__ void place(const NativeAttentionArgs& args, const AttentionItem& item, int32_t first) {
    const int lane = lane_id();
    const int32_t last = item.rows - 1;
    const auto position = [&](int32_t tile_row) {
      return item.context + args.token_of(item.first + min(tile_row, last));
    };
    const auto lowest = [&](int32_t high) {
      return args.window > 0 ? max(0, high - args.window + 1) : 0;
    };
#pragma unroll
    for (int side = 0; side < 2; ++side) {
      high[side] = position(first + lane / 4 + 8 * side);
      low[side] = lowest(high[side]);
    }
    common_high = position(first);
    common_low = lowest(position(first + kBlock - 1));
  }

  // Where a row of a tile has its queries; rows past the tile's end repeat the last.
  __device__ static const uint16_t* query_row(const NativeAttentionArgs& args,
                                              const AttentionItem& item, int32_t head,
                                              int32_t tile_row) {
    const int32_t row = item.first + min(tile_row, item.rows - 1);
    const int32_t token = args.token_of(row);
    return args.qkv + (item.token + token) * args.q_stride +
           int64_t{head * args.group + row - token * args.group} * args.head_dim;
  }

  // Scores of what a row does not see become -infinity; score[t] are of 8 positions each.
  template <int kTiles>
  __device__ void mask(float (&score)[kTiles][4], int32_t position) const {
    if (position + 8 * kTiles - 1 <= common_high && position >= common_low) return;
#pragma unroll
    for (int t = 0; t < kTiles; ++t) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int32_t p = position + 8 * t + 2 * (lane_id() % 4) + (i & 1);
        if (p > high[i / 2] || p < low[i / 2]) score[t][i] = -INFINITY;
      }
    }
  }

  __device__ void rescale(const float (&factor)[2]) {
#pragma unroll
    for (int t = 0; t < D / 8; ++t) {
#pragma unroll
      for (int i = 0; i < 4; ++i) out[t][i] *= factor[i / 2];
    }
  }

  // Adds up what the four lanes of a row have summed on their own.
  __device__ void reduce_sums() {
#pragma unroll
    for (int side = 0; side < 2; ++side) {
      sum[side] += __shfl_xor_sync(kAllLanes, sum[side], 1);
      sum[side] += __shfl_xor_sync(kAllLanes, sum[side], 2);
    }
  }
};

// The largest of what the four lanes of a row hold.
__device__ __forceinline__ float row_maximum(float value) {
  value = fmaxf(value, __shfl_xor_sync(kAllLanes, value, 1));
  return fmaxf(value, __shfl_xor_sync(kAllLanes, value, 2));
}

// Over a cache of bfloat16. Lane l holds columns 2 * (l % 4) and the next of every 8.
template <int D>
struct BF16Rows : TileRows<D> {
  using L = CacheLayout<D, BF16Cache>;
  // Queries of a narrow tile stay in shared memory where there are no registers for them.
  static constexpr bool kQueryInRegisters = D <= 128;
  using TileRows<D>::out;
  using TileRows<D>::maximum;
  using TileRows<D>::sum;

  uint32_t query[D / 16][4];

  // Two neighbouring columns of the output, and the first of them.
  __device__ float2 pair(int t, int side) const {
    return make_float2(out[t][2 * side], out[t][2 * side + 1]);
  }
  __device__ static int column(int t, int lane) { return 8 * t + 2 * (lane % 4); }

  // Queries of a wide tile, from memory; rows past its end are zeros.
  __device__ void load_queries(const NativeAttentionArgs& args, const AttentionItem& item,
                               int32_t head, int32_t first) {
    const int lane = lane_id();
#pragma unroll
    for (int side = 0; side < 2; ++side) {
      const int32_t tile_row = first + lane / 4 + 8 * side;
      const uint16_t* source = this->query_row(args, item, head, tile_row);
#pragma unroll
      for (int k = 0; k < D / 16; ++k) {
#pragma unroll
        for (int part = 0; part < 2; ++part) {
          const int col = 16 * k + 8 * part + 2 * (lane % 4);
          query[k][2 * part + side] = tile_row < item.rows && col < args.head_dim
                                          ? *reinterpret_cast<const uint32_t*>(source + col)
                                          : 0u;
        }
      }
    }
  }

  // A fragment of the queries of a narrow tile in shared memory.
  __device__ static void query_fragment(uint32_t (&fragment)[4], uint32_t queries, int k,
                                        int lane) {
    ldmatrix_x4(fragment, queries + L::offset(lane & 15, 2 * k + (lane >> 4)));
  }
  __device__ void read_queries(uint32_t queries, const NativeAttentionArgs&) {
    if constexpr (kQueryInRegisters) {
      const int lane = lane_id();
#pragma unroll
      for (int k = 0; k < D / 16; ++k) query_fragment(query[k], queries, k, lane);
    }
  }

  // Takes in kBlocks blocks of positions from `position` on; block b's keys lie at
  // keys + b * kBlockBytes, its values kMatrixBytes after them.
  template <int kBlocks, bool kNarrow>
  __device__ void attend(uint32_t queries, uint32_t keys, int32_t position,
                         const ScoreScale& scale) {
    const int lane = lane_id();
    float score[2 * kBlocks][4];
#pragma unroll
    for (int t = 0; t < 2 * kBlocks; ++t) {
#pragma unroll
      for (int i = 0; i < 4; ++i) score[t][i] = 0.0f;
    }
    const int key_row = (lane & 7) + (lane >> 4 << 3);
    const int key_chunk = (lane >> 3) & 1;
#pragma unroll
    for (int k = 0; k < D / 16; ++k) {
      uint32_t own[4];
      if constexpr (kNarrow && !kQueryInRegisters) query_fragment(own, queries, k, lane);
      const uint32_t (&rows)[4] = kNarrow && !kQueryInRegisters ? own : query[k];
#pragma unroll
      for (int b = 0; b < kBlocks; ++b) {
        uint32_t fragment[4];
        ldmatrix_x4(fragment, keys + b * L::kBlockBytes + L::offset(key_row, 2 * k + key_chunk));
        mma_m16n8k16_bf16(score[2 * b], rows, fragment[0], fragment[1]);
        mma_m16n8k16_bf16(score[2 * b + 1], rows, fragment[2], fragment[3]);
      }
    }
#pragma unroll
    for (int t = 0; t < 2 * kBlocks; ++t) {
#pragma unroll
      for (int i = 0; i < 4; ++i) score[t][i] *= scale.factor;
    }
    if (scale.cap > 0.0f) {
#pragma unroll
      for (int t = 0; t < 2 * kBlocks; ++t) {
#pragma unroll
        for (int i = 0; i < 4; ++i) score[t][i] = capped(score[t][i], scale);
      }
    }
    this->mask(score, position);

    float factor[2];
    float base[2];
#pragma unroll
    for (int side = 0; side < 2; ++side) {
      float largest = maximum[side];
#pragma unroll
      for (int t = 0; t < 2 * kBlocks; ++t) {
        largest = fmaxf(largest, fmaxf(score[t][2 * side], score[t][2 * side + 1]));
      }
      largest = row_maximum(largest);
      base[side] = finite(largest);
      factor[side] = exp2_fast(maximum[side] - base[side]);
      maximum[side] = largest;
      sum[side] *= factor[side];
    }
#pragma unroll
    for (int t = 0; t < 2 * kBlocks; ++t) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        score[t][i] = exp2_fast(score[t][i] - base[i / 2]);
        sum[i / 2] += score[t][i];
      }
    }
    if (__any_sync(kAllLanes, factor[0] != 1.0f || factor[1] != 1.0f)) this->rescale(factor);

    const uint32_t values = keys + L::kMatrixBytes;
#pragma unroll
    for (int b = 0; b < kBlocks; ++b) {
      const uint32_t weights[4] = {pack(score[2 * b][0], score[2 * b][1]),
                                   pack(score[2 * b][2], score[2 * b][3]),
                                   pack(score[2 * b + 1][0], score[2 * b + 1][1]),
                                   pack(score[2 * b + 1][2], score[2 * b + 1][3])};
#pragma unroll
      for (int t = 0; t < D / 16; ++t) {
        uint32_t fragment[4];
        ldmatrix_x4_trans(fragment,
                          values + b * L::kBlockBytes + L::offset(lane & 15, 2 * t + (lane >> 4)));
        mma_m16n8k16_bf16(out[2 * t], weights, fragment[0], fragment[1]);
        mma_m16n8k16_bf16(out[2 * t + 1], weights, fragment[2], fragment[3]);
      }
    }
  }
};

}  // namespace native
}  // namespace mrv1::cuda
