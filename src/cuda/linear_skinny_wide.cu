// Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
//
// Linear of some tens to hundreds of rows with wgmma, for Hopper. There the L2 cache's bandwidth is
// what limits: a block reads its tile's tokens as well as its weight rows. So tiles are as tall as
// leaves a block for every multiprocessor, tokens are the 64-wide side of the product, whose other
// side may be any multiple of 8, and neighbouring tiles read their tokens together.
//
// A cluster of `split` x `share` blocks owns `share` tiles of kRows weight rows and the same
// tokens. The blocks of a tile split K as in linear_skinny_wgmma.cu; those of one range of K load a
// part of the tokens each, for all of them. In a block one warp fills the ring, the weight's part
// of it before the kernel waits for the one before it, and each warpgroup multiplies 64 tokens.
//
// No block waits for ever. Those of one range of K have the same number of groups, none returns
// early, and a box of TMA counts whole, with the zeros beyond the tensor: a group's bytes arrive
// once all its blocks have issued its loads. Those of group g wait only until each block has given
// back the stage of group g - stages, which it does as soon as group g - stages + 1 has arrived;
// with kMinStages or more that is a group before g, so by induction all are loaded.
//
// With an activation each 16 rows of a tile are 8 of gate and the 8 of up that go with them.
#include <algorithm>

#include "linear_wgmma.cuh"

namespace mrv1::cuda {
namespace {

constexpr int kMaxShare = 4;
constexpr int kMaxCluster = 8;

// The most tokens of a block with tiles of so many rows, for whose sums there are registers.
constexpr int max_tile_tokens(int tile_rows) {
  return tile_rows <= 128 ? 256 : tile_rows <= 192 ? 192 : 128;
}

template <int kTokens, int kRows>
struct WideShape {
  static constexpr int kThreads = kTokens * 2 + 32;  // a warpgroup each 64 tokens, and the loader
  static constexpr int kXBytes = kTokens * kRowBytes;
  static constexpr int kWeightBytes = kRows * kRowBytes;
  static constexpr int kStageBytes = kXBytes + kWeightBytes;
  // A tile is one product wide, or two.
  static constexpr int kParts = kRows > 128 ? 2 : 1;
  static constexpr int kPartRows = kRows / kParts;
  static_assert(kPartRows % 16 == 0, "a product is whole pieces of gate and up");
  // Partial sums lie as [token][row]; the padding spreads a warp's stores over the banks.
  static constexpr int kPartialStride = kRows + 8;
  static constexpr int kPartialBytes = kTokens * kPartialStride * 4;
  static size_t shared_bytes(int stages) {
    return std::max(stages * kStageBytes, kPartialBytes) + kSwizzleBytes;
  }
};

struct WideCut {
  int tile_tokens;  // of a block, at most
  int part_tokens;  // of those, how many a block loads
  int share, stages;
  bool vector_stores;
};

template <int kTokens, int kRows>
__global__ void __launch_bounds__(WideShape<kTokens, kRows>::kThreads, 1)
    wide_kernel(const __grid_constant__ CUtensorMap weight_map,
                const __grid_constant__ CUtensorMap x_map, SkinnyArgs args, WideCut cut) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  using Shape = WideShape<kTokens, kRows>;
  constexpr int kStride = Shape::kPartialStride;
  constexpr int kConsumers = kTokens * 2;  // threads
  extern __shared__ char unaligned[];
  char* const ring = ring_of(unaligned);
  __shared__ uint64_t full[kMaxStages], empty[kMaxStages];

  // A cluster is [share along z][split along x], which numbers its blocks.
  const int split = gridDim.x;
  const int rank = blockIdx.x;
  const int place = blockIdx.z % cut.share;
  const int first_token = blockIdx.y * cut.tile_tokens;
  const int first_row = blockIdx.z * kRows;
  const int groups = (args.k + kGroup - 1) / kGroup;
  const int first_group = groups * rank / split;
  const int num_groups = groups * (rank + 1) / split - first_group;

  if (threadIdx.x == 0) {
    for (int s = 0; s < cut.stages; ++s) {
      mbarrier_init(&full[s], 1);
      mbarrier_init(&empty[s], kTokens / 64 * cut.share);
    }
    fence_mbarrier_init();
  }
  __syncthreads();
  // Nobody reaches into another block before its barriers are there.
  if (cut.share > 1) cluster_arrive();

