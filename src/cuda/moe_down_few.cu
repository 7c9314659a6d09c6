// Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
//
// Down and the weighted sum for at most 8 pairs of a row and an expert, on Hopper. A block has 16
// columns of the output and so 16 weight rows of each pair's expert, which are a warp's part of the
// product; the pairs' rows of x are the other side of it. Each pair is multiplied with each other
// one's rows, too, which costs nothing while weights stream. So a block has all terms of its
// columns, and no result passes through memory.
//
// Sums run over the columns in the order of moe_wgmma.cu, and over choices in that of moe_experts.
#include <algorithm>

#include "moe_wgmma.cuh"

namespace mrv1::cuda {
namespace {

constexpr int kColumns = 16;     // of the output, of a block
constexpr int kTileTokens = 16;  // the fewest of a product; pairs are fewer
constexpr int kPrefetchGroups = 16;
constexpr int kPairBytes = kColumns * kRowBytes;

struct DownFewArgs {
  const BFloat16* x;
  const float* weights;  // [rows, top_k]
  void* out;
  MoeRows rows;
  int k, hidden;
  int stages;
  bool out_f32;
};

template <int kWarpgroups>
struct DownFewShape {
  static constexpr int kPairs = kWarpgroups * 4;
  static constexpr int kConsumers = kWarpgroups * 128;  // threads
  static constexpr int kThreads = kConsumers + 32;
  static constexpr int kWeightBytes = kPairs * kPairBytes;
  static constexpr int kStageBytes = kWeightBytes + kTileTokens * kRowBytes;
};

template <int kWarpgroups>
__global__ void __launch_bounds__(DownFewShape<kWarpgroups>::kThreads)
    down_few_kernel(const __grid_constant__ CUtensorMap weight_map,
                    const __grid_constant__ DownFewArgs args) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  using Shape = DownFewShape<kWarpgroups>;
  extern __shared__ char unaligned[];
  char* const ring = ring_of(unaligned);
  __shared__ uint64_t full[kMaxStages], empty[kMaxStages];
  __shared__ MoeFewPairs few;
  __shared__ float factors[Shape::kPairs];
  __shared__ float terms[Shape::kPairs][kColumns];
  const int lane = threadIdx.x % 32;
  const int groups = (args.k + kGroup - 1) / kGroup;
  const bool loads = threadIdx.x >= Shape::kConsumers;
  const uint64_t policy = weight_policy(/*read_once=*/true);

  // The choices are older than the kernel before this one, which lets this start only behind its
  // own wait.
  int expert = -1;  // of pair `lane`, in the warp that loads
  int num_here = 0;
  const auto load_weights = [&](int group, int stage) {
    if (lane == 0) mbarrier_arrive_expect_tx(&full[stage], num_here * kPairBytes);
    __syncwarp();
    if (expert >= 0) {
      load_expert_tile<1>(ring + stage * Shape::kStageBytes + lane * kPairBytes, weight_map,
                          &full[stage], group * kGroup, blockIdx.x * kColumns, expert, policy);
    }
  };
  const int ahead = min(args.stages, groups);
  if (loads) {
    if (lane == 0) {
      prefetch_tensormap(weight_map);
      for (int s = 0; s < args.stages; ++s) {
        mbarrier_init(&full[s], 1 + 32);
        mbarrier_init(&empty[s], kWarpgroups);
      }
      fence_mbarrier_init();
    }
    moe_schedule_few(args.rows, &few);
    if (lane < Shape::kPairs && few.place[lane] >= 0) {
      expert = moe_expert_of(args.rows, lane);
      const int64_t row = moe_row_at(args.rows, lane / args.rows.top_k);
      factors[lane] = __ldcg(args.weights + row * args.rows.top_k + lane % args.rows.top_k);
    }
    num_here = __popc(__ballot_sync(0xffffffffu, expert >= 0));
    if (num_here > 0) {
      for (int s = 0; s < ahead; ++s) load_weights(s, s);
      // What the ring has no room for comes nearer, at least, until there is something to multiply.
      for (int i = ahead; expert >= 0 && i < min(groups, ahead + kPrefetchGroups); ++i) {
        prefetch_expert_tile(weight_map, i * kGroup, blockIdx.x * kColumns, expert);
      }
    }
  }
  __syncthreads();
  wait_for_previous();

