// Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
//
// A block for each logits row; those without penalties, and all but a row's first place, end at
// once. New tokens are entered a block's width at a time, in steps that depend on no order: every
// token claims a place of the index, those that found an empty one get an entry, and then all add
// their uses. A claim is the complement of the token, which is negative, as entries are not.
#include "launch.h"
#include "sampling/processors.h"

namespace mrv1 {
namespace {

constexpr std::string_view kOp = "count_tokens";
constexpr int kThreads = 512;

// The token's place: one that it has, or else one that was empty or that another thread has claimed
// for the same token. `is_new` if this thread has to make the entry.
__device__ int32_t claim_place(const PenaltyTable& table, int32_t token, bool& is_new) {
  is_new = false;
  for (int32_t place = table.first_place(token);; place = table.next_place(place)) {
    const int32_t found = atomicCAS(&table.index[place], 0, ~token);
    is_new = found == 0;
    if (found == 0 || found == ~token) return place;
    if (found > 0 && table.entries[found - 1].token == token) return place;
  }
}

__global__ void __launch_bounds__(kThreads) count_tokens_kernel(RowState state, InferParams infer) {
  __shared__ int32_t num_entries;
  cuda::launch_next();
  cuda::wait_for_previous();
  const int32_t batch = infer.logits_batch[blockIdx.x];
  const int32_t index = batch < 0 ? -1 : infer.row[batch];
  if (index < 0 || infer.logits_place[blockIdx.x] != 0) return;
  const Row& row = state.rows[index];
  const SamplingRow& sampling = state.sampling[index];
  if (!Penalties::applies(row, sampling)) return;
  const PenaltyTable table = PenaltyTable::of(sampling);
  const int32_t* history = state.tokens + int64_t{index} * state.max_model_len;
  const int32_t total_len = row.total_len;
  const int32_t num_counted = table.header->num_counted;
  if (threadIdx.x == 0) num_entries = table.header->num_entries;
  __syncthreads();
  for (int32_t first = num_counted; first < total_len; first += kThreads) {
    const int32_t position = first + static_cast<int32_t>(threadIdx.x);
    const bool is_live = position < total_len;
    const int32_t token = is_live ? history[position] : -1;
    bool is_new = false;
    const int32_t place = is_live ? claim_place(table, token, is_new) : -1;
    __syncthreads();
    if (is_new) {
      const int32_t entry = atomicAdd(&num_entries, 1);
      table.entries[entry] = PenaltyEntry{token, 0};
      table.index[place] = entry + 1;
    }
    __syncthreads();
    if (is_live) {
      // Prompt and outputs are bits apart, so that they may be added in any order.
      uint32_t* uses = &table.entries[table.index[place] - 1].uses;
      if (position < row.prompt_len) {
        atomicOr(uses, PenaltyEntry::kInPrompt);
      } else {
        atomicAdd(uses, 1u);
      }
    }
  }
  __syncthreads();
  if (threadIdx.x == 0) {
    table.header->num_entries = num_entries;
    table.header->num_counted = total_len;
  }
}

}  // namespace

void count_tokens_cuda(const StepContext& ctx) {
  if (ctx.sizes.num_logits == 0) return;
  cuda::launch(kOp, ctx, count_tokens_kernel, ctx.sizes.num_logits, kThreads, 0, ctx.rows,
               ctx.infer);
}

}  // namespace mrv1
