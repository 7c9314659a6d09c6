// Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
#pragma once

#include <atomic>
#include <cstdint>

#include "core/portable.h"
#include "sampling/logprobs.h"
#include "state/infer_params.h"
#include "state/row_state.h"

namespace mrv1 {

// What a step tells the host about one entry of its batch: 32 bytes, in the host's entry order.
struct OutputEntry {
  int32_t row, generation;
  int32_t num_computed, total_len;
  int16_t num_tokens;                // new tokens; 0: none (unfinished chunk, or masked row)
  int16_t num_drafts, num_accepted;  // tokens proposed, and how many of the new tokens they are
  int16_t masked;                    // 1 if the row was finished or freed before the step
  FinishReason finish_reason;
  int32_t stop_sequence;  // which sequence stopped the row; -1: none did
};
static_assert(sizeof(OutputEntry) == 32);

// Header of a slot in the output ring; entries follow at kOutputHeaderBytes, then their tokens. The
// device writes `sequence` last, so a host that sees step + 1 there sees the entries too.
struct OutputHeader {
  std::atomic<uint64_t> sequence;
  uint64_t step;
  int32_t num_entries;
  int32_t reserved;
  uint64_t begin_ns, end_ns;  // device clock when apply() began and when advance() ended
  // What the device has spent waiting for other stages of a pipeline, in all steps since the start.
  uint64_t waited_ns;
};
constexpr uint32_t kOutputHeaderBytes = 64;
static_assert(sizeof(OutputHeader) <= kOutputHeaderBytes);

MRV1_HD OutputEntry* output_entries(OutputHeader* slot) {
  return reinterpret_cast<OutputEntry*>(reinterpret_cast<char*>(slot) + kOutputHeaderBytes);
}

// New tokens of each entry: [max_requests, 1 + max_drafts].
MRV1_HD int32_t* output_tokens(OutputHeader* slot, int32_t max_requests) {
  return reinterpret_cast<int32_t*>(output_entries(slot) + max_requests);
}

constexpr int64_t kLogprobAlignment = 16;

// Bytes of a slot before its logprobs.
MRV1_HD int64_t output_tokens_end(int32_t max_requests, int32_t max_drafts) {
  const int64_t entry = int64_t{sizeof(OutputEntry)} + (1 + max_drafts) * int64_t{sizeof(int32_t)};
  return (kOutputHeaderBytes + max_requests * entry + kLogprobAlignment - 1) / kLogprobAlignment *
         kLogprobAlignment;
}

// The logprobs of an entry's place: [max_requests, 1 + max_drafts] records of
// logprob_record_bytes(max_logprobs). Written for rows that ask for them.
MRV1_HD LogprobRecord* output_logprobs(OutputHeader* slot, int32_t max_requests,
                                       const RowState& state, int32_t entry, int32_t place) {
  const int64_t index = int64_t{entry} * (1 + state.max_drafts) + place;
  return reinterpret_cast<LogprobRecord*>(reinterpret_cast<char*>(slot) +
                                          output_tokens_end(max_requests, state.max_drafts) +
                                          index * logprob_record_bytes(state.max_logprobs));
}

// Which of the sequences (SamplingRow::stop_sequences) the outputs of a history end with, the first
// if several do; -1 for none.
MRV1_HD int32_t ending_sequence(const int32_t* sequences, int32_t count, const int32_t* history,
                                int32_t prompt_len, int32_t total_len) {
  for (int32_t i = 0; i < count; ++i) {
    const int32_t length = *sequences++;
    bool ends = length <= total_len - prompt_len;
    for (int32_t j = 0; ends && j < length; ++j) {
      ends = history[total_len - length + j] == sequences[j];
    }
    if (ends) return i;
    sequences += length;
  }
  return -1;
}

// The end of a step for one row. An unfinished prefill chunk yields no token. Of the tokens drawn,
// one for each place of a decode row, the row takes those up to the first that is not the draft of
// the next place: every one of them was drawn from the target's distribution given the tokens
// before it, so the row gets what it would have got a token a step. It takes none after a stop or
// its length. num_computed grows by the places whose token is the row's: what was computed for a
// rejected draft is written over later.
//
// A draft is a fixed token, so it is accepted with the probability that the target gives it, and
// that is the most that any rule can which keeps the distribution: rejection sampling (Leviathan,
// Kalman, Matias: "Fast inference from transformers via speculative decoding", 2023) accepts with
// sum min(p, q), which is p(draft) where q is all on the draft.
//
// `drawn` is the first logits row of the entry, null if it has none; `tokens` takes the new tokens.
MRV1_HD OutputEntry advance_row(const RowState& state, const BatchEntry& entry,
                                const int32_t* drawn, int32_t* tokens) {
  // A copy: the stores to the history below then make no compiler read the row again.
  Row row = state.rows[entry.row];
  const SamplingRow& sampling = state.sampling[entry.row];
  const int32_t* const words = sampling.words;
  const WordList stop_ids = sampling.stop_ids;
  const WordList sequences = sampling.stop_sequences;
  OutputEntry out{};
  out.stop_sequence = -1;
  out.row = entry.row;
  out.generation = entry.generation;
  if (is_masked(entry, row)) {
    out.masked = 1;
    return out;
  }
  const int32_t num_drafts = entry.samples > 1 ? row.num_drafts : 0;
  out.num_drafts = static_cast<int16_t>(num_drafts);
  // Decode rows count the places that they keep.
  const bool is_decode = row.phase == RowPhase::kDecode;
  row.num_computed += is_decode ? 1 : entry.num_tokens;
  if (row.num_computed < row.total_len) {
    row.phase = RowPhase::kExtend;
  } else {
    row.phase = RowPhase::kDecode;
    int32_t* history = state.tokens + int64_t{entry.row} * state.max_model_len;
    for (int32_t place = 0; drawn != nullptr; ++place) {
      const int32_t token = drawn[place];
      if (token == kErrorToken) row.finish_reason = FinishReason::kError;
      if (token < 0) break;
      const bool accepted = place < num_drafts && token == history[row.total_len];
      history[row.total_len] = token;
      row.total_len += 1;
      row.last_token = token;
      tokens[out.num_tokens++] = token;
      out.num_accepted = static_cast<int16_t>(out.num_accepted + (accepted ? 1 : 0));
      if (row.total_len > row.min_total_len) {
        if (holds_id(words + stop_ids.offset, stop_ids.count, token)) {
          row.finish_reason = FinishReason::kStop;
        }
        if (row.finish_reason == FinishReason::kNone && sequences.count > 0) {
          out.stop_sequence = ending_sequence(words + sequences.offset, sequences.count, history,
                                              row.prompt_len, row.total_len);
          if (out.stop_sequence >= 0) row.finish_reason = FinishReason::kStop;
        }
      }
      if (row.finish_reason == FinishReason::kNone && row.total_len >= row.max_total_len) {
        row.finish_reason = FinishReason::kLength;
      }
      if (!accepted || row.finish_reason != FinishReason::kNone) break;
      row.num_computed += 1;
    }
    if (row.finish_reason != FinishReason::kNone) row.phase = RowPhase::kFinished;
    out.finish_reason = row.finish_reason;
  }
  out.num_computed = row.num_computed;
  out.total_len = row.total_len;
  state.rows[entry.row] = row;
  return out;
}

// The same on a stage of a pipeline before the last, for entries that draw nothing: it need not be
// told how far a piece of a prompt has brought its row, so the next piece waits for nobody.
MRV1_HD void advance_unfinished(const RowState& state, const BatchEntry& entry) {
  if (entry.samples == 0) advance_row(state, entry, nullptr, nullptr);
}

// Advances every row of the batch, writes the output slot, its sequence number last, and counts the
// step up. In a pipeline the last stage does so, and writes the slot, but for its logprobs, to the
// stages before it too (StageLink::stage_outputs), each once it has adopted what was there; those
// advance the rows that draw nothing, and write a slot without entries.
void advance_cpu(const StepContext& ctx);
void advance_cuda(const StepContext& ctx);

}  // namespace mrv1
