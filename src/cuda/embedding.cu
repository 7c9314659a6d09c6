// Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
//
// One block per token copies its row of the table, element by element, through float. The table is
// row-major on this backend; a panel-packed one is read by the shared index function, so that the
// contract holds for any layout.
#include "check.h"
#include "ops/embedding.h"

namespace mrv1 {
namespace {

constexpr std::string_view kOp = "embedding";
constexpr int kThreads = 256;

template <typename Table, typename Out>
__global__ void embedding_kernel(EmbeddingParams params, const int32_t* token_ids) {
  const WeightView& view = params.table;
  const Table* table = static_cast<const Table*>(view.data);
  Out* out = static_cast<Out*>(params.out) + int64_t{blockIdx.x} * view.cols;
  const int64_t id = token_ids[blockIdx.x];
  const bool known = id >= 0 && id < view.rows;
  for (int64_t col = threadIdx.x; col < view.cols; col += kThreads) {
    float value = 0.0f;
    if (known) {
      const int64_t index = view.layout == WeightLayout::kRowMajor
                                ? id * view.cols + col
                                : panel_index(view.dtype, view.cols, id, col);
      value = to_float(table[index]);
    }
    out[col] = from_float<Out>(value);
  }
}

}  // namespace

void embedding_cuda(const EmbeddingParams& params, const StepContext& ctx) {
  check(params.table.rows > 0 && params.table.cols > 0, kOp, "table is [", params.table.rows, ", ",
        params.table.cols, "]; both sizes must be positive");
  if (ctx.sizes.num_tokens == 0) return;
  dispatch_activation(params.table.dtype, kOp, [&](auto table_tag) {
    dispatch_activation(params.dtype, kOp, [&](auto out_tag) {
      using Table = typename decltype(table_tag)::type;
      using Out = typename decltype(out_tag)::type;
      embedding_kernel<Table, Out><<<ctx.sizes.num_tokens, kThreads, 0, cuda::stream_of(ctx)>>>(
          params, ctx.infer.token_ids);
    });
  });
  cuda::check_launch(kOp);
}

}  // namespace mrv1
