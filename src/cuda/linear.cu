// Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
//
// linear by whichever is fastest for the shape: kernels of our own for few rows (linear_skinny.h),
// cuBLASLt for many, the tiled kernel where neither can; NVFP4 weights have kernels of their own
// (linear_fp4.h). What cuBLASLt leaves undone, a bias on
// bfloat16 outputs and activations, a kernel here does to its result, piece by piece.
#include <algorithm>
#include <type_traits>

#include "activation.cuh"
#include "core/device.h"
#include "launch.h"
#include "linear_context.h"
#include "linear_fp4.h"
#include "linear_tiled.h"
#include "vector.cuh"

namespace mrv1 {
namespace cuda {
namespace {

constexpr std::string_view kOp = "linear";
constexpr int kThreads = 256;
constexpr int kWide = 8;  // elements of a thread where rows divide into 16-byte vectors

template <typename T, int kCount>
__device__ __forceinline__ void load(const T* from, float (&values)[kCount]) {
  if constexpr (kCount == 1) {
    values[0] = to_float(*from);
  } else {
    load_values(from, values);
  }
}

// out = product (+ bias), or activation(gate) * up of its two halves. blockIdx.y is the row.
template <typename In, typename Out, bool kGated, int kCount>
__global__ void __launch_bounds__(kThreads)
    finish_kernel(const In* product, const float* bias, Out* out, int32_t out_cols,
                  Activation activation) {
  launch_next();
  wait_for_previous();
  const int32_t col = (blockIdx.x * kThreads + threadIdx.x) * kCount;
  if (col >= out_cols) return;
  constexpr int kParts = kGated ? 2 : 1;
  float values[kParts][kCount];
#pragma unroll
  for (int part = 0; part < kParts; ++part) {
    load(product + (int64_t{blockIdx.y} * kParts + part) * out_cols + col, values[part]);
    if (bias != nullptr) {
#pragma unroll
      for (int i = 0; i < kCount; ++i) values[part][i] += bias[part * out_cols + col + i];
    }
  }
  float result[kCount];
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    result[i] = values[0][i];
    if constexpr (kGated) {
      const float gate = to_float(from_float<Out>(values[0][i]));
      const float up = to_float(from_float<Out>(values[kParts - 1][i]));
      result[i] = gated_mul(activation, gate, up);
    }
  }
  out += int64_t{blockIdx.y} * out_cols + col;
  if constexpr (kCount == 1) {
    *out = from_float<Out>(result[0]);
  } else {
    store_values(out, result);
  }
}

template <typename In, typename Out, bool kGated>
void finish(const LinearParams& params, const void* product, const float* bias, void* out,
            int64_t rows, const StepContext& ctx) {
  const int64_t out_cols = params.out_cols();
  const bool wide = out_cols % kWide == 0 && is_vector_aligned(out) && is_vector_aligned(product);
  const int64_t threads = wide ? out_cols / kWide : out_cols;
  const dim3 grid(static_cast<unsigned>((threads + kThreads - 1) / kThreads),
                  static_cast<unsigned>(rows));
  launch(kOp, ctx, wide ? finish_kernel<In, Out, kGated, kWide> : finish_kernel<In, Out, kGated, 1>,
         grid, kThreads, 0, static_cast<const In*>(product), bias, static_cast<Out*>(out),
         static_cast<int32_t>(out_cols), params.activation);
}

void finish_piece(const LinearParams& params, const CublasLtSteps& steps, const void* product,
                  int64_t first_row, int64_t rows, const StepContext& ctx) {
  void* out = static_cast<char*>(params.out) +
              first_row * params.out_cols() * static_cast<int64_t>(dtype_size(params.out_dtype));
  dispatch_activation(steps.product_dtype, kOp, [&](auto in_tag) {
    dispatch_activation(params.out_dtype, kOp, [&](auto out_tag) {
      using In = typename decltype(in_tag)::type;
      using Out = typename decltype(out_tag)::type;
      // A product is never rounded further than the output.
      if constexpr (std::is_same_v<In, float> || std::is_same_v<In, Out>) {
        if (params.gated()) {
          finish<In, Out, true>(params, product, steps.later_bias, out, rows, ctx);
        } else {
          finish<In, Out, false>(params, product, steps.later_bias, out, rows, ctx);
        }
      }
    });
  });
}

void run_cublaslt(const LinearParams& params, int64_t rows, const LinearPlan& plan,
                  const LinearContext& context, const StepContext& ctx) {
  const CublasLtSteps steps = cublaslt_steps(params, rows, ctx);
  if (!steps.to_workspace) {
    context.multiply(params, plan, steps, 0, rows, params.out, ctx);
    return;
  }
  check_internal(steps.piece_rows > 0, kOp, "workspace has ", ctx.workspace_bytes,
                 " bytes, which hold no row of ", params.weight.rows);
  void* product = static_cast<char*>(ctx.workspace) + kCublasLtWorkspace;
  for (int64_t row = 0; row < rows; row += steps.piece_rows) {
    const int64_t count = std::min(steps.piece_rows, rows - row);
    context.multiply(params, plan, steps, row, count, product, ctx);
    finish_piece(params, steps, product, row, count, ctx);
  }
}

// out = sum of the parts (+ bias). A thread has one column; blockIdx.y is the row.
template <typename Out>
__global__ void __launch_bounds__(kThreads)
    sum_parts_kernel(const float* parts, int num_parts, int64_t part_size, const float* bias,
                     Out* out, int32_t out_cols) {
  launch_next();
  wait_for_previous();
  const int32_t col = blockIdx.x * kThreads + threadIdx.x;
  if (col >= out_cols) return;
  const int64_t at = int64_t{blockIdx.y} * out_cols + col;
  float values[kInvariantParts];
#pragma unroll
  for (int part = 0; part < kInvariantParts; ++part) {
    if (part < num_parts) values[part] = parts[part * part_size + at];
  }
  // sum_in_order() with constant indices, so that the values stay in registers.
#pragma unroll
  for (int step = 1; step < kInvariantParts; step *= 2) {
#pragma unroll
    for (int i = 0; i + step < kInvariantParts; i += 2 * step) {
      if (i + step < num_parts) values[i] += values[i + step];
    }
  }
  if (bias != nullptr) values[0] += bias[col];
  out[at] = from_float<Out>(values[0]);
}

// A row-parallel linear of a batch-invariant step: each part of the columns by itself, into the
// workspace, then their sum. Which kernel computes a part depends on the part's sizes alone, and is
// the one that a rank with a single part has.
void run_parts(const LinearParams& params, int num_parts, int64_t rows, const StepContext& ctx) {
  const int64_t cols = params.weight.cols, part_cols = cols / num_parts;
  const int64_t out_cols = params.weight.rows;
  constexpr int64_t kMaxGridY = 65535;
  const int64_t room = std::min(static_cast<int64_t>(ctx.workspace_bytes) /
                                    (num_parts * out_cols * static_cast<int64_t>(sizeof(float))),
                                kMaxGridY);
  check_internal(room > 0, kOp, "workspace has ", ctx.workspace_bytes, " bytes, which hold no row ",
                 "of ", num_parts, " parts of ", out_cols);
  const auto size = static_cast<int64_t>(dtype_size(params.dtype));
  for (int64_t row = 0; row < rows; row += room) {
    const int64_t count = std::min(room, rows - row);
    for (int part = 0; part < num_parts; ++part) {
      LinearParams each = params;
      each.x = static_cast<const char*>(params.x) + (row * cols + part * part_cols) * size;
      each.bias = nullptr;
      each.out = static_cast<float*>(ctx.workspace) + part * count * out_cols;
      each.out_dtype = DType::kF32;
      if (params.weight.dtype == DType::kE2M1) {
        linear_fp4_columns(each, part * part_cols, part_cols, count, cols, ctx);
        continue;
      }
      each.weight.data = static_cast<const char*>(params.weight.data) + part * part_cols * size;
      each.weight.cols = part_cols;
      if (skinny_supports(each, count)) {
        linear_skinny(each, skinny_invariant(out_cols, part_cols, out_cols, count), count, cols,
                      ctx);
      } else {
        linear_tiled(each, count, cols, ctx);
      }
    }
    const dim3 grid(static_cast<unsigned>((out_cols + kThreads - 1) / kThreads),
                    static_cast<unsigned>(count));
    void* out = static_cast<char*>(params.out) +
                row * out_cols * static_cast<int64_t>(dtype_size(params.out_dtype));
    dispatch_activation(params.out_dtype, kOp, [&](auto tag) {
      using Out = typename decltype(tag)::type;
      launch(kOp, ctx, sum_parts_kernel<Out>, grid, kThreads, 0,
             static_cast<const float*>(ctx.workspace), num_parts, count * out_cols, params.bias,
             static_cast<Out*>(out), static_cast<int32_t>(out_cols));
    });
  }
}

}  // namespace

void run_linear(const LinearParams& params, int64_t rows, const LinearPlan& plan,
                const LinearContext& context, const StepContext& ctx) {
  switch (plan.kind) {
    case LinearKind::kTiled:
      return linear_tiled(params, rows, params.weight.cols, ctx);
    case LinearKind::kSkinny:
      return linear_skinny(params, plan.skinny, rows, params.weight.cols, ctx);
    case LinearKind::kCublasLt:
      return run_cublaslt(params, rows, plan, context, ctx);
  }
}

}  // namespace cuda

