// Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>

#include "core/portable.h"

namespace mrv1 {

// What is known of a token: the natural logarithm of its probability at temperature 1, before any
// processor but the grammar's mask. token_logprob() computes it from the logit, the row's largest,
// and fixed_point_log() of the sum of the tiles' masses that a draw from the whole row at
// temperature 1 would add up (sampling/processors.h). -inf for a logit of -inf.
struct TopLogprob {
  int32_t token;
  float logprob;
};

// Logprobs of one token, and of the most likely candidates, which follow the record: by (logit
// descending, id ascending), or in any order if there are more than kMaxSortedLogprobs.
struct LogprobRecord {
  float logprob;
  int32_t rank;   // 1 + how many logits are greater; vLLM also counts other ones that are equal
  int32_t count;  // candidates that follow; -1: the logits hold no token to draw, no rank either
  int32_t token;  // drawn, or that takes its place
};
static_assert(sizeof(LogprobRecord) == 16);
constexpr int32_t kMaxSortedLogprobs = 1024;

MRV1_HD TopLogprob* top_logprobs(LogprobRecord* record) {
  return reinterpret_cast<TopLogprob*>(record + 1);
}

// Bytes from one record to the next; 0 where no row may ask for logprobs.
MRV1_HD int64_t logprob_record_bytes(int32_t max_logprobs) {
  if (max_logprobs < 0) return 0;
  const int64_t top = int64_t{max_logprobs} * int64_t{sizeof(TopLogprob)};
  return (int64_t{sizeof(LogprobRecord)} + top + 15) / 16 * 16;
}

// The index-th of records with room for so many candidates.
MRV1_HD LogprobRecord* logprob_record(LogprobRecord* records, int32_t max_logprobs, int64_t index) {
  return reinterpret_cast<LogprobRecord*>(reinterpret_cast<char*>(records) +
                                          index * logprob_record_bytes(max_logprobs));
}

}  // namespace mrv1
