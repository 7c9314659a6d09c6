// Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
//
// Linear of few rows with wgmma, for Hopper. Weight rows are the 64-wide side of the product and
// tokens the other; both come through a ring in shared memory, by TMA.
//
// A cluster of `split` blocks owns a tile of kRows weight rows and kTokens tokens. Its blocks
// split K into consecutive ranges and add up their partial sums, in the order of blocks, through
// each other's shared memory. In a block one warp fills the ring, the weight's part of it before
// the kernel waits for the one before it, and each warpgroup multiplies 64 of the rows.
//
// With an activation each 16 rows of a tile are 8 of gate and the 8 of up that go with them.
#include <algorithm>

#include "linear_wgmma.cuh"

namespace mrv1::cuda {
namespace {

template <int kRows, int kTokens>
struct WgmmaShape {
  static constexpr int kThreads = kRows * 2 + 32;  // a warpgroup each 64 rows, and the loader
  static constexpr int kWeightBytes = kRows * kRowBytes;
  static constexpr int kStageBytes = kWeightBytes + kTokens * kRowBytes;
  // Partial sums lie as [token][row]; the padding spreads a warp's stores over the banks.
  static constexpr int kPartialStride = kRows + 4;
  static constexpr int kPartialBytes = kTokens * kPartialStride * 4;
  static size_t shared_bytes(int stages) {
    return std::max(stages * kStageBytes, kPartialBytes) + kSwizzleBytes;
  }
};

template <int kRows, int kTokens>
__global__ void __launch_bounds__(WgmmaShape<kRows, kTokens>::kThreads, kRows <= 128 ? 2 : 1)
    wgmma_kernel(const __grid_constant__ CUtensorMap weight_map,
                 const __grid_constant__ CUtensorMap x_map, SkinnyArgs args, int tile_tokens,
                 int stages, bool vector_stores) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  using Shape = WgmmaShape<kRows, kTokens>;
  constexpr int kStride = Shape::kPartialStride;
  extern __shared__ char unaligned[];
  char* const ring = ring_of(unaligned);
  __shared__ uint64_t full[kMaxStages], empty[kMaxStages];

  const int split = gridDim.x;
  const int rank = blockIdx.x;
  const int first_token = blockIdx.y * tile_tokens;
  const int first_row = blockIdx.z * kRows;
  const int groups = (args.k + kGroup - 1) / kGroup;
  const int first_group = groups * rank / split;
  const int num_groups = groups * (rank + 1) / split - first_group;

  if (threadIdx.x == 0) {
    for (int s = 0; s < stages; ++s) {
      mbarrier_init(&full[s], 1);
      mbarrier_init(&empty[s], kRows / 64);
    }
    fence_mbarrier_init();
  }
  __syncthreads();

  float sums[kTokens / 2];
  if (threadIdx.x >= kRows * 2) {
    if (threadIdx.x == kRows * 2) {
      prefetch_tensormap(x_map);
      const auto column = [&](int group) { return (first_group + group) * kGroup; };
      const uint64_t policy = weight_policy(gridDim.y == 1);
      const auto load_weight = [&](int group, int stage) {
        char* to = ring + stage * Shape::kStageBytes;
        mbarrier_arrive_expect_tx(&full[stage], Shape::kWeightBytes + tile_tokens * kRowBytes);
        if (args.gated()) {
          load_pair_tile(to, weight_map, &full[stage], column(group), first_row / 16, policy);
        } else {
          tma_load_2d(to, weight_map, &full[stage], column(group), first_row, policy);
        }
      };
      const auto load_x = [&](int group, int stage) {
        tma_load_2d(ring + stage * Shape::kStageBytes + Shape::kWeightBytes, x_map, &full[stage],
                    column(group), first_token);
      };
      const int ahead = min(stages, num_groups);
      for (int s = 0; s < ahead; ++s) load_weight(s, s);
      wait_for_previous();
      for (int s = 0; s < ahead; ++s) load_x(s, s);
      int stage = 0;
      int parity = 0;
      for (int group = ahead; group < num_groups; ++group) {
        mbarrier_wait_parity(&empty[stage], parity);
        load_weight(group, stage);
        load_x(group, stage);
        if (++stage == stages) {
          stage = 0;
          parity ^= 1;
        }
      }
      // Only now: next blocks that come sooner take room and bandwidth from this kernel's last
      // loads.
      launch_next();
    }
    __syncwarp();
  } else {
    const int warpgroup = threadIdx.x / 128;
#pragma unroll
    for (float& sum : sums) sum = 0.0f;
    wait_for_previous();
    int stage = 0;
    int parity = 0;
    int previous = 0;
    for (int group = 0; group < num_groups; ++group) {
      mbarrier_wait_parity(&full[stage], parity);
      const uint32_t at = shared_address(ring + stage * Shape::kStageBytes);
      const uint64_t a = wgmma_descriptor(at + warpgroup * 64 * kRowBytes);
      const uint64_t b = wgmma_descriptor(at + Shape::kWeightBytes);
      wgmma_fence();
#pragma unroll
      for (int k = 0; k < kGroup / 16; ++k) wgmma(sums, a + k * 2, b + k * 2);
      wgmma_commit_group();
      if (group > 0) {
        wgmma_wait_group<1>();
        if (threadIdx.x % 128 == 0) mbarrier_arrive(&empty[previous]);
      }
      previous = stage;
      if (++stage == stages) {
        stage = 0;
        parity ^= 1;
      }
    }
    wgmma_wait_group<0>();
  }

