// Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
#include "ops/elementwise.h"

#include <cstring>

#include "core/error.h"
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

void silu_mul_cpu(const SiluMulParams& params, const StepContext& ctx) {
  check(params.cols > 0, "silu_mul", "cols is ", params.cols, ", must be at least 1");
  const TypedVectorOps& ops = vector_ops(params.dtype, "silu_mul");
  const int64_t row_bytes = params.cols * static_cast<int64_t>(dtype_size(params.dtype));
  ctx.pool->parallel_for(
      ctx.sizes.num_tokens, kElementsPerPiece / params.cols, [&](int64_t begin, int64_t end, int) {
        for (int64_t r = begin; r < end; ++r) {
          const char* gate = static_cast<const char*>(params.x) + r * 2 * row_bytes;
          ops.silu_mul_row(gate, gate + row_bytes, static_cast<char*>(params.out) + r * row_bytes,
                           params.cols);
        }
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
