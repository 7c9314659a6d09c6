// Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
//
// As entries keep their order inside a class, one scan over the entries gives everything: how many
// entries, tokens and logits rows of each class stand before an entry. Its place in the batch is
// then the sum of what the classes before its own hold and what its own holds before it.
// A thread takes a run of neighbouring entries, which is one entry up to 1,024 requests. Tokens of
// entries with a single one, decode rows above all, are written by the entry's thread, which asks
// for them before the scan; those of longer ones by all threads, each token finding its entry by
// binary search. A decode row with drafts is an entry of several tokens, as many as propose()
// found; everything after the loads below sees the lengths that are live. Many tokens, or more
// requests than threads, get a second kernel of many blocks.
#include "block.cuh"
#include "launch.h"
#include "staged_record.h"
#include "state/infer_params.h"

namespace mrv1 {
namespace {

constexpr std::string_view kOp = "infer_params";
constexpr int kThreads = 1024;
constexpr int kWarps = kThreads / cuda::kWarpSize;
constexpr int kClasses = 3;
// Up to so many tokens, one block fills them.
constexpr int32_t kMaxTokensAlone = 4096;
constexpr int kTokenThreads = 256;

// Entries, logits rows and tokens by class; the first two in fields of 21 bits.
struct ClassSums {
  uint64_t entries, logits;
  int32_t tokens[kClasses];

