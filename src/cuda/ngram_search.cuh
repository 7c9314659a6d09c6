// Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
#pragma once

#include "block.cuh"
#include "state/propose.h"

namespace mrv1::cuda {

// The best occurrence of the last tokens of history[0, length), length > 0, by a whole block: its
// threads look at one place of the history each, most of which differ from the last token, and the
// best occurrence is the largest number.
template <int kThreads>
__device__ NgramMatch best_ngram_match(const int32_t* history, int32_t length, NgramRange range) {
  // Places that a thread asks for before it looks at the first.
  constexpr int kAtOnce = 8;
  NgramMatch best = 0;
  const int32_t last = history[length - 1];
  for (int32_t first = 1 + static_cast<int32_t>(threadIdx.x); first < length;
       first += kThreads * kAtOnce) {
    int32_t before[kAtOnce];
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      const int32_t end = first + i * kThreads;
      before[i] = end < length ? history[end - 1] : kNoToken;
    }
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      const int32_t end = first + i * kThreads;
      if (end >= length || before[i] != last) continue;
      best = max(best, ngram_match_at(history, length, end, range));
    }
  }
  return block_max<kThreads>(best);
}

}  // namespace mrv1::cuda
