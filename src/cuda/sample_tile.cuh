// Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
//
// What a warp does with a tile of kDrawTile logits that it holds in registers: the best of them,
// and the sum of their weights relative to it. Nothing depends on how a row is cut into blocks.
#pragma once

#include <cfloat>
#include <cstdint>

#include "block.cuh"
#include "sampling/processors.h"

namespace mrv1::cuda {

constexpr int32_t kTile = kDrawTile;
constexpr int32_t kMaxTiles = static_cast<int32_t>(kMaxSampledVocab / kTile);
// A lane holds quads of logits: neighbours if rows are aligned for vectors, else a warp apart.
constexpr int kTileQuads = kTile / kWarpSize / 4;
constexpr int kLaneLogits = 4 * kTileQuads;
// The logits that the lanes have of one quad: so many neighbours.
constexpr int32_t kPiece = 4 * kWarpSize;
constexpr int32_t kTilePieces = kTile / kPiece;

// The best logit of a tile or row as one number: its key above, the complement of its id below, so
// that the largest number is the largest logit with the lowest id. Where no id was asked for, the
// complement is 0, below that of any id.
using Best = unsigned long long;
constexpr Best kNoBest = 0;          // nothing above -inf
constexpr Best kNanBest = ~Best{0};  // a NaN anywhere
constexpr uint32_t kMinusInfOrdered = static_cast<uint32_t>(kMinusInfKey) ^ 0x80000000u;
// The least key of logits above -inf, and what is below the code of any of them.
constexpr uint32_t kLeastOrdered = kMinusInfOrdered + 1;
constexpr Best kLeastBest = Best{kLeastOrdered} << 32;

// Keys as unsigned numbers in the same order.
__device__ __forceinline__ uint32_t ordered_key(float logit) {
  return static_cast<uint32_t>(logit_key(logit)) ^ 0x80000000u;
}

__device__ __forceinline__ Best make_best(float logit, int32_t id) {
  return Best{ordered_key(logit)} << 32 | static_cast<uint32_t>(~id);
}

__device__ __forceinline__ int32_t best_id(Best best) {
  return static_cast<int32_t>(~static_cast<uint32_t>(best));
}

// The logit of an ordered key, but for the sign of a zero.
__device__ __forceinline__ float ordered_logit(uint32_t ordered) {
  return logit_of_key(static_cast<int32_t>(ordered ^ 0x80000000u));
}

__device__ __forceinline__ float best_logit(Best best) {
  return ordered_logit(static_cast<uint32_t>(best >> 32));
}

inline int32_t num_tiles(int64_t vocab_size) {
  return static_cast<int32_t>((vocab_size + kTile - 1) / kTile);
}

// Whether a mask of one bit an id, which is null if there is none, leaves an id alive.
__device__ __forceinline__ bool is_allowed(const uint32_t* mask, int32_t id) {
  return mask == nullptr || has_bit(mask, id);
}

// The larger, or NaN if either is one.
__device__ __forceinline__ float max_or_nan(float a, float b) {
  float result;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(result) : "f"(a), "f"(b));
  return result;
}

// Volatile, so that the compiler does not move a load that is asked for early to its first use.
__device__ __forceinline__ void load_early(const float* from, float& a, float& b, float& c,
                                           float& d) {
  asm volatile("ld.global.v4.f32 {%0, %1, %2, %3}, [%4];"
               : "=f"(a), "=f"(b), "=f"(c), "=f"(d)
               : "l"(from)
               : "memory");
}
__device__ __forceinline__ void load_early(const float* from, float& value) {
  asm volatile("ld.global.f32 %0, [%1];" : "=f"(value) : "l"(from) : "memory");
}

// A tile in the registers of a warp. Ids ascend from quad to quad, and what is past the end of the
// row is -inf.
template <bool kVector>
struct Tile {
  float logits[kLaneLogits];

  __device__ __forceinline__ static int32_t local_id(int quad, int i) {
    const int32_t lane = threadIdx.x % kWarpSize;
    return quad * 4 * kWarpSize + (kVector ? 4 * lane + i : i * kWarpSize + lane);
  }

  __device__ __forceinline__ void load(const float* row, int32_t tile, int32_t vocab) {
    const float* own = row + tile * kTile + local_id(0, 0);
    const int32_t left = vocab - tile * kTile;
    if (left >= kTile) {
      load_quads(own, kTile);
      return;
    }
#pragma unroll
    for (float& logit : logits) logit = -INFINITY;
    load_quads(own, left);
  }

