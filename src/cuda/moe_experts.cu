// Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
//
// Rows are sorted by expert on the device, each expert multiplies its own, and their weighted sums
// are gathered by row. A step of more pairs of a row and an expert than the workspace holds takes
// several passes.
#include "moe_experts.h"

#include <algorithm>
#include <type_traits>

#include "block.cuh"
#include "launch.h"
#include "linear_skinny_kernels.h"
#include "moe_schedule.h"
#include "ops/moe_route.h"
#include "vector.cuh"

namespace mrv1 {
namespace cuda {
namespace {

// Pairs of a pass at most: beyond, experts have rows enough to be worth reading again.
constexpr int64_t kMaxPassPairs = int64_t{1} << 17;
constexpr int kSumThreads = 256;
constexpr int64_t kMaxSumBlocks = 2048;
constexpr int kAtOnce = 8;  // choices whose loads are in flight together
constexpr int64_t kAlignment = 128;
constexpr int64_t kRestAlignment = 256;

// The cuts of those that kernels ask for that make most groups.
constexpr MoeCut kFinestCuts[] = {{.tile_rows = 16, .share = 2}, {.tile_rows = 8}};

// The scratch of a pass.
struct PassMemory {
  MoeSchedule schedule;
  void* inner;   // [pairs, intermediate] of dtype: activation(gate) * up, by place
  void* result;  // [pairs, hidden] of dtype: what comes of down, by place
  // The rest of the workspace.
  void* rest;
  int64_t rest_bytes;
};

// Lays the scratch out from `base` on; returns how many bytes it takes.
int64_t place_memory(PassMemory& memory, char* base, int64_t pairs, int64_t experts,
                     int64_t inner_bytes, int64_t result_bytes) {
  int64_t used = 0;
  const auto take = [&](auto*& part, int64_t bytes) {
    part = reinterpret_cast<std::remove_reference_t<decltype(part)>>(base + used);
    used += (bytes + kAlignment - 1) / kAlignment * kAlignment;
  };
  take(memory.schedule.place, pairs * 4);
  take(memory.schedule.row, pairs * 4);
  int64_t groups = 0;
  for (const MoeCut& cut : kFinestCuts) {
    groups = std::max(groups, moe_max_groups(pairs, experts, cut));
  }
  take(memory.schedule.groups, groups * static_cast<int64_t>(sizeof(MoeGroup)));
  take(memory.schedule.num_groups, 4);
  take(memory.schedule.block_counts, moe_schedule_blocks(pairs) * experts * 4);
  take(memory.inner, pairs * inner_bytes);
  take(memory.result, pairs * result_bytes);
  return used;
}

// The choices of a row, and of all ranks' experts how many there are.
struct RowChoices {
  int32_t top_k, num_experts;
  const int32_t* experts;
  const int32_t* place;
  const float* weights;
};

// kCount columns of a row, as they lie in memory: so more of them are in flight.
template <typename T, int kCount>
struct Columns {
  static constexpr int kSize = kVectorSize<T>;
  uint4 words[kCount / kSize];
  __device__ __forceinline__ void load(const T* from) {
#pragma unroll
    for (int i = 0; i < kCount / kSize; ++i) words[i] = load_vector(from, i);
  }
  __device__ __forceinline__ void add_to(float (&sums)[kCount], float factor) const {
#pragma unroll
    for (int i = 0; i < kCount / kSize; ++i) {
      float values[kSize];
      unpack(words[i], values);
#pragma unroll
      for (int c = 0; c < kSize; ++c) {
        sums[i * kSize + c] = fmaf(factor, values[c], sums[i * kSize + c]);
      }
    }
  }
};
template <typename T>
struct Columns<T, 1> {
  T value;
  __device__ __forceinline__ void load(const T* from) { value = *from; }
  __device__ __forceinline__ void add_to(float (&sums)[1], float factor) const {
    sums[0] = fmaf(factor, to_float(value), sums[0]);
  }
};

// kCount columns of the sum over a row's choices, in their order, of each of kGroups groups of
// experts by itself.
template <typename T, typename Out, int kCount, int kGroups>
__device__ __forceinline__ void sum_row(const RowChoices& choices, const T* result, int32_t hidden,
                                        Out* out) {
  float sums[kGroups][kCount] = {};
  for (int first = 0; first < choices.top_k; first += kAtOnce) {
    Columns<T, kCount> values[kAtOnce];
    float factor[kAtOnce];
    bool here[kAtOnce];
    int32_t group[kAtOnce] = {};
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      const int j = first + i;
      const int32_t at = j < choices.top_k ? choices.place[j] : -1;
      here[i] = at >= 0;
      factor[i] = here[i] ? choices.weights[j] : 0.0f;
      if (!here[i]) continue;
      if constexpr (kGroups > 1) group[i] = choices.experts[j] * kGroups / choices.num_experts;
      values[i].load(result + int64_t{at} * hidden);
    }
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      if (!here[i]) continue;
#pragma unroll
      for (int g = 0; g < kGroups; ++g) {
        if (group[i] == g) values[i].add_to(sums[g], factor[i]);
      }
    }
  }
#pragma unroll
  for (int step = 1; step < kGroups; step *= 2) {
#pragma unroll
    for (int g = 0; g < kGroups; g += 2 * step) {
#pragma unroll
      for (int c = 0; c < kCount; ++c) sums[g][c] += sums[g + step][c];
    }
  }
  if constexpr (kCount == 1) {
    *out = from_float<Out>(sums[0][0]);
  } else {
    store_values(out, sums[0]);
  }
}

// out[row] for every row of the pass. A thread has kCount columns. Without `place` the block finds
// the places of few pairs.
template <typename T, typename Out, int kCount, int kGroups>
__global__ void __launch_bounds__(kSumThreads)
    sum_kernel(MoeRows rows, int32_t all_experts, const int32_t* place, const float* weights,
               const T* result, Out* out, int32_t hidden) {
  __shared__ MoeFewPairs few;
  launch_next();
  // Choices are older than the kernel before this one, which says so by weights_first.
  if (place == nullptr && threadIdx.x < kWarpSize) moe_schedule_few(rows, &few);
  wait_for_previous();
  if (place == nullptr) {
    __syncthreads();
    place = few.place;
  }
  const int32_t col = (blockIdx.y * kSumThreads + threadIdx.x) * kCount;
  if (col >= hidden) return;
  const int32_t live = moe_live_rows(rows);
  for (int32_t number = blockIdx.x; number < live; number += gridDim.x) {
    const int32_t row = moe_row_at(rows, number);
    const int64_t first = int64_t{row} * rows.top_k;
    const RowChoices choices{rows.top_k, all_experts, rows.experts + first,
                             place + int64_t{number} * rows.top_k, weights + first};
    sum_row<T, Out, kCount, kGroups>(choices, result + col, hidden,
                                     out + int64_t{row} * hidden + col);
  }
}

template <typename T, typename Out>
void sum_rows(const MoeExpertsParams& params, const MoeRows& rows, const PassMemory& memory,
              bool few, const StepContext& ctx) {
  constexpr int kWide = 8;
  const int64_t hidden = params.hidden();
  const bool wide = hidden % kWide == 0 && is_vector_aligned(params.out);
  const int64_t threads = wide ? hidden / kWide : hidden;
  // Of regions most rows may not count.
  const dim3 grid(static_cast<unsigned>(std::min<int64_t>(rows.num_rows, kMaxSumBlocks)),
                  static_cast<unsigned>((threads + kSumThreads - 1) / kSumThreads));
  const auto run = [&](auto* kernel) {
    launch(kMoeOp, ctx, kernel, grid, kSumThreads, 0, rows, params.num_experts,
           few ? nullptr : memory.schedule.place, params.weights,
           static_cast<const T*>(memory.result), static_cast<Out*>(params.out),
           static_cast<int32_t>(hidden));
  };
  if (params.sum_groups(ctx) > 1) {
    run(wide ? sum_kernel<T, Out, kWide, kInvariantParts> : sum_kernel<T, Out, 1, kInvariantParts>);
  } else {
    run(wide ? sum_kernel<T, Out, kWide, 1> : sum_kernel<T, Out, 1, 1>);
  }
}

void sum_rows_of(const MoeExpertsParams& params, const MoeRows& rows, const PassMemory& memory,
                 bool few, const StepContext& ctx) {
  dispatch_activation(params.dtype, kMoeOp, [&](auto tag) {
    using T = typename decltype(tag)::type;
    if (params.out_dtype == params.dtype) {
      sum_rows<T, T>(params, rows, memory, few, ctx);
    } else {
      sum_rows<T, float>(params, rows, memory, few, ctx);
    }
  });
}

void check_params(const MoeExpertsParams& params) {
  const WeightView& gate_up = params.gate_up;
  const WeightView& down = params.down;
  check(gate_up.matrices > 0 && gate_up.matrices <= kMaxExperts &&
            gate_up.matrices == down.matrices && gate_up.rows % gate_up.matrices == 0 &&
            down.rows % down.matrices == 0,
        kMoeOp, "gate_up has ", gate_up.matrices, " matrices and down ", down.matrices,
        ", must be as many, from 1 to ", kMaxExperts);
  check(gate_up.cols == params.hidden() &&
            gate_up.rows == 2 * gate_up.matrices * params.intermediate() && params.hidden() > 0 &&
            params.intermediate() > 0 && gate_up.rows / gate_up.matrices <= INT32_MAX &&
            params.hidden() <= INT32_MAX,
        kMoeOp, "matrices of gate_up are [", gate_up.rows / gate_up.matrices, ", ", gate_up.cols,
        "], must be [", 2 * params.intermediate(), ", ", params.hidden(), "] for down's of [",
        params.hidden(), ", ", params.intermediate(), "]");
  const bool fp4 = gate_up.dtype == DType::kE2M1;
  const WeightLayout layout = fp4 ? WeightLayout::kTile16 : WeightLayout::kRowMajor;
  check(gate_up.layout == layout && down.layout == layout, kMoeOp, "weights must be ",
        fp4 ? "in tiles in NVFP4" : "row-major", " on CUDA");
  check((fp4 || gate_up.dtype == params.dtype) && down.dtype == gate_up.dtype, kMoeOp,
        "gate_up is ", dtype_name(gate_up.dtype), ", down ", dtype_name(down.dtype), " and x ",
        dtype_name(params.dtype), ", must be equal");
  check(params.out_dtype == params.dtype || params.out_dtype == DType::kF32, kMoeOp,
        "out dtype is ", dtype_name(params.out_dtype), ", must be float32 or ",
        dtype_name(params.dtype));
  check(params.top_k > 0 && params.top_k <= kMaxExperts, kMoeOp, "top_k is ", params.top_k,
        ", must be in [1, ", kMaxExperts, "]");
  check(params.activation != Activation::kNone, kMoeOp, "there is no activation");
}

void run_pass(const MoeExpertsParams& params, const MoeRows& rows, const PassMemory& memory,
              const StepContext& ctx) {
  const int64_t pairs = int64_t{rows.num_rows} * rows.top_k;
  MoeProduct gate_up{.x = params.x,
                     .sorted = false,
                     .weight = params.gate_up,
                     .out = memory.inner,
                     .dtype = params.dtype,
                     .activation = params.activation,
                     .rows = rows,
                     .schedule = memory.schedule};
  MoeProduct down = gate_up;
  down.x = memory.inner;
  down.sorted = true;
  down.weight = params.down;
  down.out = memory.result;
  down.activation = Activation::kNone;
  const bool wgmma = moe_wgmma_supports(gate_up) && moe_wgmma_supports(down);
  const bool fp4 = moe_fp4_supports(gate_up) && moe_fp4_supports(down);
  // How many rows of regions count is not known; ranks that have as many tokens as this one and
  // choose evenly send each other as many.
  const int64_t likely_rows =
      params.regions > 0 ? std::min<int64_t>(ctx.sizes.num_tokens, rows.num_rows) : rows.num_rows;
  const bool few = (wgmma || fp4) && pairs <= kMoeFewPairs;
  const int64_t cut_rows = few ? rows.num_rows : likely_rows;  // groups of few are not cut again
  // Copies of NVFP4 weights, where they are bfloat16 products that moe_wgmma takes.
  const int64_t copy_bytes =
      moe_fp4_copy_bytes(params.gate_up.rows * params.gate_up.cols, rows.num_experts, pairs);
  const bool copied = fp4 && !ctx.batch_invariant &&
                      moe_fp4_copies(likely_rows, rows.top_k, rows.num_experts) &&
                      device_limits().wgmma && params.intermediate() % 8 == 0 &&
                      params.hidden() % 8 == 0 && copy_bytes <= memory.rest_bytes;
  MoeCut cut{.tile_rows = kMoeTiledRows};
  if (wgmma || copied) cut = moe_wgmma_cut(cut_rows, rows.top_k, rows.num_experts);
  if (fp4 && !copied) cut = moe_fp4_cut(cut_rows, rows.top_k, rows.num_experts);
  gate_up.max_groups = down.max_groups = moe_max_groups(pairs, rows.num_experts, cut);
  gate_up.few = down.few = few;
  if (!few) moe_schedule(rows, memory.schedule, cut, ctx);
  if (wgmma) {
    moe_wgmma(gate_up, cut, /*weights_first=*/false, ctx);
    if (pairs <= kMoeDownFewPairs && params.sum_groups(ctx) == 1) {
      return moe_down_few(down, params.weights, params.out, params.out_dtype, ctx);
    }
    moe_wgmma(down, cut, /*weights_first=*/true, ctx);
  } else if (copied) {
    moe_fp4_copied(gate_up, cut, memory.rest, copy_bytes, ctx);
    moe_fp4_copied(down, cut, memory.rest, copy_bytes, ctx);
  } else if (fp4) {
    moe_fp4(gate_up, cut, /*follows=*/false, ctx);
    moe_fp4(down, cut, /*follows=*/true, ctx);
  } else {
    moe_tiled(gate_up, ctx);
    moe_tiled(down, ctx);
  }
  sum_rows_of(params, rows, memory, few, ctx);
}

}  // namespace
}  // namespace cuda

