// Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
//
// Products of moe_experts with wgmma, for Hopper. Weight rows are the 64-high side of the product
// and the rows of a group its other side, which may be any multiple of 8: so the same kernel
// streams each expert's weights once past the few rows of a decode step, and multiplies tiles of
// 256 by 128 for prompts. There the L2 cache's bandwidth is what limits, so the blocks of a cluster
// have groups of one expert and load its weights for each other.
//
// Blocks stay and take tile after tile, (group, weight rows), in turns. In a block one warp or
// warpgroup fills a ring of stages of 64 columns, weights by TMA and rows of x, which lie where
// they like, by cp.async; it runs ahead across tiles, so the memory stays busy while a tile ends.
// The other warpgroups multiply 64 weight rows each. Sums run over the columns in ascending order,
// whatever the group and the tile: a row's result does not depend on the batch.
//
// With an activation each 16 rows of a tile are 8 of gate and the 8 of up that go with them, so a
// thread has both of an output.
#include <algorithm>

#include "moe_wgmma.cuh"
#include "spare_processors.h"

namespace mrv1::cuda {
namespace {

struct MoeWgmmaArgs {
  const BFloat16* x;
  BFloat16* out;
  const float* row_scales;  // of all weight rows, or null
  MoeRows rows;
  MoeSchedule schedule;
  int k, out_cols;
  int weight_rows;  // of an expert
  int row_tiles;    // tiles of weight rows of an expert
  int stages;
  Activation activation;
  bool sorted, few;
  bool weights_first;
  bool read_once;
};

// Tiles of kRows weight rows and at most kTokens rows, in clusters of kShare blocks.
template <int kRows, int kTokens, int kShare>
struct MoeWgmmaShape {
  static constexpr int kHigh = kRows > 128 ? 2 : 1;          // 64 weight rows of a warpgroup, times
  static constexpr int kWarpgroups = kRows / kHigh / 64;     // that multiply
  static constexpr int kConsumers = kWarpgroups * 128;       // threads
  static constexpr int kLoaders = kTokens <= 64 ? 32 : 128;  // threads
  static constexpr int kThreads = kConsumers + kLoaders;
  static constexpr int kBlocks = kRows == 64 ? 4 : 1;  // on a multiprocessor
  static constexpr int kWeightBytes = kRows * kRowBytes;
  static constexpr int kStageBytes = kWeightBytes + kTokens * kRowBytes;
  static constexpr int kStagingBytes = kTokens * kRowBytes;  // of a warpgroup
  static int stages(size_t block_bytes) {
    const size_t room = block_bytes - kMoeReservedBytes - kWarpgroups * kStagingBytes;
    return std::clamp(static_cast<int>(room / kStageBytes), kMinStages, kMaxStages);
  }
  static size_t shared_bytes(int stages) {
    return static_cast<size_t>(stages) * kStageBytes + kWarpgroups * kStagingBytes + kSwizzleBytes;
  }
};

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)

// The schedule as a block sees it. Tiles are numbered for clusters, whose blocks have neighbouring
// groups and the same weight rows.
template <int kShare>
struct BlockSchedule {
  const MoeWgmmaArgs& args;
  const MoeFewPairs& few;

  __device__ int num_tiles() const {
    const int groups = args.few ? few.num_groups : __ldcg(args.schedule.num_groups);
    return groups / kShare * args.row_tiles;
  }
  __device__ MoeGroup group(int tile) const {
    const int index = tile / args.row_tiles * kShare + blockIdx.x % kShare;
    if (args.few) return few.groups[index];
    const int4 value = __ldcg(reinterpret_cast<const int4*>(args.schedule.groups) + index);
    return {value.x, value.y, value.z, value.w};
  }
  // The row of x of a place.
  __device__ int row(int place) const {
    if (args.sorted) return place;
    return args.few ? few.row[place] : __ldcg(args.schedule.row + place);
  }
};

// load_expert_tile() of pieces of 8 + 8 rows: [pieces][gate, up][8 rows][columns]
template <int kShare>
__device__ __forceinline__ void load_expert_pair_tile(void* to, const CUtensorMap& map,
                                                      uint64_t* barrier, int col, int piece,
                                                      int expert, uint64_t policy) {
  if constexpr (kShare == 1) {
    tma_load_5d(to, map, barrier, col, 0, 0, piece, expert, policy);
  } else {
    constexpr uint16_t kAllBlocks = (1 << kShare) - 1;
    tma_load_5d_multicast(to, map, barrier, col, 0, 0, piece, expert, kAllBlocks);
  }
}

__device__ __forceinline__ uint32_t pack_pair(float low, float high) {
  uint32_t pair;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  return pair;
}

// Four elements from shared memory.
__device__ __forceinline__ void load_four(uint32_t address, float (&values)[4]) {
  const auto [low, high] = ld_shared_v2_u32(address);
  values[0] = __uint_as_float(low << 16);
  values[1] = __uint_as_float(low & 0xffff0000u);
  values[2] = __uint_as_float(high << 16);
  values[3] = __uint_as_float(high & 0xffff0000u);
}

__device__ __forceinline__ void warpgroup_sync(int warpgroup) {
  asm volatile("bar.sync %0, 128;" ::"r"(1 + warpgroup) : "memory");
}

// The part of a block that multiplies: a warpgroup. What is unrolled is kept short: code that the
// instruction caches do not hold costs more than its instructions.
template <typename Shape, int kTokens, int kShare, bool kGated>
struct Consumer {
  static constexpr int kHigh = Shape::kHigh;
  using Sums = float[kHigh][kTokens / 2];

