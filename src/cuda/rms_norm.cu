// Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
//
// One block per row, which stays in registers between the sum of squares and the scaling. Threads
// depend on the number of columns alone and sums run in a fixed order, so that a row's result does
// not depend on the batch. A thread reads its columns before it writes them, which makes in-place
// use safe. Rows that are no multiple of 16 bytes, or too long for registers, take two passes.
#include <algorithm>

#include "block.cuh"
#include "launch.h"
#include "ops/rms_norm.h"
#include "vector.cuh"

namespace mrv1 {
namespace {

constexpr std::string_view kOp = "rms_norm";
constexpr int kMaxThreads = 1024;
constexpr int kScalarThreads = 256;

// Row `blockIdx.x` with kVectors vectors a thread.
template <typename T, int kVectors>
__global__ void __launch_bounds__(kMaxThreads) rms_norm_kernel(RmsNormParams params) {
  constexpr int kSize = cuda::kVectorSize<T>;
  const int num_vectors = static_cast<int>(params.cols / kSize);
  cuda::launch_next();

  float weight[kVectors][kSize];
#pragma unroll
  for (int i = 0; i < kVectors; ++i) {
    const int vector = threadIdx.x + i * blockDim.x;
    if (vector < num_vectors) cuda::load_values(params.weight + vector * kSize, weight[i]);
  }
  cuda::wait_for_previous();

  const int64_t start = int64_t{blockIdx.x} * params.cols;
  const T* x = static_cast<const T*>(params.x) + start;
  float values[kVectors][kSize];
  float squares = 0.0f;
#pragma unroll
  for (int i = 0; i < kVectors; ++i) {
    const int vector = threadIdx.x + i * blockDim.x;
    if (vector >= num_vectors) continue;
    cuda::unpack(cuda::load_vector(x, vector), values[i]);
    if (params.residual != nullptr) {
      float residual[kSize];
      cuda::unpack(cuda::load_vector(static_cast<const T*>(params.residual) + start, vector),
                   residual);
#pragma unroll
      for (int j = 0; j < kSize; ++j) values[i][j] += residual[j];
      const uint4 sum = cuda::pack(values[i]);
      cuda::store_vector(static_cast<T*>(params.sum) + start, vector, sum);
      cuda::unpack(sum, values[i]);
    }
#pragma unroll
    for (int j = 0; j < kSize; ++j) squares = fmaf(values[i][j], values[i][j], squares);
  }

  const float mean = cuda::whole_block_sum(squares) / static_cast<float>(params.cols);
  const float scale = 1.0f / sqrtf(mean + params.eps);
  T* out = static_cast<T*>(params.out) + start;
#pragma unroll
  for (int i = 0; i < kVectors; ++i) {
    const int vector = threadIdx.x + i * blockDim.x;
    if (vector >= num_vectors) continue;
#pragma unroll
    for (int j = 0; j < kSize; ++j) values[i][j] = values[i][j] * scale * weight[i][j];
    cuda::store_vector(out, vector, cuda::pack(values[i]));
  }
}

// Any number of columns: the first pass sums, the second reads the row again.
template <typename T>
__global__ void __launch_bounds__(kScalarThreads) rms_norm_scalar_kernel(RmsNormParams params) {
  cuda::launch_next();
  cuda::wait_for_previous();
  const int64_t start = int64_t{blockIdx.x} * params.cols;
  const T* x = static_cast<const T*>(params.x) + start;
  T* out = static_cast<T*>(params.out) + start;
  const T* source = x;
  float squares = 0.0f;
  if (params.residual != nullptr) {
    const T* residual = static_cast<const T*>(params.residual) + start;
    T* sum = static_cast<T*>(params.sum) + start;
    for (int64_t col = threadIdx.x; col < params.cols; col += kScalarThreads) {
      const T rounded = from_float<T>(to_float(x[col]) + to_float(residual[col]));
      sum[col] = rounded;
      squares = fmaf(to_float(rounded), to_float(rounded), squares);
    }
    source = sum;
  } else {
    for (int64_t col = threadIdx.x; col < params.cols; col += kScalarThreads) {
      const float value = to_float(x[col]);
      squares = fmaf(value, value, squares);
    }
  }
  const float mean = cuda::whole_block_sum(squares) / static_cast<float>(params.cols);
  const float scale = 1.0f / sqrtf(mean + params.eps);
  for (int64_t col = threadIdx.x; col < params.cols; col += kScalarThreads) {
    out[col] = from_float<T>(to_float(source[col]) * scale * params.weight[col]);
  }
}

bool all_aligned(const RmsNormParams& params) {
  const void* addresses[] = {params.x, params.residual, params.weight, params.out, params.sum};
  return std::all_of(std::begin(addresses), std::end(addresses),
                     [](const void* address) { return cuda::is_vector_aligned(address); });
}

template <typename T>
void launch_rms_norm(const RmsNormParams& params, int32_t rows, const StepContext& ctx) {
  constexpr int kSize = cuda::kVectorSize<T>;
  const int64_t vectors = params.cols / kSize;
  if (params.cols % kSize != 0 || vectors > 2 * kMaxThreads || !all_aligned(params)) {
    cuda::launch(kOp, ctx, rms_norm_scalar_kernel<T>, rows, kScalarThreads, 0, params);
    return;
  }
  const auto run = [&](auto* kernel, int per_thread) {
    const int64_t threads = (vectors + per_thread - 1) / per_thread;
    const auto warps = static_cast<unsigned>((threads + cuda::kWarpSize - 1) / cuda::kWarpSize);
    cuda::launch(kOp, ctx, kernel, rows, warps * cuda::kWarpSize, 0, params);
  };
  if (vectors <= kMaxThreads) {
    run(rms_norm_kernel<T, 1>, 1);
  } else {
    run(rms_norm_kernel<T, 2>, 2);
  }
}

}  // namespace

void rms_norm_cuda(const RmsNormParams& params, const StepContext& ctx) {
  check(params.cols > 0, kOp, "cols is ", params.cols, "; it must be positive");
  check(params.residual == nullptr || params.sum != nullptr, kOp,
        "a residual needs a place for the sum");
  const int32_t rows = params.logits_rows ? ctx.sizes.num_logits : ctx.sizes.num_tokens;
  if (rows == 0) return;
  dispatch_activation(params.dtype, kOp, [&](auto tag) {
    launch_rms_norm<typename decltype(tag)::type>(params, rows, ctx);
  });
}

}  // namespace mrv1
