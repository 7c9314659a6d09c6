// Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
//
// The record of a token's logprobs, by one block of kDrawThreads, from the logits as they were
// before edits and from what the scan found about their tiles.
#pragma once

#include <cstdint>

#include "sample_draw.cuh"
#include "sampling/logprobs.h"

namespace mrv1::cuda {

struct LogprobMemory {
  union {
    Histogram histogram;
    Candidates::Memory candidates;
  };
  int32_t chosen;
  int32_t count;
};

// The record of a row that holds a NaN or no token to draw.
__device__ inline LogprobRecord no_logprobs(int32_t token) {
  return LogprobRecord{0.0f, 0, -1, token};
}

// Writes the record of `token` from what a scan for raw_targets() found, with `num_top` candidates,
// at most the vocabulary. The row holds no NaN and something above -inf. Whole block.
__device__ inline void write_logprobs(LogprobMemory* memory, const RowLogits& row,
                                      const ScanTargets& found, int32_t tiles, int32_t token,
                                      int32_t num_top, LogprobRecord* record) {
  const Best* bests = found.bests;
  const unsigned long long* sums = found.second.sums;
  const int32_t lane = threadIdx.x % kWarpSize;
  Best best = kNoBest;
  for (int32_t i = threadIdx.x; i < tiles; i += kDrawThreads) best = max(best, bests[i]);
  best = block_max<kDrawThreads>(best);
  const float max_logit = best_logit(best);
  const WeightRule rule{max_logit, Temperature::scale(1.0f), 1};
  uint64_t total = 0;
  for (int32_t i = threadIdx.x; i < tiles; i += kDrawThreads) {
    if (bests[i] == kNoBest) continue;
    total += scale_weight(sums[i], token_weight(best_logit(bests[i]), rule));
  }
  total = block_sum<kDrawThreads>(total);

  // Only tiles whose best is greater hold logits that are.
  const float logit = row.at(token);
  const uint32_t key = ordered_key(logit);
  int32_t greater = 0;
  for (int32_t tile = threadIdx.x / kWarpSize; tile < tiles; tile += kDrawWarps) {
    if (static_cast<uint32_t>(bests[tile] >> 32) <= key) continue;
    float values[kLaneLogits];
    row.load(tile * kTile, values);
#pragma unroll
    for (const float value : values) greater += ordered_key(value) > key ? 1 : 0;
  }
  greater = block_sum<kDrawThreads>(greater);
  const double log_total = fixed_point_log(total);
  if (threadIdx.x == 0) {
    *record =
        LogprobRecord{token_logprob(logit, max_logit, log_total), greater + 1, num_top, token};
  }
  if (num_top == 0) return;

  TopLogprob* top = top_logprobs(record);
  const auto entry = [&](float value, int32_t id) {
    return TopLogprob{id, token_logprob(value, max_logit, log_total)};
  };
  Candidates candidates(&memory->candidates, row, bests, tiles);
  bool sorted = num_top <= kMaxCandidates && candidates.gather_best(num_top, 0, found.pieces);
  if (!sorted) {
    __syncthreads();  // the memory gets another use
    EdgeFinder finder(row, &memory->histogram, &memory->chosen);
    finder.narrow<Measure::kCount>(static_cast<uint64_t>(num_top), [](float) { return 1; });
    __syncthreads();
    sorted = num_top <= kMaxSortedLogprobs && candidates.gather_prefix(finder.edge());
    if (!sorted) {
      if (threadIdx.x == 0) memory->count = 0;
      __syncthreads();
      for (int32_t first = threadIdx.x - lane; first < row.vocab; first += kDrawThreads) {
        const int32_t id = first + lane;
        const float value = id < row.vocab ? row.at(id) : -INFINITY;
        if (id < row.vocab && finder.keeps(value, id)) {
          top[atomicAdd(&memory->count, 1)] = entry(value, id);
        }
      }
      return;
    }
  }
  for (int32_t i = threadIdx.x; i < num_top; i += kDrawThreads) {
    const Best code = candidates.sorted(i);
    top[i] = entry(best_logit(code), best_id(code));
  }
}

}  // namespace mrv1::cuda
