// Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
//
// The ops that have no reduction: the residual add, the gated activation, the choice of the rows
// that get logits and what caps them. A block takes kThreads pieces of one row, a thread one piece:
// 16 bytes, or one element where rows are no multiple of that. Arithmetic is in float, and each
// thread reads its operands before it writes, so outputs may alias inputs of the same shape.
#include "activation.cuh"
#include "launch.h"
#include "ops/elementwise.h"
#include "vector.cuh"

namespace mrv1 {
namespace {

constexpr int kThreads = 128;

// Index of the thread's piece in its row.
__device__ int64_t piece_index() { return int64_t{blockIdx.y} * kThreads + threadIdx.x; }

// Elements of a piece: a vector of T, or 1.
template <typename T, bool kVector>
constexpr int kPieceSize = kVector ? cuda::kVectorSize<T> : 1;

template <typename T, int kSize>
__device__ void load_piece(const T* from, float (&values)[kSize]) {
  if constexpr (kSize == 1) {
    values[0] = to_float(*from);
  } else {
    cuda::load_values(from, values);
  }
}

template <typename T, int kSize>
__device__ void store_piece(T* to, const float (&values)[kSize]) {
  if constexpr (kSize == 1) {
    *to = from_float<T>(values[0]);
  } else {
    cuda::store_values(to, values);
  }
}

template <typename T, bool kVector>
__global__ void __launch_bounds__(kThreads) add_kernel(AddParams params) {
  constexpr int kSize = kPieceSize<T, kVector>;
  cuda::launch_next();
  cuda::wait_for_previous();
  const int64_t col = piece_index() * kSize;
  if (col >= params.cols) return;
  const int64_t at = int64_t{blockIdx.x} * params.cols + col;
  float a[kSize];
  float b[kSize];
  load_piece(static_cast<const T*>(params.a) + at, a);
  load_piece(static_cast<const T*>(params.b) + at, b);
#pragma unroll
  for (int i = 0; i < kSize; ++i) a[i] += b[i];
  store_piece(static_cast<T*>(params.out) + at, a);
}

template <typename T, bool kVector>
__global__ void __launch_bounds__(kThreads) gated_mul_kernel(GatedMulParams params) {
  constexpr int kSize = kPieceSize<T, kVector>;
  cuda::launch_next();
  cuda::wait_for_previous();
  const int64_t col = piece_index() * kSize;
  if (col >= params.cols) return;
  const T* x = static_cast<const T*>(params.x) + int64_t{blockIdx.x} * 2 * params.cols + col;
  float gate[kSize];
  float up[kSize];
  load_piece(x, gate);
  load_piece(x + params.cols, up);
#pragma unroll
  for (int i = 0; i < kSize; ++i) gate[i] = cuda::gated_mul(params.activation, gate[i], up[i]);
  store_piece(static_cast<T*>(params.out) + int64_t{blockIdx.x} * params.cols + col, gate);
}

template <bool kVector>
__global__ void __launch_bounds__(kThreads) soft_cap_kernel(SoftCapParams params) {
  constexpr int kSize = kPieceSize<float, kVector>;
  cuda::launch_next();
  cuda::wait_for_previous();
  const int64_t col = piece_index() * kSize;
  if (col >= params.cols) return;
  const int64_t at = int64_t{blockIdx.x} * params.cols + col;
  float values[kSize];
  load_piece(params.x + at, values);
#pragma unroll
  for (int i = 0; i < kSize; ++i)
    values[i] = cuda::soft_cap(values[i], 1.0f / params.cap, params.cap);
  store_piece(params.out + at, values);
}

template <typename T, bool kVector>
__global__ void __launch_bounds__(kThreads)
    gather_rows_kernel(GatherRowsParams params, const int32_t* logits_indices) {
  constexpr int kSize = kPieceSize<T, kVector>;
  cuda::launch_next();
  cuda::wait_for_previous();
  const int64_t piece = piece_index();
  if (piece * kSize >= params.cols) return;
  const int64_t source = logits_indices[blockIdx.x];
  const T* from = static_cast<const T*>(params.x) + source * params.cols;
  T* to = static_cast<T*>(params.out) + int64_t{blockIdx.x} * params.cols;
  if constexpr (kVector) {
    cuda::store_vector(to, piece, cuda::load_vector(from, piece));
  } else {
    to[piece] = from[piece];
  }
}

// Launches kernel<T, vectors or not> over `rows` rows.
template <typename Choose, typename... Args>
void launch_rows(std::string_view op, const StepContext& ctx, DType dtype, int32_t rows,
                 int64_t cols, bool aligned, const Choose& choose, const Args&... args) {
  check(cols > 0, op, "cols is ", cols, "; it must be positive");
  if (rows == 0) return;
  dispatch_activation(dtype, op, [&](auto tag) {
    using T = typename decltype(tag)::type;
    constexpr int kSize = cuda::kVectorSize<T>;
    const bool vector = aligned && cols % kSize == 0;
    const int64_t pieces = vector ? cols / kSize : cols;
    const dim3 grid(rows, static_cast<unsigned>((pieces + kThreads - 1) / kThreads));
    if (vector) {
      cuda::launch(op, ctx, choose(tag, std::true_type{}), grid, kThreads, 0, args...);
    } else {
      cuda::launch(op, ctx, choose(tag, std::false_type{}), grid, kThreads, 0, args...);
    }
  });
}

}  // namespace

void add_cuda(const AddParams& params, const StepContext& ctx) {
  const bool aligned = cuda::is_vector_aligned(params.a) && cuda::is_vector_aligned(params.b) &&
                       cuda::is_vector_aligned(params.out);
  const auto choose = [](auto tag, auto vector) {
    return add_kernel<typename decltype(tag)::type, decltype(vector)::value>;
  };
  launch_rows("add", ctx, params.dtype, ctx.sizes.num_tokens, params.cols, aligned, choose, params);
}

void gated_mul_cuda(const GatedMulParams& params, const StepContext& ctx) {
  check(params.activation != Activation::kNone, "gated_mul", "there is no activation");
  const bool aligned = cuda::is_vector_aligned(params.x) && cuda::is_vector_aligned(params.out);
  const auto choose = [](auto tag, auto vector) {
    return gated_mul_kernel<typename decltype(tag)::type, decltype(vector)::value>;
  };
  launch_rows("gated_mul", ctx, params.dtype, ctx.sizes.num_tokens, params.cols, aligned, choose,
              params);
}

void soft_cap_cuda(const SoftCapParams& params, const StepContext& ctx) {
  check(params.cap > 0.0f, "soft_cap", "cap is ", params.cap, "; it must be positive");
  const bool aligned = cuda::is_vector_aligned(params.x) && cuda::is_vector_aligned(params.out);
  const auto choose = [](auto, auto vector) { return soft_cap_kernel<decltype(vector)::value>; };
  launch_rows("soft_cap", ctx, DType::kF32, ctx.sizes.num_logits, params.cols, aligned, choose,
              params);
}

void gather_rows_cuda(const GatherRowsParams& params, const StepContext& ctx) {
  const bool aligned = cuda::is_vector_aligned(params.x) && cuda::is_vector_aligned(params.out);
  const auto choose = [](auto tag, auto vector) {
    return gather_rows_kernel<typename decltype(tag)::type, decltype(vector)::value>;
  };
  launch_rows("gather_rows", ctx, params.dtype, ctx.sizes.num_logits, params.cols, aligned, choose,
              params, static_cast<const int32_t*>(ctx.infer.logits_indices));
}

}  // namespace mrv1