  const MoeWgmmaArgs& args;
  uint32_t ring;
  uint64_t* full;
  uint64_t* empty;
  RingPlace place{};

  // Gives a stage back, to all blocks that write it.
  __device__ __forceinline__ void release(int stage) const {
    const int peer = threadIdx.x % 128;
    if constexpr (kShare == 1) {
      if (peer == 0) mbarrier_arrive(&empty[stage]);
    } else {
      if (peer < kShare) mbarrier_arrive_cluster(&empty[stage], peer);
    }
  }

  // The products of a tile of a group of at most kCount rows.
  template <int kCount>
  __device__ __forceinline__ void multiply_tile(Sums& sums) {
    const int warpgroup = threadIdx.x / 128;
    const int groups = (args.k + kGroup - 1) / kGroup;
    int previous = -1;
#pragma unroll 1
    for (int i = 0; i < groups; ++i) {
      mbarrier_wait_parity(&full[place.stage], place.parity);
      fence_proxy_async();
      const uint32_t at = ring + place.stage * Shape::kStageBytes;
      const uint64_t a = wgmma_descriptor(at + warpgroup * kHigh * 64 * kRowBytes);
      const uint64_t b = wgmma_descriptor(at + Shape::kWeightBytes);
      wgmma_fence();
#pragma unroll
      for (int k = 0; k < kGroup / 16; ++k) {
#pragma unroll
        for (int high = 0; high < kHigh; ++high) {
          wgmma(reinterpret_cast<float (&)[kCount / 2]>(sums[high]),
                a + high * (64 * kRowBytes / 16) + k * 2, b + k * 2);
        }
      }
      wgmma_commit_group();
      if (previous >= 0) {
        wgmma_wait_group<1>();
        release(previous);
      }
      previous = place.stage;
      place.next(args.stages);
    }
    wgmma_wait_group<0>();
    release(previous);
  }

  __device__ __forceinline__ void tile(MoeGroup group, int row_tile) {
    group.count = min(group.count, kTokens);  // more only if a row has chosen an expert twice
    Sums sums;
#pragma unroll
    for (auto& part : sums) {
#pragma unroll
      for (float& sum : part) sum = 0.0f;
    }
    if (kTokens == 16 || group.count <= 16) {
      multiply_tile<16>(sums);
    } else if (kTokens == 32 || group.count <= 32) {
      if constexpr (kTokens >= 32) multiply_tile<32>(sums);
    } else if (kTokens == 64) {
      if constexpr (kTokens >= 64) multiply_tile<64>(sums);
    } else if constexpr (kTokens == 128) {
      if (group.count <= 48) {
        multiply_tile<48>(sums);
      } else if (group.count <= 64) {
        multiply_tile<64>(sums);
      } else if (group.count <= 80) {
        multiply_tile<80>(sums);
      } else if (group.count <= 96) {
        multiply_tile<96>(sums);
      } else if (group.count <= 112) {
        multiply_tile<112>(sums);
      } else {
        multiply_tile<128>(sums);
      }
    }
    // Keeps what reads the sums behind the wait.
#pragma unroll
    for (auto& part : sums) {
#pragma unroll
      for (float& sum : part) wgmma_fence_operand(sum);
    }
    if (args.row_scales != nullptr) scale(group.expert, row_tile, sums);
    const int tile = (row_tile * Shape::kWarpgroups + threadIdx.x / 128) * kHigh;
#pragma unroll 1
    for (int high = 0; high < kHigh; ++high) {
      if (high == 0) {
        stage_results(group.count, sums[0]);
      } else {
        stage_results(group.count, sums[kHigh - 1]);
      }
      warpgroup_sync(threadIdx.x / 128);
      store_results(group, tile + high);
      warpgroup_sync(threadIdx.x / 128);
    }
  }

