// Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>

#include "core/portable.h"

namespace mrv1 {

// Where a row stands. A state bit that apply and advance set; never inferred from a length.
enum class RowPhase : int32_t {
  kFree = 0,
  kPrefill = 1,   // tokens of the prefill target are still to be computed, no context yet
  kExtend = 2,    // the same with context: a later chunk, a prefix hit, a resumed request
  kDecode = 3,    // every known token but the last is computed; a step computes one more
  kFinished = 4,  // stopped on the device: masked in later steps until the host frees it
};

enum class FinishReason : int32_t {
  kNone = 0,
  kStop = 1,    // EOS or a stop token; the token itself is the row's last token
  kLength = 2,  // max_tokens or the model length is reached
  kError = 3,   // the logits held no token to draw: NaN, or nothing but -inf
};

// What sample() writes for a batch position instead of a token id.
constexpr int32_t kNoToken = -1;     // nothing to draw: padding, masked row, unfinished chunk
constexpr int32_t kErrorToken = -2;  // the row's logits hold no token to draw

// One request's state on the device: 64 bytes. The device holds the truth; the host keeps bounds.
struct Row {
  int32_t generation;  // of the row; outputs are matched by (row, generation)
  RowPhase phase;
  int32_t prompt_len;      // tokens of the prompt proper: outputs are counted from here
  int32_t prefill_target;  // known tokens at admission: prompt, plus outputs on resume
  int32_t num_computed;    // tokens whose keys and values are in the cache
  int32_t total_len;       // tokens known: prefill target, then plus sampled tokens
  int32_t last_token;      // the newest sampled token, -1 before the first
  int32_t min_total_len;   // below this length stop tokens are masked: prompt_len + min_tokens
  int32_t max_total_len;   // at this length the row stops: prompt_len + max_tokens, or less
  FinishReason finish_reason;
  int32_t adapter;     // adapter id, -1 for none
  int32_t num_drafts;  // tokens proposed for this step; they lie in the history from total_len on
  int32_t reserved[4];
};
static_assert(sizeof(Row) == 64);

// A list among the words of a row: items begin at words[offset].
struct WordList {
  int32_t offset = 0, count = 0;
};

// Whether ascending ids hold one.
MRV1_HD bool holds_id(const int32_t* ids, int32_t count, int32_t id) {
  int32_t low = 0;
  while (count > 0) {
    const int32_t half = count / 2;
    if (ids[low + half] < id) {
      low += half + 1;
      count -= half + 1;
    } else if (ids[low + half] == id) {
      return true;
    } else {
      count = half;
    }
  }
  return false;
}

// Sampling parameters of a row: 128 bytes. Lists of any length lie in its words, which are device
// memory of its own.
struct SamplingRow {
  float temperature = 0.0f;  // 0 = greedy
  float top_p = 1.0f;        // 1 = off
  float min_p = 0.0f;        // 0 = off
  int32_t top_k = 0;         // 0 = off; below the size of the vocabulary
  uint64_t seed = 0;         // of the counter RNG; the host draws one for requests without a seed
  int32_t* words = nullptr;  // null if there is no list
  // [ceil(vocab / 32)] a bit for each id that the grammar allows next; null without a grammar.
  const uint32_t* grammar_mask = nullptr;
  float presence_penalty = 0.0f;    // 0 = off
  float frequency_penalty = 0.0f;   // 0 = off
  float repetition_penalty = 1.0f;  // 1 = off
  int32_t num_logprobs = -1;  // candidates reported beside each token; -1: not even the token's own
  int32_t num_speculative_tokens = 0;  // drafts that a step may propose, 0 for none
  int32_t forced_end = 0;   // tokens at positions below it are those of RowState::forced_tokens
  WordList stop_ids;        // ascending: EOS ids (unless ignore_eos) and stop_token_ids
  WordList stop_sequences;  // `count` sequences one after the other: length, then tokens
  WordList bad_words;       // of the same form
  WordList bias;            // `count` pairs of an id and the bits of a float; ids are distinct
  WordList allowed;         // `count` words of a bitmask as grammar_mask; 0: all ids are allowed
  WordList penalties;       // a PenaltyTable (sampling/penalties.h) for `count` tokens; 0: none
  // Room for `count` floats for each of 1 + num_speculative_tokens places: logits as they were
  // before bias, stop ids, penalties (entries, then drafts) and bad words changed them, in this
  // order. 0: nobody asks for them.
  WordList saved;
  int32_t reserved[2] = {};
};
static_assert(sizeof(SamplingRow) == 128);

// Which earlier occurrences propose() looks for: of the last `max` tokens down to the last `min`.
struct NgramRange {
  int32_t min = 0, max = 0;
};

// Drafts that a step can propose for one row.
constexpr int32_t kMaxSpeculativeTokens = 15;

// Device addresses of all row state: fixed for the life of the runner. R = num_rows rows.
struct RowState {
  int32_t num_rows;
  int32_t num_groups;     // KV-cache groups; each has its own block table
  int32_t block_size;     // tokens a block holds
  int32_t max_blocks;     // block ids a row can hold in one group
  int32_t max_model_len;  // tokens a row can hold
  int32_t vocab_size;
  Row* rows;               // [R]
  SamplingRow* sampling;   // [R]
  int32_t* tokens;         // [R, max_model_len] history: prompt, then sampled tokens, then drafts
  int32_t* forced_tokens;  // [R, max_model_len] by position, behind `tokens`; null if never forced
  int32_t* block_table;    // [num_groups, R, max_blocks]; entries past the row's blocks are 0
  int32_t max_drafts;      // largest num_speculative_tokens that a row may have, 0: none proposes
  int32_t max_logprobs;    // largest num_logprobs that a row may have, -1: none has logprobs
  NgramRange ngram;
};

}  // namespace mrv1
