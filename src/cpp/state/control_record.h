// Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>

#include "core/portable.h"
#include "state/row_state.h"

namespace mrv1 {

// The one host-to-device message of a step. Every array lies in the record itself, at a 16-byte
// aligned byte offset from the header; the record's size grows with what changed, never with the
// row table. apply() carries the commands out in the order of the fields below.
struct ControlHeader {
  uint64_t step;
  // In a pipeline: the newest step whose outputs the stages before the last must know before this
  // one, as it takes up rows that drew in that step. Below `step`; 0 = none.
  uint64_t adopt_through;
  int32_t num_freed, num_new_rows, num_token_writes, num_block_writes, num_word_writes;
  // Batch of this step: entries in the host's order, and the padded sizes that launches are made
  // for. A record without a batch (num_entries = 0, padded_requests = 0) only applies changes.
  int32_t num_entries;
  int32_t padded_requests, padded_tokens, padded_logits;
  uint32_t freed_offset, new_rows_offset, token_writes_offset, block_writes_offset,
      word_writes_offset, entries_offset, payload_offset;
  uint32_t bytes;  // used, header included
};

struct NewRow {
  int32_t row;
  int32_t reserved[3];
  Row state;
  SamplingRow sampling;
};
static_assert(sizeof(NewRow) % 16 == 0);

// Copies payload[payload_start, +count) to tokens[row, start...]. Rows from num_rows on are those
// of forced_tokens.
struct TokenWrite {
  int32_t row, start, count, payload_start;
};

// Copies payload to block_table[group, row, start...].
struct BlockWrite {
  int32_t group, row, start, count, payload_start;
};

// Copies payload to words of a row (SamplingRow::words).
struct WordWrite {
  int32_t* target;  // device memory
  int32_t count;
  int32_t payload_start;  // -1: fills with zeros
};

// Free the row if it still has this generation.
struct FreeRow {
  int32_t row, generation;
};

// A row scheduled in this step, with the most tokens that it may compute: exact for prefill and
// extend rows; for decode rows 1, or 1 + the most drafts that may be proposed. A row that is
// finished or has another generation is masked.
struct BatchEntry {
  // samples: 1 if a token is drawn for a prefill or extend row, num_tokens for a decode row.
  int32_t row, generation, num_tokens, samples;
};

template <typename T>
MRV1_HD const T* record_array(const ControlHeader* header, uint32_t offset) {
  return reinterpret_cast<const T*>(reinterpret_cast<const char*>(header) + offset);
}

}  // namespace mrv1
