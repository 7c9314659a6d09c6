// Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
#include "ops/linear.h"

#include "core/error.h"
#include "core/thread_pool.h"
#include "dist/communicator.h"
#include "ops/panel_product_cpu.h"

namespace mrv1 {

int num_invariant_parts(const LinearParams& params, const StepContext& ctx) {
  if (!ctx.batch_invariant || !params.row_parallel) return 1;
  // Ranks that are linked by their experts have whole weights of everything else.
  const Communicator* ranks = ctx.communicator;
  if (ranks != nullptr && ranks->expert_link(0) == nullptr) return kInvariantParts / ranks->size();
  return has_invariant_parts(params.weight.cols, 1, params.weight.dtype) ? kInvariantParts : 1;
}

void linear_cpu(const LinearParams& params, const StepContext& ctx) {
  constexpr std::string_view kOp = "linear";
  if (params.gated()) {
    check(params.weight.rows % (2 * kPanelRows) == 0, kOp, "weight has ", params.weight.rows,
          " rows, must be a multiple of ", 2 * kPanelRows, " with an activation");
    check(!params.row_parallel, kOp, "a row-parallel linear has no activation");
  }
  const PanelProduct product(
      {.x = params.x,
       .weight = params.weight,
       .bias = params.bias,
       .out = params.out,
       .rows = params.logits_rows ? ctx.sizes.num_logits : ctx.sizes.num_tokens,
       .dtype = params.dtype,
       .out_dtype = params.out_dtype,
       .activation = params.activation,
       .parts = num_invariant_parts(params, ctx)},
      vector_ops(params.dtype, kOp), kOp);
  const int64_t items = product.num_items();
  ctx.pool->parallel_for(items, product.grain(items, ctx.pool->num_threads()),
                         [&](int64_t begin, int64_t end, int) {
                           for (int64_t i = begin; i < end; ++i) product.compute(i);
                         });
}

}  // namespace mrv1
