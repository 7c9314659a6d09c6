// Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
#include "runner/token_logprobs.h"

#include <algorithm>
#include <span>

namespace mrv1 {

void append_logprobs(LogprobRecord& record, std::vector<TokenLogprob>& out) {
  out.push_back({record.token, record.logprob, record.rank});
  const std::span top(top_logprobs(&record), static_cast<size_t>(std::max(0, record.count)));
  if (record.count > kMaxSortedLogprobs) {
    std::sort(top.begin(), top.end(), [](const TopLogprob& a, const TopLogprob& b) {
      return a.logprob != b.logprob ? a.logprob > b.logprob : a.token < b.token;
    });
  }
  int32_t rank = 0;
  for (const TopLogprob& candidate : top) {
    out.push_back({candidate.token, candidate.logprob, ++rank});
  }
}

}  // namespace mrv1