int64_t moe_experts_workspace_cuda(const WorkspaceLimits& limits) {
  if (limits.moe_rows == 0) return 0;
  cuda::PassMemory memory{};
  const int64_t pairs = std::min(limits.moe_rows, cuda::kMaxPassPairs);
  return cuda::place_memory(memory, nullptr, pairs, limits.moe_experts,
                            limits.moe_intermediate * limits.moe_element_bytes,
                            limits.moe_hidden * limits.moe_element_bytes) +
         cuda::kRestAlignment +
         cuda::moe_fp4_copy_bytes(limits.moe_fp4_elements, limits.moe_experts, pairs);
}

void moe_experts_cuda(const MoeExpertsParams& params, const StepContext& ctx) {
  using cuda::kMoeOp;
  cuda::check_params(params);
  const int64_t all_rows = params.num_rows(ctx);
  if (all_rows == 0) return;
  check(all_rows * params.top_k <= kMaxExpertPairs, kMoeOp, all_rows, " rows of ", params.top_k,
        " choices, at most ", kMaxExpertPairs, " choices are possible");
  const auto size = static_cast<int64_t>(dtype_size(params.dtype));
  const int64_t pass_rows =
      std::min(all_rows, std::max<int64_t>(cuda::kMaxPassPairs / params.top_k, 1));
  cuda::PassMemory memory{};
  const int64_t used = cuda::place_memory(memory, static_cast<char*>(ctx.workspace),
                                          pass_rows * params.top_k, params.gate_up.matrices,
                                          params.intermediate() * size, params.hidden() * size);
  check_internal(used <= static_cast<int64_t>(ctx.workspace_bytes), kMoeOp, "workspace has ",
                 ctx.workspace_bytes, " bytes, of which ", used, " are needed");
  const int64_t rest =
      (used + cuda::kRestAlignment - 1) / cuda::kRestAlignment * cuda::kRestAlignment;
  memory.rest = static_cast<char*>(ctx.workspace) + rest;
  memory.rest_bytes = static_cast<int64_t>(ctx.workspace_bytes) - rest;
  cuda::MoeRows rows{.experts = params.experts,
                     .counts = params.regions > 0 ? params.counts : nullptr,
                     .regions = params.regions,
                     .region_rows = static_cast<int32_t>(params.region_rows),
                     .top_k = params.top_k,
                     .first_expert = params.first_expert,
                     .num_experts = static_cast<int32_t>(params.gate_up.matrices)};
  for (int64_t first = 0; first < all_rows; first += pass_rows) {
    rows.first_row = static_cast<int32_t>(first);
    rows.num_rows = static_cast<int32_t>(std::min(pass_rows, all_rows - first));
    cuda::run_pass(params, rows, memory, ctx);
  }
}

}  // namespace mrv1
