// Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
#include "ops/elementwise.h"

#include <cstring>

#include "core/error.h"
#include "core/thread_pool.h"
#include "ops/vector_ops.h"

namespace mrv1 {
namespace {

constexpr int64_t kElementsPerPiece = 8192;

}  // namespace

void add_cpu(const AddParams& params, const StepContext& ctx) {
  const TypedVectorOps& ops = vector_ops(params.dtype, "add");
  const int64_t size = static_cast<int64_t>(dtype_size(params.dtype));
  ctx.pool->parallel_for(ctx.sizes.num_tokens * params.cols, kElementsPerPiece,
                         [&](int64_t begin, int64_t end, int) {
                           ops.add_row(static_cast<const char*>(params.a) + begin * size,
                                       static_cast<const char*>(params.b) + begin * size,
                                       static_cast<char*>(params.out) + begin * size, end - begin);
                         });
}

void gated_mul_cpu(const GatedMulParams& params, const StepContext& ctx) {
  check(params.cols > 0, "gated_mul", "cols is ", params.cols, ", must be at least 1");
  check(params.activation != Activation::kNone, "gated_mul", "there is no activation");
  const TypedVectorOps& ops = vector_ops(params.dtype, "gated_mul");
  const int64_t row_bytes = params.cols * static_cast<int64_t>(dtype_size(params.dtype));
  ctx.pool->parallel_for(
      ctx.sizes.num_tokens, kElementsPerPiece / params.cols, [&](int64_t begin, int64_t end, int) {
        for (int64_t r = begin; r < end; ++r) {
          const char* gate = static_cast<const char*>(params.x) + r * 2 * row_bytes;
          ops.gated_mul_row(params.activation, gate, gate + row_bytes,
                            static_cast<char*>(params.out) + r * row_bytes, params.cols);
        }
      });
}

void soft_cap_cpu(const SoftCapParams& params, const StepContext& ctx) {
  check(params.cap > 0.0f, "soft_cap", "cap is ", params.cap, ", must be positive");
  const TypedVectorOps& ops = vector_ops(DType::kF32, "soft_cap");
  ctx.pool->parallel_for(
      ctx.sizes.num_logits * params.cols, kElementsPerPiece, [&](int64_t begin, int64_t end, int) {
        ops.soft_cap_row(params.x + begin, params.cap, params.out + begin, end - begin);
      });
}

void gather_rows_cpu(const GatherRowsParams& params, const StepContext& ctx) {
  check(params.cols > 0, "gather_rows", "cols is ", params.cols, ", must be at least 1");
  const int64_t row_bytes = params.cols * static_cast<int64_t>(dtype_size(params.dtype));
  ctx.pool->parallel_for(
      ctx.sizes.num_logits, kElementsPerPiece / params.cols, [&](int64_t begin, int64_t end, int) {
        for (int64_t l = begin; l < end; ++l) {
          std::memcpy(static_cast<char*>(params.out) + l * row_bytes,
                      static_cast<const char*>(params.x) + ctx.infer.logits_indices[l] * row_bytes,
                      static_cast<size_t>(row_bytes));
        }
      });
}

}  // namespace mrv1
