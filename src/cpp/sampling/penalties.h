// Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>

#include "core/portable.h"

namespace mrv1 {

// A token of a row's history and how it occurred.
struct PenaltyEntry {
  static constexpr uint32_t kInPrompt = 1u << 31;

  int32_t token;
  uint32_t uses;  // kInPrompt, and below it how often the token is among the outputs
};

// The distinct tokens of a row's history, among the row's words (SamplingRow::penalties): a header,
// entries in any order, and an open-addressing index of them. Only rows with penalties have one.
struct PenaltyTableHeader {
  int32_t num_counted;  // leading tokens of the history that the entries have
  int32_t num_entries;
  int32_t index_mask;  // size of the index less 1
  int32_t reserved;
};
constexpr int64_t kPenaltyHeaderWords = sizeof(PenaltyTableHeader) / sizeof(int32_t);
constexpr int64_t kPenaltyEntryWords = sizeof(PenaltyEntry) / sizeof(int32_t);

// Places of the index for so many tokens: a power of two, at most half of it taken.
MRV1_HD int64_t penalty_index_words(int64_t capacity) {
  int64_t words = 4;
  while (words < 2 * capacity) words *= 2;
  return words;
}

// Words from the table's start to its index, and to its end.
MRV1_HD int64_t penalty_index_offset(int64_t capacity) {
  return (kPenaltyHeaderWords + kPenaltyEntryWords * capacity + 3) / 4 * 4;
}
MRV1_HD int64_t penalty_table_words(int64_t capacity) {
  return penalty_index_offset(capacity) + penalty_index_words(capacity);
}

}  // namespace mrv1
