// Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
//
// What a warp does with 16 query rows and positions of an E4M3 cache. Codes become float16 in
// registers, which is exact, and meet queries and weights in float16 on tensor cores, with float32
// sums:
//
// - Queries are divided by a power of two a row, so that float16 holds them: of bfloat16's eight
//   bits none is lost down to 2^-28 of a row's largest. The row's factor and the key's scale
//   multiply the score.
// - A weight is the exponential times the value's scale, relative to the largest such product so
//   far, which becomes 2^15: scales of any size fit, and what float16 loses is below 2^-39 of the
//   largest. The sum of exponentials, which has no scales in it, keeps a maximum of its own.
//
// Order of elements: a lane's four codes of a row are neighbours, where the instruction wants two
// pairs of columns eight apart. For keys the queries are read in the order that makes up for it. A
// transposed load of values brings two columns of two positions, which one permutation of bytes
// sorts; even columns are then one tile of the output, odd ones another.
//
// Sums never leave float32: what FP8 tensor cores lose in long sums does not arise.
#pragma once

#include <cuda_fp16.h>

#include "attention_rows.cuh"

namespace mrv1::cuda {
namespace native {

// Four codes as pairs of float16: the first two, and the others. NaN stays NaN.
__device__ __forceinline__ void decode_e4m3(uint32_t codes, uint32_t& low, uint32_t& high) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 890
  asm("{\n\t"
      ".reg .b16 l, h;\n\t"
      "mov.b32 {l, h}, %2;\n\t"
      "cvt.rn.f16x2.e4m3x2 %0, l;\n\t"
      "cvt.rn.f16x2.e4m3x2 %1, h;\n\t"
      "}"
      : "=r"(low), "=r"(high)
      : "r"(codes));
#else
  // A float16 with the same bits in its higher places is the value times 2^-8.
  const auto decode = [](uint32_t spread) {
    const uint32_t magnitude = spread & 0x7f007f00u;
    const uint32_t raised = (spread & 0x80008000u) | magnitude >> 1;
    const __half2 value =
        __hmul2(*reinterpret_cast<const __half2*>(&raised), __float2half2_rn(256.0f));
    return *reinterpret_cast<const uint32_t*>(&value) | __vcmpeq2(magnitude, 0x7f007f00u);
  };
  low = decode(__byte_perm(codes, 0, 0x1404));
  high = decode(__byte_perm(codes, 0, 0x3424));
#endif
}

__device__ __forceinline__ uint32_t pack_half(float low, float high) {
  const __half2 pair = __floats2half2_rn(low, high);
  return *reinterpret_cast<const uint32_t*>(&pair);
}

__device__ __forceinline__ float log2_fast(float x) {
  float y;
  asm("lg2.approx.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// Lane l holds columns 4 * (l % 4) and the next three of every 16.
template <int D>
struct E4M3Rows : TileRows<D> {
  using L = CacheLayout<D, E4M3Cache>;
  static constexpr int kChunks = L::kChunks;  // of 16 codes, the depth of an instruction
  // The largest weight is 2 to this.
  static constexpr float kWeightBits = 15.0f;
  // Smaller scales of values count as this, in powers of two, where weights are compared: else the
  // scale of a token that is all zeros, 2^-126, would leave float32's range.
  static constexpr float kLeastLog = -100.0f;
  using TileRows<D>::out;
  using TileRows<D>::maximum;
  using TileRows<D>::sum;

  uint32_t query[kChunks][4];
  float row_factor[2];     // from the product of a row's queries and codes to its score
  float value_maximum[2];  // of score + log2(scale of the value)

  __device__ void clear() {
    TileRows<D>::clear();
    value_maximum[0] = value_maximum[1] = -INFINITY;
  }

  // Two neighbouring columns of the output, and the first of them.
  __device__ float2 pair(int t, int side) const {
    const int even = t & ~1;
    const int i = 2 * side + (t & 1);
    return make_float2(out[even][i], out[even + 1][i]);
  }
  __device__ static int column(int t, int lane) {
    return 16 * (t / 2) + 4 * (lane % 4) + 2 * (t & 1);
  }

  // Queries of a wide tile, from memory; rows past its end are zeros.
  __device__ void load_queries(const NativeAttentionArgs& args, const AttentionItem& item,
                               int32_t head, int32_t first) {
    const int lane = lane_id();
#pragma unroll
    for (int side = 0; side < 2; ++side) {
      const int32_t tile_row = first + lane / 4 + 8 * side;
      const uint16_t* source = this->query_row(args, item, head, tile_row);
#pragma unroll
      for (int k = 0; k < kChunks; ++k) {
        const int col = 16 * k + 4 * (lane % 4);
        uint2 four = make_uint2(0, 0);
        if (tile_row < item.rows && col < args.head_dim) {
          four = *reinterpret_cast<const uint2*>(source + col);
        }
        query[k][side] = four.x;
        query[k][2 + side] = four.y;
      }
    }
    to_half(args.scale.factor);
  }

  // Of a narrow tile, from shared memory.
  __device__ void read_queries(uint32_t queries, const NativeAttentionArgs& args) {
    const int lane = lane_id();
#pragma unroll
    for (int side = 0; side < 2; ++side) {
#pragma unroll
      for (int k = 0; k < kChunks; ++k) {
        const uint2 four = ld_shared_v2_u32(
            queries + QueryLayout<D>::offset(lane / 4 + 8 * side, 2 * k + (lane % 4) / 2) +
            lane % 2 * 8);
        query[k][side] = four.x;
        query[k][2 + side] = four.y;
      }
    }
    to_half(args.scale.factor);
  }

  // Takes in kBlocks blocks of positions from `position` on; block b's keys lie at
  // keys + b * kBlockBytes, its values kMatrixBytes after them, then the scales of both.
  template <int kBlocks, bool kNarrow>
  __device__ void attend(uint32_t /*queries*/, uint32_t keys, int32_t position,
                         const ScoreScale& scale) {
    const int lane = lane_id();
    float score[2 * kBlocks][4];
#pragma unroll
    for (int t = 0; t < 2 * kBlocks; ++t) {
#pragma unroll
      for (int i = 0; i < 4; ++i) score[t][i] = 0.0f;
    }
    const auto multiply_codes = [this](float (&c)[4], int k, uint32_t codes) {
      uint32_t low, high;
      decode_e4m3(codes, low, high);
      mma_m16n8k16_f16(c, query[k], low, high);
    };
    const int key_row = (lane & 7) + (lane >> 4 << 3);
    const int key_chunk = (lane >> 3) & 1;
#pragma unroll
    for (int k = 0; k < kChunks; k += 2) {
#pragma unroll
      for (int b = 0; b < kBlocks; ++b) {
        const uint32_t block = keys + b * L::kBlockBytes;
        if (k + 1 < kChunks) {
          uint32_t codes[4];
          ldmatrix_x4(codes, block + L::offset(key_row, k + key_chunk));
          multiply_codes(score[2 * b], k, codes[0]);
          multiply_codes(score[2 * b + 1], k, codes[2]);
          multiply_codes(score[2 * b], k + 1, codes[1]);
          multiply_codes(score[2 * b + 1], k + 1, codes[3]);
        } else {
          uint32_t codes[2];
          ldmatrix_x2(codes, block + L::offset(lane & 15, k));
          multiply_codes(score[2 * b], k, codes[0]);
          multiply_codes(score[2 * b + 1], k, codes[1]);
        }
      }
    }

    float2 value_scale[2 * kBlocks];
#pragma unroll
    for (int t = 0; t < 2 * kBlocks; ++t) {
      const uint32_t scales = keys + t / 2 * L::kBlockBytes + 2 * L::kMatrixBytes +
                              (8 * (t & 1) + 2 * (lane % 4)) * static_cast<int>(sizeof(float));
      const float2 key_scale = ld_shared_v2_f32(scales);
      value_scale[t] = ld_shared_v2_f32(scales + kScaleBytes / 2);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        score[t][i] = score[t][i] * row_factor[i / 2] * (i & 1 ? key_scale.y : key_scale.x);
      }
    }
    if (scale.cap > 0.0f) {
#pragma unroll
      for (int t = 0; t < 2 * kBlocks; ++t) {
#pragma unroll
        for (int i = 0; i < 4; ++i) score[t][i] = capped(score[t][i], scale);
      }
    }
    this->mask(score, position);

    float largest[2] = {maximum[0], maximum[1]};
    float largest_value[2] = {value_maximum[0], value_maximum[1]};
#pragma unroll
    for (int t = 0; t < 2 * kBlocks; ++t) {
      const float logs[2] = {fmaxf(log2_fast(value_scale[t].x), kLeastLog),
                             fmaxf(log2_fast(value_scale[t].y), kLeastLog)};
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        largest[i / 2] = fmaxf(largest[i / 2], score[t][i]);
        largest_value[i / 2] = fmaxf(largest_value[i / 2], score[t][i] + logs[i & 1]);
      }
    }
    float factor[2], base[2], raise[2];
#pragma unroll
    for (int side = 0; side < 2; ++side) {
      largest[side] = row_maximum(largest[side]);
      largest_value[side] = row_maximum(largest_value[side]);
      base[side] = finite(largest[side]);
      sum[side] *= exp2_fast(maximum[side] - base[side]);
      factor[side] = exp2_fast(value_maximum[side] - finite(largest_value[side]));
      maximum[side] = largest[side];
      value_maximum[side] = largest_value[side];
      raise[side] = exp2_fast(value_shift(side));
    }
#pragma unroll
    for (int t = 0; t < 2 * kBlocks; ++t) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float part = exp2_fast(score[t][i] - base[i / 2]);
        sum[i / 2] += part;
        score[t][i] = part * (i & 1 ? value_scale[t].y : value_scale[t].x) * raise[i / 2];
      }
    }
    if (__any_sync(kAllLanes, factor[0] != 1.0f || factor[1] != 1.0f)) this->rescale(factor);