  // A thread has sums of two weight rows in each 16: with an activation of gate and of up.
  __device__ __forceinline__ void scale(int expert, int row_tile, Sums& sums) const {
    const int lane = threadIdx.x % 32;
    const float* scales = args.row_scales + int64_t{expert} * args.weight_rows;
#pragma unroll
    for (int high = 0; high < kHigh; ++high) {
      const int number = (row_tile * Shape::kWarpgroups + threadIdx.x / 128) * kHigh + high;
      const int first = number * 64 + threadIdx.x % 128 / 32 * 16;
      const int row = (kGated ? first / 2 : first) + lane / 4;
      const int other = kGated ? args.out_cols + row : row + 8;
      const float low = row < args.out_cols ? scales[row] : 0.0f;
      const float up = (kGated ? row : other) < args.out_cols ? scales[other] : 0.0f;
#pragma unroll
      for (int i = 0; i < static_cast<int>(sizeof(sums[high]) / sizeof(float)); i += 4) {
        sums[high][i] *= low;
        sums[high][i + 1] *= low;
        sums[high][i + 2] *= up;
        sums[high][i + 3] *= up;
      }
    }
  }

  // Results of 64 weight rows lie in shared memory as [row][64 weight rows], their 16 bytes
  // swizzled as the ring's are.
  __device__ __forceinline__ uint32_t staged(int row, int chunk) const {
    return ring + args.stages * Shape::kStageBytes + threadIdx.x / 128 * Shape::kStagingBytes +
           row * kRowBytes + (chunk ^ (row & 7)) * 16;
  }

  __device__ __forceinline__ void stage_results(int count, const float (&sums)[kTokens / 2]) const {
    const int warp = threadIdx.x % 128 / 32;
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int i = 0; i < kTokens / 8; i += 2) {
      if (i * 8 >= count) break;
      const float* sum = &sums[i * 4];
      stmatrix_x4_trans(staged(i * 8 + lane / 16 * 8 + lane % 8, warp * 2 + lane / 8 % 2),
                        pack_pair(sum[0], sum[1]), pack_pair(sum[2], sum[3]),
                        pack_pair(sum[4], sum[5]), pack_pair(sum[6], sum[7]));
    }
  }

  // Stores what comes of the `number`th 64 weight rows of the expert.
  __device__ __forceinline__ void store_results(const MoeGroup& group, int number) const {
    const int first_row = threadIdx.x % 128 / 8;
    const int part = threadIdx.x % 8;
    if constexpr (kGated) {
      // Each 16 weight rows are 8 of gate and 8 of up; a thread has half of them.
      const int col = number * 32 + part * 4;
      if (col >= args.out_cols) return;
#pragma unroll kTokens> 64 ? 2 : 1
      for (int row = first_row; row < group.count; row += 16) {
        float gate[4], up[4];
        load_four(staged(row, part / 2 * 2) + part % 2 * 8, gate);
        load_four(staged(row, part / 2 * 2 + 1) + part % 2 * 8, up);
#pragma unroll
        for (int i = 0; i < 4; ++i) gate[i] = gated_mul(args.activation, gate[i], up[i]);
        const int64_t at = int64_t{group.first_place + row} * args.out_cols + col;
        *reinterpret_cast<uint2*>(args.out + at) =
            make_uint2(pack_pair(gate[0], gate[1]), pack_pair(gate[2], gate[3]));
      }
    } else {
      const int col = number * 64 + part * 8;
      if (col >= args.out_cols) return;
#pragma unroll 4
      for (int row = first_row; row < group.count; row += 16) {
        const int64_t at = int64_t{group.first_place + row} * args.out_cols + col;
        *reinterpret_cast<uint4*>(args.out + at) = ld_shared_v4_u32(staged(row, part));
      }
    }
  }
};

#endif  // __CUDA_ARCH_FEAT_SM90_ALL

