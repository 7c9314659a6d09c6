// Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
#pragma once

#include <span>

#include "bind/bind.h"
#include "runner/model_runner.h"

namespace mrv1 {

// (token ids, logprobs, ranks), a list each.
inline nb::object logprob_lists(std::span<const TokenLogprob> logprobs) {
  nb::list tokens, values, ranks;
  for (const TokenLogprob& item : logprobs) {
    tokens.append(item.token);
    values.append(item.logprob);
    ranks.append(item.rank);
  }
  return nb::make_tuple(tokens, values, ranks);
}

}  // namespace mrv1
