// Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
#include "sampling/logprobs_cpu.h"

#include <algorithm>

#include "core/thread_pool.h"
#include "ops/cpu_isa.h"
#include "sampling/processors.h"
#include "sampling/sample_cpu.h"
#include "sampling/score.h"
#include "state/step_context.h"

namespace mrv1 {
namespace {

// Ids of the first `count` logits by (logit descending, id ascending).
void find_largest(const RowBlocks& row, const float* logits, int32_t count, int32_t* ids) {
  const int32_t floor = row.key_floor(count);
  int64_t found = 0;
  for (int64_t block = 0; block < row.blocks(); ++block) {
    if (row.max_key(block) < floor) {
      continue;
    }
    const int32_t first = RowBlocks::first_id(block);
    for (int32_t i = 0; i < row.count(block); ++i) {
      ids[found] = first + i;
      found += logit_key(row.logits(block)[i]) >= floor ? 1 : 0;
    }
  }
  const auto comes_before = [logits](int32_t a, int32_t b) {
    const int32_t key_a = logit_key(logits[a]);
    const int32_t key_b = logit_key(logits[b]);
    return key_a != key_b ? key_a > key_b : a < b;
  };
  std::nth_element(ids, ids + count - 1, ids + found, comes_before);
  std::sort(ids, ids + count, comes_before);
}

}  // namespace

void write_logprobs(const float* logits, int64_t vocab_size, int32_t token, int32_t count,
                    const RowScratch& scratch, const SampleLoops& loops, LogprobRecord* record) {
  RowBlocks row(logits, vocab_size, scratch, loops);
  if (token < 0 || !row.scan()) {
    *record = LogprobRecord{0.0f, 0, -1, token};
    return;
  }
  const float max_logit = row.max_logit();
  const uint64_t total = row.weigh_tiles(Temperature::scale(1.0f), scratch.block_sum);
  const double log_total = fixed_point_log(total);
  const int32_t key = logit_key(logits[token]);
  int32_t greater = 0;
  for (int64_t block = 0; block < row.blocks(); ++block) {
    if (row.max_key(block) > key) {
      greater += loops.count_above(row.logits(block), row.count(block), key);
    }
  }
  *record =
      LogprobRecord{token_logprob(logits[token], max_logit, log_total), 1 + greater, count, token};
  if (count == 0) {
    return;
  }
  find_largest(row, logits, count, scratch.ids);
  TopLogprob* top = top_logprobs(record);
  for (int32_t i = 0; i < count; ++i) {
    const int32_t id = scratch.ids[i];
    top[i] = TopLogprob{id, token_logprob(logits[id], max_logit, log_total)};
  }
}

void score_cpu(const ScoreParams& params, const StepContext& ctx) {
  check_sample_workspace("score", params.vocab_size, ctx);
  const SampleLoops& loops = sample_loops(current_cpu_isa());
  const auto count =
      static_cast<int32_t>(std::min(int64_t{params.num_logprobs}, params.vocab_size));
  ctx.pool->parallel_for(params.num_rows, 1, [&](int64_t begin, int64_t end, int thread) {
    const RowScratch scratch = carve_row_scratch(ctx.workspace, params.vocab_size, thread);
    for (int64_t i = begin; i < end; ++i) {
      if (params.targets[i] >= 0) {
        write_logprobs(params.logits + i * params.vocab_size, params.vocab_size, params.targets[i],
                       count, scratch, loops,
                       logprob_record(params.records, params.max_logprobs, i));
      }
    }
  });
}

}  // namespace mrv1
