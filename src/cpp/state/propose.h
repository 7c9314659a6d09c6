// Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>

#include "core/portable.h"
#include "state/infer_params.h"
#include "state/row_state.h"

// Prompt lookup (Saxena, "Prompt Lookup Decoding", 2023): what followed the newest tokens of a row
// when they occurred before is proposed to follow them again.
//
// Of a row's history h[0, length), the last n tokens are looked for, for the largest n from
// ngram.max down to ngram.min with which they occur earlier: h[end - n, end) for an end below
// length, so that the last tokens do not find themselves and at least one token follows. Of several
// occurrences the most recent one counts. The drafts are the tokens from `end` on, up to the
// history's end, at most as many as the row, its batch entry and its length allow.
namespace mrv1 {

// An occurrence as one number: a longer one is larger, then a later one. 0 is none.
using NgramMatch = unsigned long long;

MRV1_HD int32_t ngram_match_end(NgramMatch match) { return static_cast<int32_t>(match); }

// The longest occurrence of the last tokens of history[0, length) that ends before history[end],
// 1 <= end < length.
MRV1_HD NgramMatch ngram_match_at(const int32_t* history, int32_t length, int32_t end,
                                  NgramRange range) {
  const int32_t most = range.max < end ? range.max : end;
  int32_t n = 0;
  while (n < most && history[end - 1 - n] == history[length - 1 - n]) ++n;
  if (n < range.min) return 0;
  return static_cast<NgramMatch>(n) << 32 | static_cast<uint32_t>(end);
}

// The best occurrence in history[0, length): 0 if there is none.
inline NgramMatch best_ngram_match(const int32_t* history, int32_t length, NgramRange range) {
  NgramMatch best = 0;
  for (int32_t end = 1; end < length; ++end) {
    const NgramMatch match = ngram_match_at(history, length, end, range);
    best = match > best ? match : best;
  }
  return best;
}

// The most drafts for an entry of the batch: such that the row, with a token after the last of
// them, does not pass its length. 0 for entries that take none, masked ones among them.
MRV1_HD int32_t most_drafts(const BatchEntry& entry, const Row& row, const SamplingRow& sampling) {
  if (is_masked(entry, row) || row.phase != RowPhase::kDecode) return 0;
  int32_t most = entry.samples - 1;
  most = most < sampling.num_speculative_tokens ? most : sampling.num_speculative_tokens;
  const int32_t room = row.max_total_len - row.total_len - 1;
  return most < room ? most : room;
}

// Whether propose() sets the row's num_drafts: only where infer_params() will read it.
MRV1_HD bool takes_drafts(const BatchEntry& entry, const Row& row) {
  return entry.samples > 1 && !is_masked(entry, row);
}

// Copies the drafts of an occurrence, at most `most` of them; returns how many. They may go behind
// the history.
MRV1_HD int32_t copy_drafts(const int32_t* history, int32_t length, NgramMatch match, int32_t most,
                            int32_t* drafts) {
  if (match == 0) return 0;
  const int32_t end = ngram_match_end(match);
  const int32_t count = most < length - end ? most : length - end;
  for (int32_t i = 0; i < count; ++i) drafts[i] = history[end + i];
  return count;
}

// Proposes drafts for the decode rows of the step's record, after apply() and before
// infer_params(): they stand in the row's history from total_len on, their number in
// Row::num_drafts. Called only for steps whose sizes say that they speculate.
void propose_cpu(const StepContext& ctx);
void propose_cuda(const StepContext& ctx);

}  // namespace mrv1