  // All of this block's groups have arrived and were multiplied: the partial sums may take the
  // ring's place.
  __syncthreads();
  float* partial = reinterpret_cast<float*>(ring);
  if (threadIdx.x < kRows * 2) {
    const int lane = threadIdx.x % 32;
    // With an activation all of gate comes before all of up.
    const int row = threadIdx.x / 32 * (args.gated() ? 8 : 16) + lane / 4;
    const int lower = args.gated() ? kRows / 2 : 8;
#pragma unroll
    for (int i = 0; i < kTokens / 8; ++i) {
      float* to = partial + (i * 8 + lane % 4 * 2) * kStride + row;
      to[0] = sums[i * 4];
      to[kStride] = sums[i * 4 + 1];
      to[lower] = sums[i * 4 + 2];
      to[kStride + lower] = sums[i * 4 + 3];
    }
  }
  if (split > 1) {
    cluster_sync();
  } else {
    __syncthreads();
  }

  const Finish<kRows, kStride, Shape::kThreads> finish{
      shared_address(partial),
      static_cast<int>(blockIdx.z) * (args.gated() ? kRows / 2 : kRows),
      first_token,
      min(tile_tokens, args.tokens - first_token),
      rank,
      split,
      /*first_peer=*/0,
      vector_stores};
  if (args.gated()) {
    finish.template run<true>(args);
  } else {
    finish.template run<false>(args);
  }
  if (split > 1) cluster_sync();  // peers may still read this block's partial sums
#endif
}

template <int kRows, int kTokens>
void launch_wgmma(const SkinnyArgs& args, const SkinnyConfig& config, const DeviceLimits& limits,
                  const StepContext& ctx) {
  using Shape = WgmmaShape<kRows, kTokens>;
  // Even tiles of tokens, as TMA is slow to fill rows beyond the last one with zeros. What lies in
  // the rest of a stage only reaches sums that nobody stores.
  const int tiles = (args.tokens + kTokens - 1) / kTokens;
  const int tile_tokens = (args.tokens + tiles - 1) / tiles;
  const int stages = ring_stages<Shape>(config, limits);
  const size_t shared_bytes = Shape::shared_bytes(stages);
  allow_shared_memory(kSkinnyOp, wgmma_kernel<kRows, kTokens>, shared_bytes);
  const int outputs = args.gated() ? kRows / 2 : kRows;
  const dim3 grid(config.split, tiles, (args.out_cols + outputs - 1) / outputs);
  launch_cluster(kSkinnyOp, ctx, wgmma_kernel<kRows, kTokens>, grid, dim3(config.split),
                 dim3(Shape::kThreads), shared_bytes, skinny_weight_map<kRows>(args),
                 skinny_x_map(args, tile_tokens), args, tile_tokens, stages, stores_vectors(args));
}

template <int kRows>
void launch_wgmma(const SkinnyArgs& args, const SkinnyConfig& config, const DeviceLimits& limits,
                  const StepContext& ctx) {
  if (args.tokens <= 16) return launch_wgmma<kRows, 16>(args, config, limits, ctx);
  if (args.tokens <= 32) return launch_wgmma<kRows, 32>(args, config, limits, ctx);
  if (args.tokens <= 64) return launch_wgmma<kRows, 64>(args, config, limits, ctx);
  launch_wgmma<kRows, 128>(args, config, limits, ctx);
}

}  // namespace

bool wgmma_is_built() {
  static const bool built = [] {
    cudaFuncAttributes attributes{};
    check_cuda(cudaFuncGetAttributes(&attributes, wgmma_kernel<64, 16>), kSkinnyOp,
               "cudaFuncGetAttributes");
    return attributes.sharedSizeBytes > 0;  // elsewhere the kernel is empty
  }();
  return built;
}

bool wgmma_offers(const SkinnyConfig& config) {
  return config.tile_rows >= 64 && config.tile_rows <= 256 && config.tile_rows % 64 == 0 &&
         config.split >= 1 && config.split <= kMaxSplit && config.stages >= kMinStages &&
         config.stages <= kMaxStages;
}

void skinny_wgmma(const SkinnyArgs& args, const SkinnyConfig& config, const DeviceLimits& limits,
                  const StepContext& ctx) {
  check(limits.wgmma, kSkinnyOp, "config.engine is kWgmma; it must be kMma on this GPU");
  check(wgmma_offers(config), kSkinnyOp, "config is kWgmma with tiles of ", config.tile_rows,
        " rows, split ", +config.split, " and ", +config.stages,
        " stages, which the kernels do not offer");
  switch (config.tile_rows) {
    case 64:
      return launch_wgmma<64>(args, config, limits, ctx);
    case 128:
      return launch_wgmma<128>(args, config, limits, ctx);
    case 192:
      return launch_wgmma<192>(args, config, limits, ctx);
    default:
      return launch_wgmma<256>(args, config, limits, ctx);
  }
}

}  // namespace mrv1::cuda
