// Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
#include "core/thread_pool.h"
#include "sampling/penalties.h"
#include "sampling/processors.h"
#include "state/step_context.h"

namespace mrv1 {
namespace {

void count_row(const PenaltyTable& table, const Row& row, const int32_t* history) {
  PenaltyTableHeader& header = *table.header;
  for (int32_t position = header.num_counted; position < row.total_len; ++position) {
    const int32_t token = history[position];
    int32_t& place = table.index[table.find(token)];
    if (place == 0) {
      table.entries[header.num_entries] = PenaltyEntry{token, 0};
      place = ++header.num_entries;
    }
    PenaltyEntry& entry = table.entries[place - 1];
    entry.uses = more_uses(entry.uses, position < row.prompt_len);
  }
  header.num_counted = row.total_len;
}

}  // namespace

void count_tokens_cpu(const StepContext& ctx) {
  const InferParams& infer = ctx.infer;
  ctx.pool->parallel_for(ctx.sizes.num_logits, 1, [&](int64_t begin, int64_t end, int) {
    for (int64_t i = begin; i < end; ++i) {
      const int32_t batch = infer.logits_batch[i];
      if (batch < 0 || infer.row[batch] < 0 || infer.logits_place[i] != 0) continue;
      const int32_t index = infer.row[batch];
      const Row& row = ctx.rows.rows[index];
      const SamplingRow& sampling = ctx.rows.sampling[index];
      if (!Penalties::applies(row, sampling)) continue;
      count_row(PenaltyTable::of(sampling), row,
                ctx.rows.tokens + int64_t{index} * ctx.rows.max_model_len);
    }
  });
}

}  // namespace mrv1