  const bool any_here = few.num_groups > 0;
  RingPlace place;
  if (loads) {
    constexpr int kTurns = Shape::kPairs / 4;  // 4 rows of 8 times 16 bytes at a time
    const int chunk = lane % 8;
    for (int i = 0; any_here && i < groups; ++i) {
      mbarrier_wait_parity(&empty[place.stage], place.parity ^ 1);
      if (i >= ahead) load_weights(i, place.stage);
      const bool in_cols = i * kGroup + chunk * 8 < args.k;
      const uint32_t to =
          shared_address(ring) + place.stage * Shape::kStageBytes + Shape::kWeightBytes;
#pragma unroll
      for (int turn = 0; turn < kTurns; ++turn) {
        const int pair = turn * 4 + lane / 8;
        const int row = few.place[pair];
        if (row < 0) continue;
        const BFloat16* source = args.x + int64_t{row} * args.k + i * kGroup + chunk * 8;
        cp_async_16_no_prefetch(to + pair * kRowBytes + (chunk ^ (pair & 7)) * 16,
                                in_cols ? source : args.x, in_cols);
      }
      cp_async_mbarrier_arrive(&full[place.stage]);
      place.next(args.stages);
    }
    launch_next();
    __syncwarp();
  } else if (any_here) {
    const int warpgroup = threadIdx.x / 128;
    float sums[kTileTokens / 2] = {};
    int previous = -1;
    for (int i = 0; i < groups; ++i) {
      mbarrier_wait_parity(&full[place.stage], place.parity);
      fence_proxy_async();
      const uint32_t at = shared_address(ring) + place.stage * Shape::kStageBytes;
      const uint64_t a = wgmma_descriptor(at + warpgroup * 4 * kPairBytes);
      const uint64_t b = wgmma_descriptor(at + Shape::kWeightBytes);
      wgmma_fence();
#pragma unroll
      for (int k = 0; k < kGroup / 16; ++k) wgmma(sums, a + k * 2, b + k * 2);
      wgmma_commit_group();
      if (previous >= 0) {
        wgmma_wait_group<1>();
        if (threadIdx.x % 128 == 0) mbarrier_arrive(&empty[previous]);
      }
      previous = place.stage;
      place.next(args.stages);
    }
    wgmma_wait_group<0>();
    // Keeps what reads the sums behind the wait.
#pragma unroll
    for (float& sum : sums) wgmma_fence_operand(sum);
    // Of a warp's 16 weight rows those of its own pair count: column `pair` of the product.
    const int pair = threadIdx.x / 32;
    if (lane % 4 == pair / 2) {
      const bool odd = pair % 2 != 0;
      const auto term = [&](float value) { return to_float(from_float<BFloat16>(value)); };
      terms[pair][lane / 4] = term(odd ? sums[1] : sums[0]);
      terms[pair][lane / 4 + 8] = term(odd ? sums[3] : sums[2]);
    }
  }
  __syncthreads();

  const int number = threadIdx.x / kColumns;
  const int col = blockIdx.x * kColumns + threadIdx.x % kColumns;
  if (loads || number >= moe_live_rows(args.rows) || col >= args.hidden) return;
  float sum = 0.0f;
  for (int j = 0; j < args.rows.top_k; ++j) {
    const int pair = number * args.rows.top_k + j;
    if (few.place[pair] < 0) continue;
    sum = fmaf(factors[pair], terms[pair][threadIdx.x % kColumns], sum);
  }
  const int64_t at = int64_t{moe_row_at(args.rows, number)} * args.hidden + col;
  if (args.out_f32) {
    static_cast<float*>(args.out)[at] = sum;
  } else {
    static_cast<BFloat16*>(args.out)[at] = from_float<BFloat16>(sum);
  }
#endif
}

template <int kWarpgroups>
void launch_down_few(const MoeProduct& product, DownFewArgs args, const DeviceLimits& limits,
                     const StepContext& ctx) {
  using Shape = DownFewShape<kWarpgroups>;
  // Half of a multiprocessor: the other half is that of the product before, while this one's
  // weights come.
  const size_t room = moe_block_bytes(limits, 2) - kMoeReservedBytes;
  args.stages = std::clamp(static_cast<int>(room / Shape::kStageBytes), kMinStages, kMaxStages);
  const size_t shared_bytes = static_cast<size_t>(args.stages) * Shape::kStageBytes + kSwizzleBytes;
  allow_shared_memory(kMoeOp, down_few_kernel<kWarpgroups>, shared_bytes);
  launch(kMoeOp, ctx, down_few_kernel<kWarpgroups>, (args.hidden + kColumns - 1) / kColumns,
         Shape::kThreads, shared_bytes, expert_map(product, kColumns), args);
}

}  // namespace

void moe_down_few(const MoeProduct& product, const float* weights, void* out, DType out_dtype,
                  const StepContext& ctx) {
  DownFewArgs args{};
  args.x = static_cast<const BFloat16*>(product.x);
  args.weights = weights;
  args.out = out;
  args.rows = product.rows;
  args.k = static_cast<int>(product.weight.cols);
  args.hidden = static_cast<int>(product.out_cols());
  args.out_f32 = out_dtype == DType::kF32;
  if (product.rows.num_rows * product.rows.top_k <= DownFewShape<1>::kPairs) {
    launch_down_few<1>(product, args, device_limits(), ctx);
  } else {
    launch_down_few<2>(product, args, device_limits(), ctx);
  }
}

}  // namespace mrv1::cuda
