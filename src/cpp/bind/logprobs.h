// Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
#pragma once

#include <span>
#include <vector>

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

// (token ids, logprobs, ranks) as arrays [tokens, 1 + num_logprobs].
inline nb::object prompt_logprob_arrays(std::span<const TokenLogprob> items, int32_t num_logprobs) {
  std::vector<int32_t> tokens, ranks;
  std::vector<float> values;
  tokens.reserve(items.size());
  ranks.reserve(items.size());
  values.reserve(items.size());
  for (const TokenLogprob& item : items) {
    tokens.push_back(item.token);
    values.push_back(item.logprob);
    ranks.push_back(item.rank);
  }
  const size_t width = 1 + static_cast<size_t>(num_logprobs);
  const std::vector<size_t> shape = {items.size() / width, width};
  return nb::make_tuple(to_numpy(tokens, shape), to_numpy(values, shape), to_numpy(ranks, shape));
}

}  // namespace mrv1