  // Makes -inf of what the mask, of which a lane has the word that it is the number of, leaves out.
  __device__ __forceinline__ void mask(uint32_t lane_word) {
    const int32_t lane = threadIdx.x % kWarpSize;
#pragma unroll
    for (int quad = 0; quad < kTileQuads; ++quad) {
      uint32_t bits = 0;
      if constexpr (kVector) {
        bits = __shfl_sync(kFullWarp, lane_word, 4 * quad + lane / 8) >> (4 * lane % 32);
      }
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const uint32_t bit =
            kVector ? bits >> i : __shfl_sync(kFullWarp, lane_word, 4 * quad + i) >> lane;
        if ((bit & 1) == 0) logits[4 * quad + i] = -INFINITY;
      }
    }
  }

  // `own` is the lane's first logit; `left` ids of the tile are in the row.
  __device__ __forceinline__ void load_quads(const float* own, int32_t left) {
#pragma unroll
    for (int quad = 0; quad < kTileQuads; ++quad) {
      float* to = logits + 4 * quad;
      const float* from = own + quad * kPiece;
      if constexpr (kVector) {
        if (left == kTile || local_id(quad, 0) < left) {
          load_early(from, to[0], to[1], to[2], to[3]);
        }
      } else {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          if (left == kTile || local_id(quad, i) < left) load_early(from + i * kWarpSize, to[i]);
        }
      }
    }
  }

  // The quad of a number that is the same in all lanes.
  __device__ __forceinline__ void select(int32_t quad, float (&chosen)[4]) const {
    static_assert(kTileQuads == 8);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      float level[4];
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        level[k] = (quad & 1) != 0 ? logits[8 * k + 4 + i] : logits[8 * k + i];
      }
      const float low = (quad & 2) != 0 ? level[1] : level[0];
      const float high = (quad & 2) != 0 ? level[3] : level[2];
      chosen[i] = (quad & 4) != 0 ? high : low;
    }
  }

  __device__ __forceinline__ float quad_max(int quad) const {
    const float* own = logits + 4 * quad;
    return max_or_nan(max_or_nan(own[0], own[1]), max_or_nan(own[2], own[3]));
  }

  // The lane's largest logit, or NaN if there is one in any lane.
  __device__ __forceinline__ float lane_max() const {
    float largest = quad_max(0);
#pragma unroll
    for (int quad = 1; quad < kTileQuads; ++quad) largest = max_or_nan(largest, quad_max(quad));
    return __any_sync(kFullWarp, largest != largest) ? NAN : largest;
  }

  // The best of the tile, given lane_max(), without its id.
  __device__ __forceinline__ static Best best(float largest) {
    if (largest != largest) return kNanBest;
    const uint32_t top = __reduce_max_sync(kFullWarp, ordered_key(largest));
    return top == kMinusInfOrdered ? kNoBest : Best{top} << 32;
  }

  // Adds the id to a best that is neither kNoBest nor kNanBest.
  __device__ __forceinline__ Best with_id(Best best, int32_t tile) const {
    const float value = best_logit(best);
    int32_t quad = kTileQuads;
#pragma unroll
    for (int k = kTileQuads - 1; k >= 0; --k) {
      if (quad_max(k) == value) quad = k;
    }
    quad = __reduce_min_sync(kFullWarp, quad);
    float chosen[4];
    select(quad, chosen);
    int32_t at = kTile;
#pragma unroll
    for (int i = 3; i >= 0; --i) {
      if (chosen[i] == value) at = local_id(0, i);
    }
    at = __reduce_min_sync(kFullWarp, at);
    return best | static_cast<uint32_t>(~(tile * kTile + quad * kPiece + at));
  }

  // Stores the ordered key of the best of each piece; there is no NaN.
  __device__ __forceinline__ void store_pieces(uint32_t* pieces) const {
    const int32_t lane = threadIdx.x % kWarpSize;
    uint32_t own = 0;
#pragma unroll
    for (int quad = 0; quad < kTileQuads; ++quad) {
      const uint32_t key = __reduce_max_sync(kFullWarp, ordered_key(quad_max(quad)));
      if (lane == quad) own = key;
    }
    if (lane < kTilePieces) pieces[lane] = own;
  }

  // Sum of the weights relative to the tile's best. A float is cut to a multiple of 2^-43 exactly
  // by adding it to a double between 2^9 and 2^10, whose last bit is that, rounding to zero. There
  // is room for 512 additions of at most 1.
  __device__ __forceinline__ uint64_t weight(Best best, float scale) const {
    static_assert(kWeightBits == 52 - 9 && kLaneLogits < 512);
    constexpr uint64_t kFraction = (uint64_t{1} << 52) - 1;
    if (best == kNoBest) return 0;
    const float reference = best_logit(best);
    uint64_t sum = 0;
    if (reference == INFINITY) {
#pragma unroll
      for (int i = 0; i < kLaneLogits; ++i) sum += logits[i] == INFINITY ? kMaxWeight : 0;
    } else {
      double sums[2] = {512.0, 512.0};
#pragma unroll
      for (int i = 0; i < kLaneLogits; ++i) {
        // weight_exponent() without its care for infinite references.
        const float exponent = fmaf(logits[i] - reference, scale, -1.0f);
        sums[i % 2] = __dadd_rz(sums[i % 2], static_cast<double>(exp2_float(exponent)));
      }
      for (const double part : sums) {
        sum += static_cast<uint64_t>(__double_as_longlong(part)) & kFraction;
      }
    }
    return warp_sum(sum);
  }
};

// The word of the mask of a tile that a lane holds for Tile::mask(), from one mask or two.
__device__ __forceinline__ uint32_t mask_word(const uint32_t* first, const uint32_t* second,
                                              int32_t tile, int32_t vocab) {
  static_assert(kTile == 32 * kWarpSize);
  const int32_t at = tile * kWarpSize + static_cast<int32_t>(threadIdx.x) % kWarpSize;
  uint32_t word = ~0u;
  if (at * 32 >= vocab) return word;
  if (first != nullptr) word &= first[at];
  if (second != nullptr) word &= second[at];
  return word;
}

}  // namespace mrv1::cuda
