// Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
//
// The textbook tiled product of linear_tiled.cu for the groups of moe_experts: a block of 16 x 16
// threads computes a tile of 64 rows of a group by 64 columns of the output, each thread 4 x 4
// elements of it. Each output is one chain of fused multiply-adds over the columns in ascending
// order, so a row's result does not depend on the batch.
#include <algorithm>
#include <type_traits>

#include "activation.cuh"
#include "fp4.cuh"
#include "launch.h"
#include "moe_schedule.h"

namespace mrv1::cuda {
namespace {

constexpr int kSide = 16;      // threads along each side of the block
constexpr int kPerThread = 4;  // outputs of a thread along each side
constexpr int kTile = kSide * kPerThread;
constexpr int kDepth = 16;  // columns staged at a time
constexpr int kThreads = kSide * kSide;
constexpr int64_t kMaxGridY = 65535;
static_assert(kTile == kMoeTiledRows);

// Rows of an expert's weight, of T or in NVFP4.
template <typename T, bool kFp4>
struct ExpertRows {
  WeightView weight;

  __device__ ExpertRows(const WeightView& all, int64_t expert) : weight(all) {
    if constexpr (kFp4) {
      weight = fp4_matrix(all, expert);
    } else {
      weight.data = static_cast<const T*>(all.data) + expert * (all.rows / all.matrices) * all.cols;
    }
  }
  __device__ float at(int64_t row, int64_t col) const {
    if constexpr (kFp4) {
      return fp4_element(weight, row, col);
    } else {
      return to_float(static_cast<const T*>(weight.data)[row * weight.cols + col]);
    }
  }
  __device__ float scaled(float sum, int64_t row) const {
    return kFp4 ? __fmul_rn(sum, weight.row_scales[row]) : sum;
  }
};

template <typename T, bool kGated, bool kFp4>
__global__ void __launch_bounds__(kThreads) moe_tiled_kernel(MoeProduct product) {
  launch_next();
  wait_for_previous();
  constexpr int kParts = kGated ? 2 : 1;
  __shared__ float x_tile[kDepth][kTile + 1];
  __shared__ float weight_tile[kParts][kDepth][kTile + 1];
  __shared__ int32_t source[kTile];

  const T* x = static_cast<const T*>(product.x);
  T* out = static_cast<T*>(product.out);
  const int64_t cols = product.weight.cols;
  const int64_t out_cols = product.out_cols();
  const int64_t first_out = int64_t{blockIdx.x} * kTile;
  const int thread_row = threadIdx.x / kSide;
  const int thread_col = threadIdx.x % kSide;
  const int32_t num_groups = *product.schedule.num_groups;
  for (int32_t g = blockIdx.y; g < num_groups; g += gridDim.y) {
    const MoeGroup group = product.schedule.groups[g];
    const ExpertRows<T, kFp4> weight(product.weight, group.expert);
    __syncthreads();
    if (threadIdx.x < kTile) {
      const int32_t place = group.first_place + min(static_cast<int>(threadIdx.x), group.count - 1);
      source[threadIdx.x] = product.sorted ? place : product.schedule.row[place];
    }
    __syncthreads();
    float sums[kParts][kPerThread][kPerThread] = {};
    for (int64_t first_col = 0; first_col < cols; first_col += kDepth) {
      for (int i = threadIdx.x; i < kTile * kDepth; i += kThreads) {
        const int row = i / kDepth;
        const int64_t col = first_col + i % kDepth;
        const bool in_cols = col < cols;
        x_tile[i % kDepth][row] =
            in_cols && row < group.count ? to_float(x[int64_t{source[row]} * cols + col]) : 0.0f;
        for (int part = 0; part < kParts; ++part) {
          const int64_t out_col = first_out + row;
          weight_tile[part][i % kDepth][row] =
              in_cols && out_col < out_cols ? weight.at(part * out_cols + out_col, col) : 0.0f;
        }
      }
      __syncthreads();
      for (int k = 0; k < kDepth; ++k) {
        for (int part = 0; part < kParts; ++part) {
          for (int i = 0; i < kPerThread; ++i) {
            for (int j = 0; j < kPerThread; ++j) {
              sums[part][i][j] =
                  fmaf(x_tile[k][thread_row + i * kSide],
                       weight_tile[part][k][thread_col + j * kSide], sums[part][i][j]);
            }
          }
        }
      }
      __syncthreads();
    }

    for (int i = 0; i < kPerThread; ++i) {
      const int row = thread_row + i * kSide;
      for (int j = 0; j < kPerThread; ++j) {
        const int64_t col = first_out + thread_col + j * kSide;
        if (row >= group.count || col >= out_cols) continue;
        float value = weight.scaled(sums[0][i][j], col);
        if constexpr (kGated) {
          const float gate = to_float(from_float<T>(value));
          const float up =
              to_float(from_float<T>(weight.scaled(sums[kParts - 1][i][j], out_cols + col)));
          value = gated_mul(product.activation, gate, up);
        }
        out[int64_t{group.first_place + row} * out_cols + col] = from_float<T>(value);
      }
    }
  }
}

}  // namespace

void moe_tiled(const MoeProduct& product, const StepContext& ctx) {
  const dim3 grid(static_cast<unsigned>((product.out_cols() + kTile - 1) / kTile),
                  static_cast<unsigned>(std::min(product.max_groups, kMaxGridY)));
  dispatch_activation(product.dtype, kMoeOp, [&](auto tag) {
    using T = typename decltype(tag)::type;
    const auto run = [&](auto* kernel) { launch(kMoeOp, ctx, kernel, grid, kThreads, 0, product); };
    if (product.weight.dtype == DType::kE2M1) {
      run(product.gated() ? moe_tiled_kernel<T, true, true> : moe_tiled_kernel<T, false, true>);
    } else {
      run(product.gated() ? moe_tiled_kernel<T, true, false> : moe_tiled_kernel<T, false, false>);
    }
  });
}

}  // namespace mrv1::cuda
