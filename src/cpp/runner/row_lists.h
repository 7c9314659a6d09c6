// Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>
#include <vector>

#include "runner/runner_config.h"
#include "state/row_state.h"

namespace mrv1 {

// The lists of a request as the words of its row.
struct RowLists {
  std::vector<int32_t> words;  // what is written: leading words of the row
  int64_t zeros_offset = 0, num_zeros = 0;
  int64_t num_words = 0;  // that the row needs in all

  // Lays out the lists of a spec that is in order, and says in `sampling`, whose plain parameters
  // are set, where each begins. Throws kInvalidArgument if they are too long to be addressed.
  void build(const RowSpec& spec, int32_t vocab_size, int32_t max_total_len, SamplingRow& sampling);

 private:
  WordList add_ascending(const std::vector<int32_t>& ids);
  WordList add_sequences(const std::vector<std::vector<int32_t>>& sequences);
};

// The parameters of a spec without its lists.
SamplingRow plain_sampling_row(const RowSpec& spec, int32_t vocab_size,
                               int32_t num_speculative_tokens);

// Throws kInvalidArgument naming what is wrong with the lists and penalties of a spec.
void check_row_lists(const RowSpec& spec, int32_t vocab_size, int32_t max_logprobs);

}  // namespace mrv1
