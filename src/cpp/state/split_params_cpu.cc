// Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
#include "state/split_params.h"

#include "state/step_context.h"

namespace mrv1 {

void split_params_cpu(const SplitParams& params, const StepContext& ctx) {
  const InferParams& whole = ctx.infer;
  const auto fill = [&](const InferParams& half, int32_t first, int32_t last) {
    *half.counts = half_counts(*whole.counts, first, last);
    half.query_start_loc[0] = 0;
    for (int32_t batch = 0; batch < ctx.sizes.num_requests; ++batch) {
      const int32_t begin = whole.query_start_loc[batch], end = whole.query_start_loc[batch + 1];
      const HalfRow row =
          half_row(whole.row[batch], whole.seq_lens[batch], begin, end, first, last);
      half.row[batch] = row.row;
      half.seq_lens[batch] = row.seq_len;
      half.query_start_loc[batch + 1] = half_token(end, first, last);
    }
  };
  fill(params.first, 0, params.cut);
  fill(params.second, params.cut, ctx.sizes.num_tokens);
}

}  // namespace mrv1
