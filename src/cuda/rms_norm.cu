// Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
//
// One block per row, two passes: the sum of squares, reduced over the block in a fixed order, then
// the scaled row. With a residual the first pass writes the rounded sum and the second reads it
// back. A column belongs to one thread in both passes, so in-place use needs no barrier.
#include "block.cuh"
#include "check.h"
#include "ops/rms_norm.h"

namespace mrv1 {
namespace {

constexpr std::string_view kOp = "rms_norm";
constexpr int kThreads = 256;

template <typename T>
__global__ void rms_norm_kernel(RmsNormParams params) {
  const int64_t start = int64_t{blockIdx.x} * params.cols;
  const T* x = static_cast<const T*>(params.x) + start;
  T* out = static_cast<T*>(params.out) + start;

  const T* source = x;
  float squares = 0.0f;
  if (params.residual != nullptr) {
    const T* residual = static_cast<const T*>(params.residual) + start;
    T* sum = static_cast<T*>(params.sum) + start;
    for (int64_t col = threadIdx.x; col < params.cols; col += kThreads) {
      const T rounded = from_float<T>(to_float(x[col]) + to_float(residual[col]));
      sum[col] = rounded;
      squares = fmaf(to_float(rounded), to_float(rounded), squares);
    }
    source = sum;
  } else {
    for (int64_t col = threadIdx.x; col < params.cols; col += kThreads) {
      const float value = to_float(x[col]);
      squares = fmaf(value, value, squares);
    }
  }

  const float mean = cuda::block_sum<kThreads>(squares) / static_cast<float>(params.cols);
  const float scale = 1.0f / sqrtf(mean + params.eps);
  for (int64_t col = threadIdx.x; col < params.cols; col += kThreads) {
    out[col] = from_float<T>(to_float(source[col]) * scale * params.weight[col]);
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
    using T = typename decltype(tag)::type;
    rms_norm_kernel<T><<<rows, kThreads, 0, cuda::stream_of(ctx)>>>(params);
  });
  cuda::check_launch(kOp);
}

}  // namespace mrv1
