// Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>

#include "core/portable.h"
#include "state/row_state.h"

namespace mrv1 {

struct StepContext;

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

// The table of a row, which has one. An index place holds 0 if it is empty, else 1 + the number of
// an entry. A token's places are those from its hash on; there is always an empty one.
struct PenaltyTable {
  PenaltyTableHeader* header;
  PenaltyEntry* entries;
  int32_t* index;

  MRV1_HD static PenaltyTable of(const SamplingRow& sampling) {
    int32_t* const words = sampling.words + sampling.penalties.offset;
    return PenaltyTable{reinterpret_cast<PenaltyTableHeader*>(words),
                        reinterpret_cast<PenaltyEntry*>(words + kPenaltyHeaderWords),
                        words + penalty_index_offset(sampling.penalties.count)};
  }

  MRV1_HD int32_t first_place(int32_t token) const {
    const uint32_t hash = static_cast<uint32_t>(token) * 0x9E3779B1u;
    return static_cast<int32_t>((hash ^ hash >> 15) & static_cast<uint32_t>(header->index_mask));
  }
  MRV1_HD int32_t next_place(int32_t place) const { return (place + 1) & header->index_mask; }

  // The place of the token, or the empty one where it belongs.
  MRV1_HD int32_t find(int32_t token) const {
    int32_t place = first_place(token);
    while (index[place] != 0 && entries[index[place] - 1].token != token) {
      place = next_place(place);
    }
    return place;
  }

  // PenaltyEntry::uses, 0 for a token that is not in the history.
  MRV1_HD uint32_t uses(int32_t token) const {
    const int32_t entry = index[find(token)];
    return entry != 0 ? entries[entry - 1].uses : 0;
  }
};

// What another occurrence adds to the uses of a token, of which it has some already.
MRV1_HD uint32_t more_uses(uint32_t uses, bool in_prompt) {
  return in_prompt ? uses | PenaltyEntry::kInPrompt : uses + 1;
}

// Enters the tokens of the histories that are not counted yet, [num_counted, total_len), into the
// tables of the rows with penalties that have a logits row in this step. Tokens below prompt_len
// are the prompt's. Runs between infer_params() and sample(); drafts are no part of it. Histories
// hold tokens of the vocabulary only, so that no table overflows.
void count_tokens_cpu(const StepContext& ctx);
void count_tokens_cuda(const StepContext& ctx);

}  // namespace mrv1