  __device__ void add(const ClassSums& other) {
    entries += other.entries;
    logits += other.logits;
    for (int c = 0; c < kClasses; ++c) tokens[c] += other.tokens[c];
  }
};

constexpr int kFieldBits = 21;

__device__ uint64_t field_unit(int32_t cls) { return uint64_t{1} << (cls * kFieldBits); }

__device__ int32_t field(uint64_t fields, int32_t cls) {
  return static_cast<int32_t>((fields >> (cls * kFieldBits)) & ((1u << kFieldBits) - 1));
}

// Sum of the fields of the classes before cls.
__device__ int32_t fields_before(uint64_t fields, int32_t cls) {
  int32_t sum = 0;
  for (int c = 0; c < kClasses; ++c) sum += c < cls ? field(fields, c) : 0;
  return sum;
}

__device__ ClassSums shuffle_up(const ClassSums& sums, int offset) {
  ClassSums before;
  before.entries = __shfl_up_sync(cuda::kFullWarp, sums.entries, offset);
  before.logits = __shfl_up_sync(cuda::kFullWarp, sums.logits, offset);
  for (int c = 0; c < kClasses; ++c) {
    before.tokens[c] = __shfl_up_sync(cuda::kFullWarp, sums.tokens[c], offset);
  }
  return before;
}

// The sums over lanes up to this one.
__device__ void warp_inclusive_scan(ClassSums& sums) {
  const int lane = threadIdx.x % cuda::kWarpSize;
#pragma unroll
  for (int offset = 1; offset < cuda::kWarpSize; offset *= 2) {
    const ClassSums before = shuffle_up(sums, offset);
    if (lane >= offset) sums.add(before);
  }
}

// The sums over threads before this one, and over all.
__device__ ClassSums block_exclusive_scan(const ClassSums& own, ClassSums* total) {
  __shared__ ClassSums warp_sums[kWarps];
  static_assert(kWarps == cuda::kWarpSize);
  const int lane = threadIdx.x % cuda::kWarpSize;
  const int warp = threadIdx.x / cuda::kWarpSize;
  ClassSums inclusive = own;
  warp_inclusive_scan(inclusive);
  if (lane == cuda::kWarpSize - 1) warp_sums[warp] = inclusive;
  __syncthreads();
  if (warp == 0) {
    ClassSums sums = warp_sums[lane];
    warp_inclusive_scan(sums);
    warp_sums[lane] = sums;
  }
  __syncthreads();
  *total = warp_sums[kWarps - 1];
  ClassSums before = inclusive;
  before.entries -= own.entries;
  before.logits -= own.logits;
  for (int c = 0; c < kClasses; ++c) before.tokens[c] -= own.tokens[c];
  if (warp > 0) before.add(warp_sums[warp - 1]);
  return before;
}

// The last of num_requests batch positions whose tokens start at or before `token`.
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

// What a token of a live row gets; `row` -1 means padding or a masked row.
__device__ void write_token(const RowState& state, const InferParams& out, int32_t token,
                            int32_t batch, int32_t row, int32_t position) {
  const bool live = row >= 0;
  out.token_batch[token] = live ? batch : -1;
  out.positions[token] = live ? position : 0;
  out.token_ids[token] = live ? state.tokens[int64_t{row} * state.max_model_len + position] : 0;
  for (int32_t group = 0; group < state.num_groups; ++group) {
    out.slot_mapping[int64_t{group} * out.max_tokens + token] =
        live ? token_slot(state, group, row, position) : -1;
  }
}

// An entry and what this kernel needs of its row.
struct EntryState {
  BatchEntry entry;
  int32_t cls;
  int32_t row;      // -1 if masked
  int32_t context;  // 0 if masked
};

__device__ BatchEntry load_entry(const BatchEntry* entries, int32_t index) {
  const int4 words = reinterpret_cast<const int4*>(entries)[index];
  return BatchEntry{words.x, words.y, words.z, words.w};
}

__device__ EntryState load_state(BatchEntry entry, const RowState& state) {
  const Row& row = state.rows[entry.row];
  const int32_t num_computed = row.num_computed;  // asked for together with the rest
  const int32_t num_drafts = row.num_drafts;
  const bool masked = is_masked(entry, row);
  const int32_t num_tokens = live_tokens(entry, masked ? 0 : num_drafts);
  entry.samples = live_samples(entry, masked ? 0 : num_drafts);
  entry.num_tokens = num_tokens;
  return EntryState{entry, batch_class(row), masked ? -1 : entry.row, masked ? 0 : num_computed};
}

// Batch and logits arrays; tokens too if fill_tokens, which takes no more requests than threads.
__global__ void __launch_bounds__(kThreads)
    infer_params_kernel(const cuda::StagedRecord* staged, RowState state, InferParams out,
                        StepSizes sizes, bool fill_tokens) {
  // By batch position: token starts, rows, and what to add to a token's index for its position.
  __shared__ int32_t starts[kThreads + 1];
  __shared__ int32_t rows[kThreads];
  __shared__ int32_t shifts[kThreads];
  cuda::launch_next();
  cuda::wait_for_previous();
  const int32_t thread = threadIdx.x;
  const BatchEntry* entries = cuda::staged_entries(staged);
  // With one entry a thread, it need not wait for the header.
  BatchEntry own{};
  if (thread < sizes.num_requests) own = load_entry(entries, thread);
  const int32_t num_requests = staged->header.num_entries;
  const int32_t run = (num_requests + kThreads - 1) / kThreads;
  const int32_t begin = min(thread * run, num_requests);
  const int32_t end = min(begin + run, num_requests);

  ClassSums sums{};
  EntryState first{};
  int32_t token_id = 0;
  int32_t slot = -1;
  for (int32_t i = begin; i < end; ++i) {
    const EntryState at = load_state(run == 1 ? own : load_entry(entries, i), state);
    if (i == begin) first = at;
    sums.entries += field_unit(at.cls);
    sums.logits += at.entry.samples * field_unit(at.cls);
    for (int c = 0; c < kClasses; ++c) sums.tokens[c] += c == at.cls ? at.entry.num_tokens : 0;
  }
  const bool writes_own = fill_tokens && begin < end && first.entry.num_tokens == 1;
  if (writes_own && first.row >= 0) {
    token_id = state.tokens[int64_t{first.row} * state.max_model_len + first.context];
    slot = token_slot(state, 0, first.row, first.context);
  }
  if (out.row_lengths != nullptr) {
    for (int64_t i = thread; i < int64_t{3} * state.num_rows; i += kThreads) out.row_lengths[i] = 0;
  }

  ClassSums total;
  ClassSums next = block_exclusive_scan(sums, &total);  // its barriers also end the zeroing
  const int32_t num_tokens = total.tokens[0] + total.tokens[1] + total.tokens[2];
  const int32_t num_logits = fields_before(total.logits, kClasses);
  for (int32_t i = begin; i < end; ++i) {
    const EntryState at = i == begin ? first : load_state(load_entry(entries, i), state);
    const int32_t length = at.entry.num_tokens;
    const int32_t batch = fields_before(total.entries, at.cls) + field(next.entries, at.cls);
    int32_t start = 0;
    for (int c = 0; c < kClasses; ++c) {
      start += c < at.cls ? total.tokens[c] : c == at.cls ? next.tokens[c] : 0;
    }
    out.entry_batch[i] = batch;
    out.row[batch] = at.row;
    out.query_start_loc[batch] = start;
    out.seq_lens[batch] = at.row < 0 ? 0 : at.context + length;
    if (fill_tokens) {
      starts[batch] = start;
      rows[batch] = at.row;
      shifts[batch] = at.context - start;
    }
    if (out.row_lengths != nullptr && at.row >= 0) {
      out.row_lengths[at.row] = at.cls == 0 ? 0 : length;
      out.row_lengths[state.num_rows + at.row] = at.context;
      out.row_lengths[2 * state.num_rows + at.row] = length;
    }
    const int32_t samples = at.entry.samples;
    const int32_t logits = fields_before(total.logits, at.cls) + field(next.logits, at.cls);
    out.logits_start[batch] = samples > 0 ? logits : -1;
    for (int32_t place = 0; place < samples; ++place) {
      out.logits_indices[logits + place] = start + length - samples + place;
      out.logits_batch[logits + place] = at.row < 0 ? -1 : batch;
      out.logits_place[logits + place] = place;
      out.logits_entry[logits + place] = i;
    }
    next.logits += samples * field_unit(at.cls);
    if (writes_own) {
      out.token_batch[start] = at.row < 0 ? -1 : batch;
      out.positions[start] = at.context;
      out.token_ids[start] = token_id;
      out.slot_mapping[start] = slot;
      for (int32_t group = 1; group < state.num_groups; ++group) {
        out.slot_mapping[int64_t{group} * out.max_tokens + start] =
            at.row < 0 ? -1 : token_slot(state, group, at.row, at.context);
      }
    }
    next.entries += field_unit(at.cls);
    for (int c = 0; c < kClasses; ++c) next.tokens[c] += c == at.cls ? length : 0;
  }
  if (thread == 0) {
    *out.counts = InferCounts{num_requests,
                              num_tokens,
                              num_logits,
                              field(total.entries, 0),
                              field(total.entries, 1),
                              field(total.entries, 2)};
  }

  // Padding.
  for (int32_t batch = num_requests + thread; batch <= sizes.num_requests; batch += kThreads) {
    out.query_start_loc[batch] = num_tokens;
    if (batch == sizes.num_requests) break;  // starts have one element more
    out.row[batch] = -1;
    out.seq_lens[batch] = 0;
    out.logits_start[batch] = -1;
  }
  for (int32_t i = num_logits + thread; i < sizes.num_logits; i += kThreads) {
    out.logits_indices[i] = 0;
    out.logits_batch[i] = -1;
    out.logits_place[i] = 0;
    out.logits_entry[i] = -1;
  }
  if (!fill_tokens) return;
  for (int32_t i = num_tokens + thread; i < sizes.num_tokens; i += kThreads) {
    write_token(state, out, i, -1, -1, 0);
  }

  if (num_tokens == num_requests) return;  // every entry has written its one token
  if (thread == 0) starts[num_requests] = num_tokens;
  __syncthreads();
  for (int32_t i = thread; i < num_tokens; i += kThreads) {
    const int32_t batch = find_batch(starts, num_requests, i);
    if (starts[batch + 1] - starts[batch] == 1) continue;
    write_token(state, out, i, batch, rows[batch], i + shifts[batch]);
  }
}

// The token arrays from the batch arrays, a token a thread.
__global__ void __launch_bounds__(kTokenThreads)
    infer_tokens_kernel(RowState state, InferParams out, int32_t padded_tokens) {
  cuda::launch_next();
  cuda::wait_for_previous();
  const int32_t i = blockIdx.x * kTokenThreads + threadIdx.x;
  if (i >= padded_tokens) return;
  int32_t batch = -1;
  int32_t row = -1;
  int32_t position = 0;
  if (i < out.counts->num_tokens) {
    batch = find_batch(out.query_start_loc, out.counts->num_requests, i);
    row = out.row[batch];
    // The last token of the batch position stands at seq_len - 1.
    position = out.seq_lens[batch] - (out.query_start_loc[batch + 1] - i);
  }
  write_token(state, out, i, batch, row, position);
}

}  // namespace

void infer_params_cuda(const StepContext& ctx) {
  const StepSizes& sizes = ctx.sizes;
  const InferParams& out = ctx.infer;
  check_internal(sizes.num_requests <= out.max_requests, kOp, sizes.num_requests,
                 " padded requests exceed the room for ", out.max_requests);
  check_internal(sizes.num_tokens <= out.max_tokens, kOp, sizes.num_tokens,
                 " padded tokens exceed the room for ", out.max_tokens);
  check_internal(sizes.num_logits <= out.max_logits, kOp, sizes.num_logits,
                 " padded logits rows exceed the room for ", out.max_logits);
  const auto* staged = reinterpret_cast<const cuda::StagedRecord*>(ctx.rings.staged);
  const bool alone = sizes.num_requests <= kThreads && sizes.num_tokens <= kMaxTokensAlone;
  cuda::launch(kOp, ctx, infer_params_kernel, 1, kThreads, 0, staged, ctx.rows, out, sizes, alone);
  if (alone || sizes.num_tokens == 0) return;
  const auto blocks = static_cast<unsigned>((sizes.num_tokens + kTokenThreads - 1) / kTokenThreads);
  cuda::launch(kOp, ctx, infer_tokens_kernel, blocks, kTokenThreads, 0, ctx.rows, out,
               sizes.num_tokens);
}

}  // namespace mrv1