template <int kRows, int kTokens, int kShare, bool kGated>
__global__ void __launch_bounds__(MoeWgmmaShape<kRows, kTokens, kShare>::kThreads,
                                  MoeWgmmaShape<kRows, kTokens, kShare>::kBlocks)
    moe_wgmma_kernel(const __grid_constant__ CUtensorMap weight_map,
                     const __grid_constant__ MoeWgmmaArgs args) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  using Shape = MoeWgmmaShape<kRows, kTokens, kShare>;
  extern __shared__ char unaligned[];
  char* const ring = ring_of(unaligned);
  __shared__ uint64_t full[kMaxStages], empty[kMaxStages];
  __shared__ MoeFewPairs few;
  const BlockSchedule<kShare> schedule{args, few};
  const int groups = (args.k + kGroup - 1) / kGroup;
  const int first_tile = blockIdx.x / kShare;
  const int tile_step = gridDim.x / kShare;
  const uint64_t policy = weight_policy(args.read_once);
  const auto load_weight = [&](int expert, int row_tile, int group, int stage) {
    constexpr int kPart = kRows / kShare;  // of the rows, that a block loads
    const int part = blockIdx.x % kShare;
    char* to = ring + stage * Shape::kStageBytes + part * kPart * kRowBytes;
    mbarrier_arrive_expect_tx(&full[stage], Shape::kWeightBytes);
    const int row = row_tile * kRows + part * kPart;
    if constexpr (kGated) {
      load_expert_pair_tile<kShare>(to, weight_map, &full[stage], group * kGroup, row / 16, expert,
                                    policy);
    } else {
      load_expert_tile<kShare>(to, weight_map, &full[stage], group * kGroup, row, expert, policy);
    }
  };

  // The first thread of those that load requests the first weights as soon as may be, on its own.
  const bool leads = threadIdx.x == Shape::kConsumers;
  if (leads) {
    prefetch_tensormap(weight_map);
    for (int s = 0; s < args.stages; ++s) {
      mbarrier_init(&full[s], 1 + Shape::kLoaders);
      mbarrier_init(&empty[s], Shape::kWarpgroups * kShare);
    }
    fence_mbarrier_init();
  }
  // Choices that this kernel may read early were made by one that ended before the one before this
  // was past its own wait, and that one lets this start only then.
  if (!args.weights_first) wait_for_previous();
  // Nobody reaches into another block before its barriers are there.
  if constexpr (kShare > 1) cluster_sync();
  int ahead = 0;  // stages whose weights are requested before all others
  if (threadIdx.x / 32 == Shape::kConsumers / 32) {
    if (args.few) moe_schedule_few(args.rows, &few);
    if (leads && first_tile < schedule.num_tiles()) {
      const MoeGroup group = schedule.group(first_tile);
      ahead = min(args.stages, groups);
      for (int s = 0; s < ahead; ++s) load_weight(group.expert, first_tile % args.row_tiles, s, s);
    }
    __syncwarp();
  }
  __syncthreads();
  wait_for_previous();

  if (threadIdx.x >= Shape::kConsumers) {
    constexpr int kPerTurn = Shape::kLoaders / 8;  // rows that the threads copy at a time
    constexpr int kTurns = kTokens / kPerTurn;
    const int thread = threadIdx.x - Shape::kConsumers;
    const int chunk = thread % 8;  // 16 bytes of a row
    const int first_row = thread / 8;
    const int tiles = schedule.num_tiles();
    RingPlace place;
#pragma unroll 1
    for (int tile = first_tile; tile < tiles; tile += tile_step) {
      const MoeGroup group = schedule.group(tile);
      const BFloat16* source[kTurns];
#pragma unroll
      for (int i = 0; i < kTurns; ++i) {
        const int row = first_row + i * kPerTurn;
        const int at = row < group.count ? schedule.row(group.first_place + row) : 0;
        source[i] = args.x + int64_t{at} * args.k + chunk * 8;
      }
#pragma unroll 1
      for (int i = 0; i < groups; ++i) {
        mbarrier_wait_parity(&empty[place.stage], place.parity ^ 1);
        if (leads) {
          if (ahead > 0) {
            --ahead;
          } else {
            load_weight(group.expert, tile % args.row_tiles, i, place.stage);
          }
        }
        const bool in_cols = i * kGroup + chunk * 8 < args.k;
        const uint32_t to =
            shared_address(ring) + place.stage * Shape::kStageBytes + Shape::kWeightBytes;
#pragma unroll
        for (int turn = 0; turn < kTurns; ++turn) {
          const int row = first_row + turn * kPerTurn;
          if (row >= group.count) break;
          cp_async_16_no_prefetch(to + row * kRowBytes + (chunk ^ (row & 7)) * 16,
                                  in_cols ? source[turn] + i * kGroup : args.x, in_cols);
        }
        cp_async_mbarrier_arrive(&full[place.stage]);
        place.next(args.stages);
      }
    }
    // Only now: next blocks that come sooner take room and bandwidth from this kernel's last loads.
    launch_next();
    __syncwarp();
  } else {
    Consumer<Shape, kTokens, kShare, kGated> consumer{args, shared_address(ring), full, empty};
    const int tiles = schedule.num_tiles();
#pragma unroll 1
    for (int tile = first_tile; tile < tiles; tile += tile_step) {
      consumer.tile(schedule.group(tile), tile % args.row_tiles);
    }
  }
  // Others may still write to this block, or arrive at its barriers.
  if constexpr (kShare > 1) cluster_sync();
