// Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
//
// A block copies a piece of one token's row of the table, eight elements a thread, through float
// where the dtypes differ. The table is row-major on this backend; a panel-packed one, and rows
// that are no multiple of 16 bytes, are read element by element through the shared index function,
// so that the contract holds for any layout.
#include "launch.h"
#include "ops/embedding.h"
#include "vector.cuh"

namespace mrv1 {
namespace {

constexpr std::string_view kOp = "embedding";
constexpr int kThreads = 128;
constexpr int kPiece = 8;

template <typename Table, typename Out>
__global__ void __launch_bounds__(kThreads)
    embedding_kernel(EmbeddingParams params, const int32_t* token_ids) {
  cuda::launch_next();
  cuda::wait_for_previous();
  const WeightView& view = params.table;
  const int64_t col = (int64_t{blockIdx.y} * kThreads + threadIdx.x) * kPiece;
  if (col >= view.cols) return;
  const int64_t id = token_ids[blockIdx.x] - params.first_row;
  float values[kPiece] = {};
  if (id >= 0 && id < view.rows) {
    cuda::load_values(static_cast<const Table*>(view.data) + id * view.cols + col, values);
#pragma unroll
    for (int i = 0; i < kPiece; ++i) values[i] *= params.scale;
  }
  cuda::store_values(static_cast<Out*>(params.out) + int64_t{blockIdx.x} * view.cols + col, values);
}

template <typename Table, typename Out>
__global__ void __launch_bounds__(kThreads)
    embedding_scalar_kernel(EmbeddingParams params, const int32_t* token_ids) {
  cuda::launch_next();
  cuda::wait_for_previous();
  const WeightView& view = params.table;
  const Table* table = static_cast<const Table*>(view.data);
  Out* out = static_cast<Out*>(params.out) + int64_t{blockIdx.x} * view.cols;
  const int64_t id = token_ids[blockIdx.x] - params.first_row;
  const bool known = id >= 0 && id < view.rows;
  for (int64_t col = threadIdx.x; col < view.cols; col += kThreads) {
    float value = 0.0f;
    if (known) {
      const int64_t index = view.layout == WeightLayout::kRowMajor
                                ? id * view.cols + col
                                : panel_index(view.dtype, view.cols, id, col);
      value = to_float(table[index]) * params.scale;
    }
    out[col] = from_float<Out>(value);
  }
}

}  // namespace

void embedding_cuda(const EmbeddingParams& params, const StepContext& ctx) {
  const WeightView& table = params.table;
  check(table.rows > 0 && table.cols > 0, kOp, "table is [", table.rows, ", ", table.cols,
        "]; both sizes must be positive");
  const int32_t tokens = ctx.sizes.num_tokens;
  if (tokens == 0) return;
  const bool vector = table.layout == WeightLayout::kRowMajor && table.cols % kPiece == 0 &&
                      cuda::is_vector_aligned(table.data) && cuda::is_vector_aligned(params.out);
  dispatch_activation(table.dtype, kOp, [&](auto table_tag) {
    dispatch_activation(params.dtype, kOp, [&](auto out_tag) {
      using Table = typename decltype(table_tag)::type;
      using Out = typename decltype(out_tag)::type;
      if (vector) {
        constexpr int64_t kCols = int64_t{kThreads} * kPiece;
        const dim3 grid(tokens, static_cast<unsigned>((table.cols + kCols - 1) / kCols));
        cuda::launch(kOp, ctx, embedding_kernel<Table, Out>, grid, kThreads, 0, params,
                     ctx.infer.token_ids);
      } else {
        cuda::launch(kOp, ctx, embedding_scalar_kernel<Table, Out>, tokens, kThreads, 0, params,
                     ctx.infer.token_ids);
      }
    });
  });
}

}  // namespace mrv1
