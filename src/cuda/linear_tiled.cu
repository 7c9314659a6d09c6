// Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
//
// The textbook tiled product: a block of 16 x 16 threads computes a 64 x 64 tile of the output,
// each thread 4 x 4 elements of it, from 64 x 16 tiles of both operands staged in shared memory as
// float. Each output is one chain of fused multiply-adds over the columns in ascending order,
// whatever the number of rows, so a row's result does not depend on the batch. With an activation
// the block runs two such products, gate and up, and combines them in float.
#include <type_traits>

#include "activation.cuh"
#include "launch.h"
#include "linear_tiled.h"

namespace mrv1::cuda {
namespace {

constexpr std::string_view kOp = "linear";
constexpr int kSide = 16;      // threads along each side of the block
constexpr int kPerThread = 4;  // outputs of a thread along each side
constexpr int kTile = kSide * kPerThread;
constexpr int kDepth = 16;  // columns staged at a time
constexpr int kThreads = kSide * kSide;
constexpr int64_t kMaxGridY = 65535;

// Stages src[first_row + r, first_col + c] as tile[c][r]; zeros outside [rows, cols].
template <typename T>
__device__ void load_tile(float (&tile)[kDepth][kTile + 1], const T* src, int64_t rows,
                          int64_t cols, int64_t stride, int64_t first_row, int64_t first_col) {
  for (int i = threadIdx.x; i < kTile * kDepth; i += kThreads) {
    const int64_t row = first_row + i / kDepth;
    const int64_t col = first_col + i % kDepth;
    tile[i % kDepth][i / kDepth] =
        row < rows && col < cols ? to_float(src[row * stride + col]) : 0.0f;
  }
}

template <typename T, typename Out, bool kGated>
__global__ void __launch_bounds__(kThreads)
    linear_tiled_kernel(LinearParams params, int64_t rows, int64_t stride) {
  wait_for_previous();
  launch_next();
  constexpr int kParts = kGated ? 2 : 1;
  __shared__ float x_tile[kDepth][kTile + 1];
  __shared__ float weight_tile[kParts][kDepth][kTile + 1];

  const T* x = static_cast<const T*>(params.x);
  const T* weight = static_cast<const T*>(params.weight.data);
  Out* out = static_cast<Out*>(params.out);
  const int64_t cols = params.weight.cols;
  const int64_t out_cols = params.weight.rows / kParts;
  const int64_t first_row = int64_t{blockIdx.y} * kTile;
  const int64_t first_out = int64_t{blockIdx.x} * kTile;
  const int thread_row = threadIdx.x / kSide;
  const int thread_col = threadIdx.x % kSide;

  float sums[kParts][kPerThread][kPerThread] = {};
  for (int64_t first_col = 0; first_col < cols; first_col += kDepth) {
    load_tile(x_tile, x, rows, cols, stride, first_row, first_col);
    for (int part = 0; part < kParts; ++part) {
      load_tile(weight_tile[part], weight + part * out_cols * stride, out_cols, cols, stride,
                first_out, first_col);
    }
    __syncthreads();
    for (int k = 0; k < kDepth; ++k) {
      for (int part = 0; part < kParts; ++part) {
        for (int i = 0; i < kPerThread; ++i) {
          for (int j = 0; j < kPerThread; ++j) {
            sums[part][i][j] = fmaf(x_tile[k][thread_row + i * kSide],
                                    weight_tile[part][k][thread_col + j * kSide], sums[part][i][j]);
          }
        }
      }
    }
    __syncthreads();
  }

  for (int i = 0; i < kPerThread; ++i) {
    const int64_t row = first_row + thread_row + i * kSide;
    for (int j = 0; j < kPerThread; ++j) {
      const int64_t col = first_out + thread_col + j * kSide;
      if (row >= rows || col >= out_cols) continue;
      float value = sums[0][i][j];
      if (params.bias != nullptr) value += params.bias[col];
      if constexpr (kGated) {
        float up = sums[1][i][j];
        if (params.bias != nullptr) up += params.bias[out_cols + col];
        value = to_float(from_float<T>(value));
        up = to_float(from_float<T>(up));
        value = gated_mul(params.activation, value, up);
      }
      out[row * out_cols + col] = from_float<Out>(value);
    }
  }
}

template <typename T, typename Out>
void run(const LinearParams& params, int64_t rows, int64_t stride, const StepContext& ctx) {
  const int64_t out_cols = params.out_cols();
  const dim3 grid(static_cast<unsigned>((out_cols + kTile - 1) / kTile),
                  static_cast<unsigned>((rows + kTile - 1) / kTile));
  if constexpr (std::is_same_v<T, Out>) {
    if (params.gated()) {
      launch(kOp, ctx, linear_tiled_kernel<T, Out, true>, grid, kThreads, 0, params, rows, stride);
      return;
    }
  }
  launch(kOp, ctx, linear_tiled_kernel<T, Out, false>, grid, kThreads, 0, params, rows, stride);
}

}  // namespace

void linear_tiled(const LinearParams& params, int64_t rows, int64_t stride,
                  const StepContext& ctx) {
  check(rows <= kMaxGridY * kTile, kOp, rows, " rows; at most ", kMaxGridY * kTile,
        " are possible");
  dispatch_activation(params.dtype, kOp, [&](auto tag) {
    using T = typename decltype(tag)::type;
    if (params.out_dtype == params.dtype) {
      run<T, T>(params, rows, stride, ctx);
    } else {
      run<T, float>(params, rows, stride, ctx);
    }
  });
}

}  // namespace mrv1::cuda
