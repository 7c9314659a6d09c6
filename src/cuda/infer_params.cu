// Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
//
// One block does the whole job in three phases over shared prefix sums. Entries are sorted by class
// (a counting sort, stable because each thread takes a contiguous run of entries), then the batch
// in its new order gets its token and logits starts, then all threads fill the token arrays, each
// token finding its batch position by binary search in query_start_loc.
#include "block.cuh"
#include "check.h"
#include "state/infer_params.h"

namespace mrv1 {
namespace {

constexpr std::string_view kOp = "infer_params";
constexpr int kThreads = 512;
constexpr int kClasses = 3;

// The last batch position whose tokens start at or before `token`; token < starts[num_requests].
__device__ int32_t find_batch(const int32_t* starts, int32_t num_requests, int32_t token) {
  int32_t low = 0;
  int32_t high = num_requests;  // starts[low] <= token < starts[high]
  while (high - low > 1) {
    const int32_t middle = low + (high - low) / 2;
    if (starts[middle] <= token) {
      low = middle;
    } else {
      high = middle;
    }
  }
  return low;
}

__global__ void __launch_bounds__(kThreads)
    infer_params_kernel(const ControlHeader* record, RowState state, InferParams out) {
  const int thread = threadIdx.x;
  const int32_t num_requests = record->num_entries;
  const int32_t run = (num_requests + kThreads - 1) / kThreads;
  const int32_t begin = min(thread * run, num_requests);
  const int32_t end = min(begin + run, num_requests);
  const BatchEntry* entries = record_array<BatchEntry>(record, record->entries_offset);

  // Entry -> batch position.
  int32_t next[kClasses] = {};
  for (int32_t i = begin; i < end; ++i) {
    const int32_t cls = batch_class(state.rows[entries[i].row]);
    for (int c = 0; c < kClasses; ++c) next[c] += cls == c;
  }
  int32_t class_count[kClasses];
  int32_t class_start = 0;
  for (int c = 0; c < kClasses; ++c) {
    next[c] = class_start + cuda::block_exclusive_scan<kThreads>(next[c], &class_count[c]);
    class_start += class_count[c];
  }
  for (int32_t i = begin; i < end; ++i) {
    const int32_t cls = batch_class(state.rows[entries[i].row]);
    int32_t batch = 0;
    for (int c = 0; c < kClasses; ++c) {
      if (cls == c) batch = next[c]++;
    }
    out.entry_batch[i] = batch;
    out.row[batch] = i;  // the entry for now
  }
  if (out.row_lengths != nullptr) {
    for (int64_t i = thread; i < int64_t{3} * state.num_rows; i += kThreads) out.row_lengths[i] = 0;
  }
  __syncthreads();

  // Batch position -> row, starts and logits rows.
  int32_t token = 0;
  int32_t logits = 0;
  for (int32_t batch = begin; batch < end; ++batch) {
    const BatchEntry& entry = entries[out.row[batch]];
    token += entry.num_tokens;
    logits += entry.samples != 0;
  }
  int32_t num_tokens;
  int32_t num_logits;
  token = cuda::block_exclusive_scan<kThreads>(token, &num_tokens);
  logits = cuda::block_exclusive_scan<kThreads>(logits, &num_logits);
  for (int32_t batch = begin; batch < end; ++batch) {
    const BatchEntry entry = entries[out.row[batch]];
    const Row& row = state.rows[entry.row];
    const bool masked = is_masked(entry, row);
    out.query_start_loc[batch] = token;
    out.row[batch] = masked ? -1 : entry.row;
    out.seq_lens[batch] = masked ? 0 : row.num_computed + entry.num_tokens;
    if (out.row_lengths != nullptr && !masked) {
      out.row_lengths[entry.row] = batch_class(row) == 0 ? 0 : entry.num_tokens;
      out.row_lengths[state.num_rows + entry.row] = row.num_computed;
      out.row_lengths[2 * state.num_rows + entry.row] = entry.num_tokens;
    }
    token += entry.num_tokens;
    if (entry.samples != 0) {
      out.logits_indices[logits] = token - 1;
      out.logits_batch[logits] = masked ? -1 : batch;
      ++logits;
    }
  }
  if (thread == 0) {
    *out.counts = InferCounts{num_requests,   num_tokens,     num_logits,
                              class_count[0], class_count[1], class_count[2]};
  }

  // Padding of the batch and of the logits rows.
  for (int32_t batch = num_requests + thread; batch <= record->padded_requests; batch += kThreads) {
    out.query_start_loc[batch] = num_tokens;
    if (batch == record->padded_requests) break;  // starts have one element more
    out.row[batch] = -1;
    out.seq_lens[batch] = 0;
  }
  for (int32_t i = num_logits + thread; i < record->padded_logits; i += kThreads) {
    out.logits_indices[i] = 0;
    out.logits_batch[i] = -1;
  }
  __syncthreads();

  // Tokens, padding included.
  for (int32_t i = thread; i < record->padded_tokens; i += kThreads) {
    int32_t batch = -1;
    int32_t row = -1;
    if (i < num_tokens) {
      batch = find_batch(out.query_start_loc, num_requests, i);
      row = out.row[batch];
    }
    const bool live = row >= 0;
    // The last token of the batch position stands at seq_len - 1.
    const int32_t position = live ? out.seq_lens[batch] - (out.query_start_loc[batch + 1] - i) : 0;
    out.token_batch[i] = live ? batch : -1;
    out.token_ids[i] = live ? state.tokens[int64_t{row} * state.max_model_len + position] : 0;
    out.positions[i] = position;
    for (int32_t group = 0; group < state.num_groups; ++group) {
      out.slot_mapping[int64_t{group} * out.max_tokens + i] =
          live ? token_slot(state, group, row, position) : -1;
    }
  }
}

}  // namespace

void infer_params_cuda(const ControlHeader& record, const RowState& state, const InferParams& out,
                       const StepContext& ctx) {
  check_internal(
      record.num_entries <= record.padded_requests && record.padded_requests <= out.max_requests,
      kOp, record.num_entries, " entries, ", record.padded_requests,
      " padded requests and room for ", out.max_requests, " must be in this order");
  check_internal(record.padded_tokens <= out.max_tokens, kOp, record.padded_tokens,
                 " padded tokens exceed the room for ", out.max_tokens);
  check_internal(record.padded_logits <= out.max_logits, kOp, record.padded_logits,
                 " padded logits rows exceed the room for ", out.max_logits);
  infer_params_kernel<<<1, kThreads, 0, cuda::stream_of(ctx)>>>(
      cuda::mapped_address(&record, kOp, "the control record"), state, out);
  cuda::check_launch(kOp);
}

}  // namespace mrv1
