// Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
#include "ops/embedding.h"

#include <cstring>
#include <type_traits>

#include "core/error.h"
#include "core/thread_pool.h"

namespace mrv1 {
namespace {

constexpr int64_t kTokensPerPiece = 4;

template <typename From, typename To>
void gather(const EmbeddingParams& params, const StepContext& ctx) {
  const WeightView& table = params.table;
  const From* data = static_cast<const From*>(table.data);
  To* out = static_cast<To*>(params.out);
  const bool row_major = table.layout == WeightLayout::kRowMajor;
  ctx.pool->parallel_for(
      ctx.sizes.num_tokens, kTokensPerPiece, [&](int64_t begin, int64_t end, int) {
        for (int64_t t = begin; t < end; ++t) {
          To* row = out + t * table.cols;
          const int64_t id = ctx.infer.token_ids[t] - params.first_row;
          if (id < 0 || id >= table.rows) {
            std::memset(static_cast<void*>(row), 0, static_cast<size_t>(table.cols) * sizeof(To));
            continue;
          }
          for (int64_t c = 0; c < table.cols; ++c) {
            const From value =
                data[row_major ? id * table.cols + c : panel_index(table.dtype, table.cols, id, c)];
            row[c] = from_float<To>(to_float(value) * params.scale);
          }
        }
      });
}

}  // namespace

void embedding_cpu(const EmbeddingParams& params, const StepContext& ctx) {
  dispatch_activation(params.table.dtype, "embedding", [&](auto from) {
    dispatch_activation(params.dtype, "embedding", [&](auto to) {
      gather<typename decltype(from)::type, typename decltype(to)::type>(params, ctx);
    });
  });
}

}  // namespace mrv1
