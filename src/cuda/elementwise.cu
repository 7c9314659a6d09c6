// Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
//
// One thread per output element for the three ops that have no reduction: the residual add, the
// gated activation and the choice of the rows that get logits. Arithmetic is in float, and each
// thread reads its operands before it writes, so outputs may alias inputs of the same shape.
#include "check.h"
#include "ops/elementwise.h"

namespace mrv1 {
namespace {

constexpr int kThreads = 256;

unsigned num_blocks(int64_t elements) {
  return static_cast<unsigned>((elements + kThreads - 1) / kThreads);
}

// In 64 bits before the product: blocks of a long prompt hold more than 2^32 elements together.
__device__ int64_t element_index() { return int64_t{blockIdx.x} * kThreads + threadIdx.x; }

template <typename T>
__global__ void add_kernel(AddParams params, int64_t elements) {
  const int64_t i = element_index();
  if (i >= elements) return;
  const float a = to_float(static_cast<const T*>(params.a)[i]);
  const float b = to_float(static_cast<const T*>(params.b)[i]);
  static_cast<T*>(params.out)[i] = from_float<T>(a + b);
}

template <typename T>
__global__ void silu_mul_kernel(SiluMulParams params, int64_t elements) {
  const int64_t i = element_index();
  if (i >= elements) return;
  const T* x = static_cast<const T*>(params.x) + i / params.cols * 2 * params.cols;
  const int64_t col = i % params.cols;
  const float gate = to_float(x[col]);
  const float up = to_float(x[params.cols + col]);
  static_cast<T*>(params.out)[i] = from_float<T>(gate / (1.0f + expf(-gate)) * up);
}

template <typename T>
__global__ void gather_rows_kernel(GatherRowsParams params, const int32_t* logits_indices,
                                   int64_t elements) {
  const int64_t i = element_index();
  if (i >= elements) return;
  const int64_t source = logits_indices[i / params.cols];
  static_cast<T*>(params.out)[i] =
      static_cast<const T*>(params.x)[source * params.cols + i % params.cols];
}

}  // namespace

void add_cuda(const AddParams& params, const StepContext& ctx) {
  check(params.cols > 0, "add", "cols is ", params.cols, "; it must be positive");
  const int64_t elements = ctx.sizes.num_tokens * params.cols;
  if (elements == 0) return;
  dispatch_activation(params.dtype, "add", [&](auto tag) {
    using T = typename decltype(tag)::type;
    add_kernel<T><<<num_blocks(elements), kThreads, 0, cuda::stream_of(ctx)>>>(params, elements);
  });
  cuda::check_launch("add");
}

void silu_mul_cuda(const SiluMulParams& params, const StepContext& ctx) {
  check(params.cols > 0, "silu_mul", "cols is ", params.cols, "; it must be positive");
  const int64_t elements = ctx.sizes.num_tokens * params.cols;
  if (elements == 0) return;
  dispatch_activation(params.dtype, "silu_mul", [&](auto tag) {
    using T = typename decltype(tag)::type;
    silu_mul_kernel<T>
        <<<num_blocks(elements), kThreads, 0, cuda::stream_of(ctx)>>>(params, elements);
  });
  cuda::check_launch("silu_mul");
}

void gather_rows_cuda(const GatherRowsParams& params, const StepContext& ctx) {
  check(params.cols > 0, "gather_rows", "cols is ", params.cols, "; it must be positive");
  const int64_t elements = ctx.sizes.num_logits * params.cols;
  if (elements == 0) return;
  dispatch_activation(params.dtype, "gather_rows", [&](auto tag) {
    using T = typename decltype(tag)::type;
    gather_rows_kernel<T><<<num_blocks(elements), kThreads, 0, cuda::stream_of(ctx)>>>(
        params, ctx.infer.logits_indices, elements);
  });
  cuda::check_launch("gather_rows");
}

}  // namespace mrv1
