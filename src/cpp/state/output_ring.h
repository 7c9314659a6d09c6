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
  uint64_t begin_ns, end_ns;  // device clock when apply() began and when advance() ended
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
  // A copy: the stores to the history below then make no compiler read the row again.
  Row row = state.rows[entry.row];
  const int32_t stop_offset = state.sampling[entry.row].stop_offset;
  const int32_t stop_count = state.sampling[entry.row].stop_count;
  if (is_masked(entry, row)) {
    return OutputEntry{entry.row, entry.generation, kNoToken, FinishReason::kNone, 0, 0, 1, 0};
  }
  OutputEntry out{entry.row, entry.generation, kNoToken, FinishReason::kNone, 0, 0, 0, 0};
  row.num_computed += query_len;
  if (row.num_computed < row.total_len) {
    row.phase = RowPhase::kExtend;
  } else {
    row.phase = RowPhase::kDecode;
    if (sampled == kErrorToken) {
      row.finish_reason = FinishReason::kError;
    } else if (sampled >= 0) {
      state.tokens[int64_t{entry.row} * state.max_model_len + row.total_len] = sampled;
      row.total_len += 1;
      row.last_token = sampled;
      if (row.total_len > row.min_total_len) {
        for (int32_t i = 0; i < stop_count; ++i) {
          if (state.stop_ids[stop_offset + i] == sampled) {
            row.finish_reason = FinishReason::kStop;
          }
        }
      }
      if (row.finish_reason == FinishReason::kNone && row.total_len >= row.max_total_len) {
        row.finish_reason = FinishReason::kLength;
      }
      out.token = sampled;
    }
    if (row.finish_reason != FinishReason::kNone) {
      row.phase = RowPhase::kFinished;
    }
    out.finish_reason = row.finish_reason;
  }
  out.num_computed = row.num_computed;
  out.total_len = row.total_len;
  state.rows[entry.row] = row;
  return out;
}

// Advances every row of the batch, writes the output slot, its sequence number last, and counts the
// step up.
void advance_cpu(const StepContext& ctx);
void advance_cuda(const StepContext& ctx);

}  // namespace mrv1