  float sums[Shape::kParts][Shape::kPartRows / 2];
  if (threadIdx.x >= kConsumers) {
    const auto column = [&](int group) { return (first_group + group) * kGroup; };
    const uint64_t policy = weight_policy(gridDim.y == 1);
    const auto load_weight = [&](int group, int stage) {
      char* to = ring + stage * Shape::kStageBytes + Shape::kXBytes;
      mbarrier_arrive_expect_tx(&full[stage],
                                Shape::kWeightBytes + cut.part_tokens * cut.share * kRowBytes);
      if (args.gated()) {
        load_pair_tile(to, weight_map, &full[stage], column(group), first_row / 16, policy);
      } else {
        tma_load_2d(to, weight_map, &full[stage], column(group), first_row, policy);
      }
    };
    const auto load_x = [&](int group, int stage) {
      char* to = ring + stage * Shape::kStageBytes + place * cut.part_tokens * kRowBytes;
      const int row = first_token + place * cut.part_tokens;
      if (cut.share == 1) {
        tma_load_2d(to, x_map, &full[stage], column(group), row);
      } else {
        uint16_t blocks = 0;
        for (int i = 0; i < cut.share; ++i) blocks |= uint16_t{1} << (i * split + rank);
        tma_load_2d_multicast(to, x_map, &full[stage], column(group), row, blocks);
      }
    };
    const int ahead = min(cut.stages, num_groups);
    const bool loads = threadIdx.x == kConsumers;
    if (loads) {
      prefetch_tensormap(x_map);
      for (int s = 0; s < ahead; ++s) load_weight(s, s);
    }
    __syncwarp();
    if (cut.share > 1) cluster_wait();
    if (loads) {
      wait_for_previous();
      for (int s = 0; s < ahead; ++s) load_x(s, s);
      int stage = 0;
      int parity = 0;
      for (int group = ahead; group < num_groups; ++group) {
        mbarrier_wait_parity(&empty[stage], parity);
        load_weight(group, stage);
        load_x(group, stage);
        if (++stage == cut.stages) {
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
    for (auto& part : sums) {
#pragma unroll
      for (float& sum : part) sum = 0.0f;
    }
    if (cut.share > 1) cluster_wait();
    wait_for_previous();
    int stage = 0;
    int parity = 0;
    int previous = 0;
    for (int group = 0; group < num_groups; ++group) {
      mbarrier_wait_parity(&full[stage], parity);
      const uint32_t at = shared_address(ring + stage * Shape::kStageBytes);
      const uint64_t a = wgmma_descriptor(at + warpgroup * 64 * kRowBytes);
      const uint64_t b = wgmma_descriptor(at + Shape::kXBytes);
      wgmma_fence();
#pragma unroll
      for (int k = 0; k < kGroup / 16; ++k) {
#pragma unroll
        for (int part = 0; part < Shape::kParts; ++part) {
          wgmma(sums[part], a + k * 2, b + part * Shape::kPartRows * kRowBytes / 16 + k * 2);
        }
      }
      wgmma_commit_group();
      if (group > 0) {
        wgmma_wait_group<1>();
        // What a stage holds of x came from all blocks that share it.
        const int peer = threadIdx.x % 128;
        if (cut.share == 1) {
          if (peer == 0) mbarrier_arrive(&empty[previous]);
        } else if (peer < cut.share) {
          mbarrier_arrive_cluster(&empty[previous], peer * split + rank);
        }
      }
      previous = stage;
      if (++stage == cut.stages) {
        stage = 0;
        parity ^= 1;
      }
    }
    wgmma_wait_group<0>();
  }

  // All of this block's groups have arrived, those that others loaded too, and were multiplied: the
  // partial sums may take the ring's place.
  __syncthreads();
  float* partial = reinterpret_cast<float*>(ring);
  if (threadIdx.x < kConsumers) {
    const int lane = threadIdx.x % 32;
    float* to = partial + (threadIdx.x / 32 * 16 + lane / 4) * kStride + lane % 4 * 2;
#pragma unroll
    for (int part = 0; part < Shape::kParts; ++part) {
#pragma unroll
      for (int i = 0; i < Shape::kPartRows / 8; ++i) {
        // With an activation all of gate comes before all of up.
        const int eight = part * Shape::kPartRows / 8 + i;
        const int col = args.gated() ? eight / 2 * 8 + eight % 2 * (kRows / 2) : eight * 8;
        const float (&sum)[Shape::kPartRows / 2] = sums[part];
        *reinterpret_cast<float2*>(to + col) = make_float2(sum[i * 4], sum[i * 4 + 1]);
        *reinterpret_cast<float2*>(to + 8 * kStride + col) =
            make_float2(sum[i * 4 + 2], sum[i * 4 + 3]);
      }
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
      min(cut.tile_tokens, args.tokens - first_token),
      rank,
      split,
      place * split,
      cut.vector_stores};
  if (args.gated()) {
    finish.template run<true>(args);
  } else {
    finish.template run<false>(args);
  }
  // Others may still read this block's partial sums, or arrive at its barriers.
  if (split > 1 || cut.share > 1) cluster_sync();
#endif
}

constexpr int ceil_div(int a, int b) { return (a + b - 1) / b; }

template <int kTokens, int kRows>
void launch_wide(const SkinnyArgs& args, const SkinnyConfig& config, int token_tiles,
                 const DeviceLimits& limits, const StepContext& ctx) {
  using Shape = WideShape<kTokens, kRows>;
  WideCut cut{};
  cut.share = config.share;
  // As few rows beyond the last token as may be, since TMA is slow to fill them with zeros; whole
  // periods of the swizzle. What lies in the rest of a stage only reaches sums that nobody stores.
  cut.tile_tokens = ceil_div(args.tokens, token_tiles);
  cut.part_tokens = ceil_div(ceil_div(cut.tile_tokens, cut.share), 8) * 8;
  cut.stages = ring_stages<Shape>(config, limits);
  cut.vector_stores = stores_vectors(args);
  const size_t shared_bytes = Shape::shared_bytes(cut.stages);
  allow_shared_memory(kSkinnyOp, wide_kernel<kTokens, kRows>, shared_bytes);
  const int tiles = ceil_div(args.out_cols, args.gated() ? kRows / 2 : kRows);
  launch_cluster(kSkinnyOp, ctx, wide_kernel<kTokens, kRows>,
                 dim3(config.split, token_tiles, ceil_div(tiles, cut.share) * cut.share),
                 dim3(config.split, 1, cut.share), dim3(Shape::kThreads), shared_bytes,
                 skinny_weight_map<kRows>(args), skinny_x_map(args, cut.part_tokens), args, cut);
}

template <int kRows>
void launch_wide(const SkinnyArgs& args, const SkinnyConfig& config, const DeviceLimits& limits,
                 const StepContext& ctx) {
  const int tiles = ceil_div(args.tokens, max_tile_tokens(kRows));
  const int tokens = ceil_div(args.tokens, tiles);
  if (tokens <= 64) return launch_wide<64, kRows>(args, config, tiles, limits, ctx);
  if (tokens <= 128) return launch_wide<128, kRows>(args, config, tiles, limits, ctx);
  if constexpr (max_tile_tokens(kRows) >= 192) {
    if (tokens <= 192) return launch_wide<192, kRows>(args, config, tiles, limits, ctx);
  }
  if constexpr (max_tile_tokens(kRows) >= 256) {
    launch_wide<256, kRows>(args, config, tiles, limits, ctx);
  }
}

}  // namespace

bool wide_offers(const SkinnyConfig& config) {
  const bool rows = std::find(std::begin(kWideRows), std::end(kWideRows), config.tile_rows) !=
                    std::end(kWideRows);
  const bool share = config.share == 1 || config.share == 2 || config.share == kMaxShare;
  return rows && share && config.split >= 1 && config.split * config.share <= kMaxCluster &&
         config.stages >= kMinStages && config.stages <= kMaxStages;
}

int wide_tile_tokens(int tile_rows) { return max_tile_tokens(tile_rows); }

int wide_clusters(int blocks) {
  using Shape = WideShape<128, 128>;
  const size_t shared_bytes = Shape::shared_bytes(6);
  allow_shared_memory(kSkinnyOp, wide_kernel<128, 128>, shared_bytes);
  cudaLaunchAttribute cluster{};
  cluster.id = cudaLaunchAttributeClusterDimension;
  cluster.val.clusterDim.x = static_cast<unsigned>(blocks);
  cluster.val.clusterDim.y = 1;
  cluster.val.clusterDim.z = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(blocks));
  config.blockDim = dim3(Shape::kThreads);
  config.dynamicSmemBytes = shared_bytes;
  config.attrs = &cluster;
  config.numAttrs = 1;
  int count = 0;
  check_cuda(cudaOccupancyMaxActiveClusters(&count, wide_kernel<128, 128>, &config), kSkinnyOp,
             "cudaOccupancyMaxActiveClusters");
  return count;
}

void skinny_wide(const SkinnyArgs& args, const SkinnyConfig& config, const DeviceLimits& limits,
                 const StepContext& ctx) {
  check(limits.wgmma, kSkinnyOp, "config.engine is kWide; it must be kMma on this GPU");
  check(wide_offers(config), kSkinnyOp, "config is kWide with tiles of ", config.tile_rows,
        " rows, split ", +config.split, ", share ", +config.share, " and ", +config.stages,
        " stages, which the kernels do not offer");
  switch (config.tile_rows) {
    case 64:
      return launch_wide<64>(args, config, limits, ctx);
    case 96:
      return launch_wide<96>(args, config, limits, ctx);
    case 112:
      return launch_wide<112>(args, config, limits, ctx);
    case 128:
      return launch_wide<128>(args, config, limits, ctx);
    case 192:
      return launch_wide<192>(args, config, limits, ctx);
    default:
      return launch_wide<224>(args, config, limits, ctx);
  }
}

}  // namespace mrv1::cuda
