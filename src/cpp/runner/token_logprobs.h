// Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>
#include <vector>

#include "sampling/logprobs.h"

namespace mrv1 {

// What is known of a token beside others that might have come: see LogprobRecord.
struct TokenLogprob {
  int32_t token = -1;
  float logprob = 0.0f;
  int32_t rank = 0;

  bool operator==(const TokenLogprob&) const = default;
};

// Adds a record's group: its token, then its candidates, the most likely first. May sort the
// record's own.
void append_logprobs(LogprobRecord& record, std::vector<TokenLogprob>& out);

}  // namespace mrv1
