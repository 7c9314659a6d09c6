// Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
#pragma once

#include <atomic>
#include <cstdint>

#include "core/portable.h"
#include "state/infer_params.h"
#include "state/row_state.h"

namespace mrv1 {

// What a step tells the host about one entry of its batch: 32 bytes, in the host's entry order.
struct OutputEntry {
  int32_t row, generation;
  int32_t token;  // -1: no token (unfinished chunk, or masked row)
  FinishReason finish_reason;
  int32_t num_computed, total_len;
  int32_t masked;  // 1 if the row was finished or freed before the step
  int32_t reserved;
};
static_assert(sizeof(OutputEntry) == 32);

// Header of a slot in the output ring; entries follow at kOutputHeaderBytes. The device writes
// `sequence` last, so a host that sees step + 1 there sees the entries too.
struct OutputHeader {
  std::atomic<uint64_t> sequence;
  uint64_t step;
  int32_t num_entries;
  int32_t reserved;
};
constexpr uint32_t kOutputHeaderBytes = 64;
static_assert(sizeof(OutputHeader) <= kOutputHeaderBytes);

MRV1_HD OutputEntry* output_entries(OutputHeader* slot) {
  return reinterpret_cast<OutputEntry*>(reinterpret_cast<char*>(slot) + kOutputHeaderBytes);
}

// The end of a step for one row: num_computed += query_len; a sampled token joins the history and
// the stop decision is made. An unfinished prefill chunk yields no token.
MRV1_HD OutputEntry advance_row(const RowState& state, const BatchEntry& entry, int32_t query_len,
                                int32_t sampled) {
  Row& row = state.rows[entry.row];
  if (is_masked(entry, row)) {
    return OutputEntry{entry.row, entry.generation, kNoToken, FinishReason::kNone, 0, 0, 1, 0};
  }
  row.num_computed += query_len;
  if (row.num_computed < row.total_len) {
    row.phase = RowPhase::kExtend;
    return OutputEntry{entry.row,        entry.generation, kNoToken, FinishReason::kNone,
                       row.num_computed, row.total_len,    0,        0};
  }
  row.phase = RowPhase::kDecode;
  if (sampled == kErrorToken) {
    row.finish_reason = FinishReason::kError;
    row.phase = RowPhase::kFinished;
  } else if (sampled >= 0) {
    state.tokens[int64_t{entry.row} * state.max_model_len + row.total_len] = sampled;
    row.total_len += 1;
    row.last_token = sampled;
    const SamplingRow& sampling = state.sampling[entry.row];
    if (row.total_len > row.min_total_len) {
      for (int32_t i = 0; i < sampling.stop_count; ++i) {
        if (state.stop_ids[sampling.stop_offset + i] == sampled) {
          row.finish_reason = FinishReason::kStop;
        }
      }
    }
    if (row.finish_reason == FinishReason::kNone && row.total_len >= row.max_total_len) {
      row.finish_reason = FinishReason::kLength;
    }
    if (row.finish_reason != FinishReason::kNone) {
      row.phase = RowPhase::kFinished;
    }
  }
  return OutputEntry{entry.row,
                     entry.generation,
                     sampled >= 0 ? sampled : kNoToken,
                     row.finish_reason,
                     row.num_computed,
                     row.total_len,
                     0,
                     0};
}

// Advances every row of the batch and writes the output slot, its sequence number last.
void advance_cpu(const ControlHeader& record, const RowState& state, const InferParams& infer,
                 OutputHeader* slot, const StepContext& ctx);
void advance_cuda(const ControlHeader& record, const RowState& state, const InferParams& infer,
                  OutputHeader* slot, const StepContext& ctx);

}  // namespace mrv1
