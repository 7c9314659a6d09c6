// Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
#include "ops/rms_norm.h"

#include "core/error.h"
#include "core/thread_pool.h"
#include "ops/vector_ops.h"

namespace mrv1 {
namespace {

constexpr int64_t kElementsPerPiece = 8192;

}  // namespace

void rms_norm_cpu(const RmsNormParams& params, const StepContext& ctx) {
  check(params.cols > 0, "rms_norm", "cols is ", params.cols, ", must be at least 1");
  check(params.residual == nullptr || params.sum != nullptr, "rms_norm",
        "sum is null, must be given with a residual");
  const auto norm_row = vector_ops(params.dtype, "rms_norm").norm_row;
  const int64_t rows = params.logits_rows ? ctx.sizes.num_logits : ctx.sizes.num_tokens;
  const int64_t row_bytes = params.cols * static_cast<int64_t>(dtype_size(params.dtype));
  ctx.pool->parallel_for(
      rows, kElementsPerPiece / params.cols, [&](int64_t begin, int64_t end, int) {
        const auto at = [&](const void* data, int64_t r) {
          return data == nullptr ? nullptr : static_cast<const char*>(data) + r * row_bytes;
        };
        for (int64_t r = begin; r < end; ++r) {
          norm_row(NormRow{at(params.x, r), at(params.residual, r), params.weight,
                           const_cast<char*>(at(params.out, r)),
                           const_cast<char*>(at(params.sum, r)), params.cols, params.eps});
        }
      });
}

}  // namespace mrv1