    const auto add_values = [this](int t, const uint32_t (&weights)[4], uint32_t first,
                                   uint32_t second) {
      // Codes of (position, even column), (position, odd column), and the same of the next one.
      uint32_t even[2], odd[2];
      decode_e4m3(__byte_perm(first, 0, 0x3120), even[0], odd[0]);
      decode_e4m3(__byte_perm(second, 0, 0x3120), even[1], odd[1]);
      mma_m16n8k16_f16(out[t], weights, even[0], even[1]);
      mma_m16n8k16_f16(out[t + 1], weights, odd[0], odd[1]);
    };
#pragma unroll
    for (int b = 0; b < kBlocks; ++b) {
      const uint32_t values = keys + b * L::kBlockBytes + L::kMatrixBytes;
      const uint32_t weights[4] = {pack_half(score[2 * b][0], score[2 * b][1]),
                                   pack_half(score[2 * b][2], score[2 * b][3]),
                                   pack_half(score[2 * b + 1][0], score[2 * b + 1][1]),
                                   pack_half(score[2 * b + 1][2], score[2 * b + 1][3])};
#pragma unroll
      for (int k = 0; k < kChunks; k += 2) {
        if (k + 1 < kChunks) {
          uint32_t codes[4];
          ldmatrix_x4_trans(codes, values + L::offset(lane & 15, k + (lane >> 4)));
          add_values(2 * k, weights, codes[0], codes[1]);
          add_values(2 * k + 2, weights, codes[2], codes[3]);
        } else {
          uint32_t codes[2];
          ldmatrix_x2_trans(codes, values + L::offset(lane & 15, k));
          add_values(2 * k, weights, codes[0], codes[1]);
        }
      }
    }
  }

  // Also brings the output from the weights' maximum to that of the scores, as partial results are.
  __device__ void reduce_sums() {
    TileRows<D>::reduce_sums();
    const float factor[2] = {exp2_fast(-value_shift(0)), exp2_fast(-value_shift(1))};
    this->rescale(factor);
  }

 private:
  // Weights are exponentials times the values' scales times 2 to this.
  __device__ float value_shift(int side) const {
    return finite(maximum[side]) - finite(value_maximum[side]) + kWeightBits;
  }

  // Queries of bfloat16 to float16, a row's largest to [2^14, 2^15).
  __device__ void to_half(float score_factor) {
#pragma unroll
    for (int side = 0; side < 2; ++side) {
      uint32_t largest = 0;
#pragma unroll
      for (int k = 0; k < kChunks; ++k) {
        largest = __vmaxu2(largest, query[k][side] & 0x7fff7fffu);
        largest = __vmaxu2(largest, query[k][2 + side] & 0x7fff7fffu);
      }
      largest = __vmaxu2(largest, __shfl_xor_sync(kAllLanes, largest, 1));
      largest = __vmaxu2(largest, __shfl_xor_sync(kAllLanes, largest, 2));
      // Biased exponent of the largest; from 15 on its factors are normal numbers.
      const uint32_t exponent = max(max(largest >> 16, largest & 0xffffu) >> 7, 15u);
      const float factor = __uint_as_float((268u - exponent) << 23);
#pragma unroll
      for (int k = 0; k < kChunks; ++k) {
#pragma unroll
        for (int part = 0; part < 2; ++part) {
          uint32_t& word = query[k][2 * part + side];
          word = pack_half(__uint_as_float(word << 16) * factor,
                           __uint_as_float(word & 0xffff0000u) * factor);
        }
      }
      row_factor[side] = __uint_as_float((exponent - 14u) << 23) * score_factor;
    }
  }
};

}  // namespace native
}  // namespace mrv1::cuda
