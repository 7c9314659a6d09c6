// Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
//
// A stable counting sort of pairs by expert. Each block ranks its own pairs: a warp's by comparing
// them with each other, those of the warps before it by counts in shared memory, those of the
// blocks before it by counts that a kernel before has made, if there are several blocks. Nothing
// depends on the order in which threads run.
#include "block.cuh"
#include "launch.h"
#include "moe_schedule.h"
#include "ops/moe_route.h"

namespace mrv1::cuda {
namespace {

constexpr int kThreads = 1024;
constexpr int kWarps = kThreads / kWarpSize;
constexpr int kPerThread = kMoePairsPerBlock / kThreads;
static_assert(kMaxExperts <= kThreads, "a thread for each expert");

__global__ void __launch_bounds__(kThreads) count_kernel(MoeRows rows, MoeSchedule schedule) {
  extern __shared__ int32_t counts[];  // [num_experts]
  launch_next();
  for (int e = threadIdx.x; e < rows.num_experts; e += kThreads) counts[e] = 0;
  wait_for_previous();
  __syncthreads();
  const int32_t first = blockIdx.x * kMoePairsPerBlock;
  const int32_t pairs = moe_live_rows(rows) * rows.top_k;
  if (first >= pairs) return;
#pragma unroll
  for (int i = 0; i < kPerThread; ++i) {
    const int32_t pair = first + i * kThreads + threadIdx.x;
    const int32_t expert = pair < pairs ? moe_expert_of(rows, pair) : -1;
    if (expert >= 0) atomicAdd(&counts[expert], 1);
  }
  __syncthreads();
  int32_t* to = schedule.block_counts + int64_t{blockIdx.x} * rows.num_experts;
  for (int e = threadIdx.x; e < rows.num_experts; e += kThreads) to[e] = counts[e];
}

__global__ void __launch_bounds__(kThreads)
    place_kernel(MoeRows rows, MoeSchedule schedule, MoeCut cut) {
  extern __shared__ int32_t next_place[];  // [num_experts], then [warps][num_experts] of uint16_t
  uint16_t* before = reinterpret_cast<uint16_t*>(next_place + rows.num_experts);
  const int lane = threadIdx.x % kWarpSize;
  const int warp = threadIdx.x / kWarpSize;
  const int experts = rows.num_experts;
  launch_next();
  for (int e = threadIdx.x; e < experts; e += kThreads) next_place[e] = 0;
  wait_for_previous();
  __syncthreads();
  const int32_t first = blockIdx.x * kMoePairsPerBlock;
  const int32_t pairs = moe_live_rows(rows) * rows.top_k;
  if (blockIdx.x > 0 && first >= pairs) return;

  int32_t expert[kPerThread];
#pragma unroll
  for (int i = 0; i < kPerThread; ++i) {
    const int32_t pair = first + i * kThreads + threadIdx.x;
    expert[i] = pair < pairs ? moe_expert_of(rows, pair) : -1;
    if (gridDim.x == 1 && expert[i] >= 0) atomicAdd(&next_place[expert[i]], 1);
  }
  __syncthreads();
  // A thread for each expert: its pairs of all blocks, and of those before this one.
  int32_t total = 0;
  int32_t earlier = 0;
  if (static_cast<int>(threadIdx.x) < experts) {
    if (gridDim.x == 1) {
      total = next_place[threadIdx.x];
    } else {
      const int32_t blocks = (pairs + kMoePairsPerBlock - 1) / kMoePairsPerBlock;
      for (int32_t block = 0; block < blocks; ++block) {
        const int32_t count = schedule.block_counts[int64_t{block} * experts + threadIdx.x];
        if (block < static_cast<int32_t>(blockIdx.x)) earlier += count;
        total += count;
      }
    }
  }
  int32_t all;
  const int32_t begin = block_exclusive_scan<kThreads>(total, &all);
  if (static_cast<int>(threadIdx.x) < experts) next_place[threadIdx.x] = begin + earlier;
  if (blockIdx.x == 0) {
    const int32_t whole_rows = cut.tile_rows * cut.share;
    const int32_t groups = (total + whole_rows - 1) / whole_rows * cut.share;
    int32_t all_groups;
    int32_t group = block_exclusive_scan<kThreads>(groups, &all_groups);
    if (groups > 0) {
      // Even groups, of whole eights, as the rows beyond the last cost as much as rows.
      const int32_t rows_each = ((total + groups - 1) / groups + 7) / 8 * 8;
      for (int32_t at = 0; at < groups; ++at, ++group) {
        const int32_t from = min(at * rows_each, total);
        schedule.groups[group] = {static_cast<int32_t>(threadIdx.x), begin + from,
                                  min(rows_each, total - from), 0};
      }
    }
    if (threadIdx.x == 0) *schedule.num_groups = all_groups;
  }

#pragma unroll
  for (int i = 0; i < kPerThread; ++i) {
    const int32_t pair = first + i * kThreads + threadIdx.x;
    if (first + i * kThreads >= pairs) break;
    for (int at = threadIdx.x; at < kWarps * experts; at += kThreads) before[at] = 0;
    __syncthreads();
    const unsigned alike = __match_any_sync(kFullWarp, expert[i]);
    const int rank = __popc(alike & ((1u << lane) - 1));
    if (expert[i] >= 0 && rank == 0) {
      before[warp * experts + expert[i]] = static_cast<uint16_t>(__popc(alike));
    }
    __syncthreads();
    int32_t sum = 0;
    if (static_cast<int>(threadIdx.x) < experts) {
#pragma unroll 8
      for (int w = 0; w < kWarps; ++w) {
        uint16_t& count = before[w * experts + threadIdx.x];
        const int32_t add = count;
        count = static_cast<uint16_t>(sum);
        sum += add;
      }
    }
    __syncthreads();
    if (pair < pairs) {
      int32_t place = -1;
      if (expert[i] >= 0) {
        place = next_place[expert[i]] + before[warp * experts + expert[i]] + rank;
        schedule.row[place] = moe_row_at(rows, pair / rows.top_k);
      }
      schedule.place[pair] = place;
    }
    __syncthreads();
    if (static_cast<int>(threadIdx.x) < experts) next_place[threadIdx.x] += sum;
  }
}

}  // namespace

void moe_schedule(const MoeRows& rows, const MoeSchedule& schedule, const MoeCut& cut,
                  const StepContext& ctx) {
  const auto blocks =
      static_cast<unsigned>(moe_schedule_blocks(int64_t{rows.num_rows} * rows.top_k));
  const size_t counts = sizeof(int32_t) * rows.num_experts;
  if (blocks > 1) launch(kMoeOp, ctx, count_kernel, blocks, kThreads, counts, rows, schedule);
  const size_t shared_bytes = counts + sizeof(uint16_t) * kWarps * rows.num_experts;
  constexpr size_t kAlwaysAllowed = 48 * 1024;
  if (shared_bytes > kAlwaysAllowed) allow_shared_memory(kMoeOp, place_kernel, shared_bytes);
  launch(kMoeOp, ctx, place_kernel, blocks, kThreads, shared_bytes, rows, schedule, cut);
}

}  // namespace mrv1::cuda