void linear_cuda(const LinearParams& params, const StepContext& ctx) {
  constexpr std::string_view kOp = cuda::kOp;
  const WeightView& weight = params.weight;
  check(weight.rows > 0 && weight.cols > 0 && weight.rows <= INT32_MAX && weight.cols <= INT32_MAX,
        kOp, "weight is [", weight.rows, ", ", weight.cols, "]; sizes must be in [1, ", INT32_MAX,
        "]");
  const bool fp4 = weight.dtype == DType::kE2M1;
  check(weight.layout == (fp4 ? WeightLayout::kTile16 : WeightLayout::kRowMajor), kOp,
        "weight must be ", fp4 ? "in tiles in NVFP4" : "row-major", " on CUDA");
  check(fp4 || weight.dtype == params.dtype, kOp, "weight is ", dtype_name(weight.dtype),
        " and x is ", dtype_name(params.dtype), "; they must be equal");
  check(params.out_dtype == params.dtype || params.out_dtype == DType::kF32, kOp, "out is ",
        dtype_name(params.out_dtype), "; it must be ", dtype_name(params.dtype), " or float32");
  check(!params.gated() || params.out_dtype == params.dtype, kOp, "out is ",
        dtype_name(params.out_dtype), "; it must be ", dtype_name(params.dtype),
        " with an activation");
  check(!params.gated() || weight.rows % (2 * kPanelRows) == 0, kOp, "an activation with ",
        weight.rows, " weight rows; half of them must be a multiple of ", kPanelRows);
  const int64_t rows = params.logits_rows ? ctx.sizes.num_logits : ctx.sizes.num_tokens;
  if (rows == 0) return;
  cuda::LinearContext* context = ctx.device != nullptr ? ctx.device->linear_context() : nullptr;
  check_internal(context != nullptr, kOp, "the step's device has no linear context");
  const int parts = num_invariant_parts(params, ctx);
  if (parts > 1) return cuda::run_parts(params, parts, rows, ctx);
  if (fp4) return cuda::linear_fp4(params, rows, *context, ctx);
  cuda::run_linear(params, rows, context->plan(params, rows, ctx), *context, ctx);
}

}  // namespace mrv1