#endif
}

template <int kRows, int kTokens, int kShare, bool kGated>
void launch_tiles(const MoeProduct& product, const DeviceLimits& limits, bool weights_first,
                  const StepContext& ctx) {
  using Shape = MoeWgmmaShape<kRows, kTokens, kShare>;
  const WeightView& weight = product.weight;
  const CUtensorMap map =
      kGated ? expert_pair_map(product, kRows / kShare) : expert_map(product, kRows / kShare);
  constexpr int kOutputs = kGated ? kRows / 2 : kRows;
  MoeWgmmaArgs args{};
  args.x = static_cast<const BFloat16*>(product.x);
  args.out = static_cast<BFloat16*>(product.out);
  args.row_scales = weight.row_scales;
  args.weight_rows = static_cast<int>(product.weight_rows());
  args.rows = product.rows;
  args.schedule = product.schedule;
  args.sorted = product.sorted;
  args.few = product.few;
  args.k = static_cast<int>(weight.cols);
  args.out_cols = static_cast<int>(product.out_cols());
  args.row_tiles = (args.out_cols + kOutputs - 1) / kOutputs;
  args.stages = Shape::stages(moe_block_bytes(limits, Shape::kBlocks));
  args.activation = product.activation;
  args.weights_first = weights_first;
  args.read_once = kTokens <= 64;
  const size_t shared_bytes = Shape::shared_bytes(args.stages);
  auto* kernel = moe_wgmma_kernel<kRows, kTokens, kShare, kGated>;
  allow_shared_memory(kMoeOp, kernel, shared_bytes);
  const int sms = limits.sms - spare_processors(ctx);
  const int64_t at_once = sms * Shape::kBlocks / kShare * kShare;
  const auto blocks = static_cast<unsigned>(std::min(product.max_groups * args.row_tiles, at_once));
  if constexpr (kShare == 1) {
    launch(kMoeOp, ctx, kernel, blocks, Shape::kThreads, shared_bytes, map, args);
  } else {
    launch_cluster(kMoeOp, ctx, kernel, dim3(blocks), dim3(kShare), dim3(Shape::kThreads),
                   shared_bytes, map, args);
  }
}

template <int kRows, int kTokens, int kShare>
void launch_tiles(const MoeProduct& product, const DeviceLimits& limits, bool weights_first,
                  const StepContext& ctx) {
  if (product.gated()) {
    launch_tiles<kRows, kTokens, kShare, true>(product, limits, weights_first, ctx);
  } else {
    launch_tiles<kRows, kTokens, kShare, false>(product, limits, weights_first, ctx);
  }
}

}  // namespace

bool moe_wgmma_supports(const MoeProduct& product) {
  const auto aligned = [](const void* pointer) {
    return reinterpret_cast<uintptr_t>(pointer) % 16 == 0;
  };
  const WeightView& weight = product.weight;
  return product.dtype == DType::kBF16 && weight.dtype == DType::kBF16 && weight.cols % 8 == 0 &&
         product.out_cols() % 8 == 0 && aligned(product.x) && aligned(weight.data) &&
         aligned(product.out) && device_limits().wgmma;
}

MoeCut moe_wgmma_cut(int64_t rows, int64_t top_k, int64_t num_experts) {
  if (rows <= 16) return {.tile_rows = 16};  // a row goes through an expert once
  const int64_t each = rows * top_k / num_experts;
  if (each <= 4) return {.tile_rows = 32};
  // Few pairs have groups that nothing shares out to the blocks of a cluster.
  if (each <= 24 || rows * top_k <= kMoeFewPairs) return {.tile_rows = 64};
  return {.tile_rows = 128, .share = 2};
}

void moe_wgmma(const MoeProduct& product, const MoeCut& cut, bool weights_first,
               const StepContext& ctx) {
  const DeviceLimits limits = device_limits();
  switch (cut.tile_rows) {
    case 16:
      return launch_tiles<64, 16, 1>(product, limits, weights_first, ctx);
    case 32:
      return launch_tiles<128, 32, 1>(product, limits, weights_first, ctx);
    case 64:
      return launch_tiles<128, 64, 1>(product, limits, weights_first, ctx);
    default:
      return launch_tiles<256, 128, 2>(product, limits, weights_first, ctx);
  }
}

}  // namespace mrv1::cuda
