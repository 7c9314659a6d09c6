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
#include <cuda.h>

#include <algorithm>

#include "linear_skinny_kernels.h"

namespace mrv1::cuda {
namespace {

constexpr int kGroup = 64;      // columns of a stage: one 128-byte row of the swizzle
constexpr int kRowBytes = 128;  // of a stage
constexpr int kMaxStages = 12;
constexpr int kMaxSplit = 8;
constexpr int kSwizzleBytes = 1024;  // the period of the swizzle, to which the ring is aligned

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)

__device__ __forceinline__ uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

__device__ __forceinline__ void barrier_init(uint64_t* barrier, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)),
               "r"(arrivals)
               : "memory");
}

__device__ __forceinline__ void barrier_arrive(uint64_t* barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier))
               : "memory");
}

__device__ __forceinline__ void barrier_expect(uint64_t* barrier, int bytes) {
  asm volatile(
      "mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)),
      "r"(bytes)
      : "memory");
}

__device__ __forceinline__ void barrier_wait(uint64_t* barrier, int parity) {
  uint32_t done = 0;
  while (done == 0) {
    asm volatile(
        "{\n"
        ".reg .pred complete;\n"
        "mbarrier.try_wait.parity.shared::cta.b64 complete, [%1], %2;\n"
        "selp.u32 %0, 1, 0, complete;\n"
        "}"
        : "=r"(done)
        : "r"(shared_address(barrier)), "r"(parity)
        : "memory");
  }
}

__device__ __forceinline__ void load_tile(void* to, const CUtensorMap& map, uint64_t* barrier,
                                          int col, int row) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, "
      "{%3, %4}], [%2];" ::"r"(shared_address(to)),
      "l"(&map), "r"(shared_address(barrier)), "r"(col), "r"(row)
      : "memory");
}

__device__ __forceinline__ void prefetch_map(const CUtensorMap& map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(&map) : "memory");
}

// [pieces of 8 + 8 rows][gate, up][8 rows][columns]
__device__ __forceinline__ void load_pair_tile(void* to, const CUtensorMap& map, uint64_t* barrier,
                                               int col, int piece) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, "
      "{%3, %4, %4, %5}], [%2];" ::"r"(shared_address(to)),
      "l"(&map), "r"(shared_address(barrier)), "r"(col), "r"(0), "r"(piece)
      : "memory");
}

// Describes a tile of rows of 128 bytes, swizzled by 128 bytes, 8 rows after 8 rows.
__device__ __forceinline__ uint64_t tile_descriptor(uint32_t address) {
  return uint64_t{(address & 0x3ffff) >> 4} | uint64_t{1} << 16 | uint64_t{1024 >> 4} << 32 |
         uint64_t{1} << 62;
}

__device__ __forceinline__ void multiply_fence() {
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}
__device__ __forceinline__ void multiply_commit() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}
template <int kPending>
__device__ __forceinline__ void multiply_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}

// sum += a b over 16 columns, for 16 tokens.
__device__ __forceinline__ void multiply(float (&sum)[8], uint64_t a, uint64_t b) {
  asm volatile(
      "wgmma.mma_async.sync.aligned.m64n16k16.f32.bf16.bf16 {"
      "%0, %1, %2, %3, %4, %5, %6, %7"
      "}, %8, %9, 1, 1, 1, 0, 0;"
      : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3]), "+f"(sum[4]), "+f"(sum[5]),
        "+f"(sum[6]), "+f"(sum[7])
      : "l"(a), "l"(b));
}

// sum += a b over 16 columns, for 32 tokens.
__device__ __forceinline__ void multiply(float (&sum)[16], uint64_t a, uint64_t b) {
  asm volatile(
      "wgmma.mma_async.sync.aligned.m64n32k16.f32.bf16.bf16 {"
      "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15"
      "}, %16, %17, 1, 1, 1, 0, 0;"
      : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3]), "+f"(sum[4]), "+f"(sum[5]),
        "+f"(sum[6]), "+f"(sum[7]), "+f"(sum[8]), "+f"(sum[9]), "+f"(sum[10]), "+f"(sum[11]),
        "+f"(sum[12]), "+f"(sum[13]), "+f"(sum[14]), "+f"(sum[15])
      : "l"(a), "l"(b));
}

// sum += a b over 16 columns, for 64 tokens.
__device__ __forceinline__ void multiply(float (&sum)[32], uint64_t a, uint64_t b) {
  asm volatile(
      "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 {"
      "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
      "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
      "}, %32, %33, 1, 1, 1, 0, 0;"
      : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3]), "+f"(sum[4]), "+f"(sum[5]),
        "+f"(sum[6]), "+f"(sum[7]), "+f"(sum[8]), "+f"(sum[9]), "+f"(sum[10]), "+f"(sum[11]),
        "+f"(sum[12]), "+f"(sum[13]), "+f"(sum[14]), "+f"(sum[15]), "+f"(sum[16]), "+f"(sum[17]),
        "+f"(sum[18]), "+f"(sum[19]), "+f"(sum[20]), "+f"(sum[21]), "+f"(sum[22]), "+f"(sum[23]),
        "+f"(sum[24]), "+f"(sum[25]), "+f"(sum[26]), "+f"(sum[27]), "+f"(sum[28]), "+f"(sum[29]),
        "+f"(sum[30]), "+f"(sum[31])
      : "l"(a), "l"(b));
}

// sum += a b over 16 columns, for 128 tokens.
__device__ __forceinline__ void multiply(float (&sum)[64], uint64_t a, uint64_t b) {
  asm volatile(
      "wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 {"
      "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
      "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "
      "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "
      "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
      "}, %64, %65, 1, 1, 1, 0, 0;"
      : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3]), "+f"(sum[4]), "+f"(sum[5]),
        "+f"(sum[6]), "+f"(sum[7]), "+f"(sum[8]), "+f"(sum[9]), "+f"(sum[10]), "+f"(sum[11]),
        "+f"(sum[12]), "+f"(sum[13]), "+f"(sum[14]), "+f"(sum[15]), "+f"(sum[16]), "+f"(sum[17]),
        "+f"(sum[18]), "+f"(sum[19]), "+f"(sum[20]), "+f"(sum[21]), "+f"(sum[22]), "+f"(sum[23]),
        "+f"(sum[24]), "+f"(sum[25]), "+f"(sum[26]), "+f"(sum[27]), "+f"(sum[28]), "+f"(sum[29]),
        "+f"(sum[30]), "+f"(sum[31]), "+f"(sum[32]), "+f"(sum[33]), "+f"(sum[34]), "+f"(sum[35]),
        "+f"(sum[36]), "+f"(sum[37]), "+f"(sum[38]), "+f"(sum[39]), "+f"(sum[40]), "+f"(sum[41]),
        "+f"(sum[42]), "+f"(sum[43]), "+f"(sum[44]), "+f"(sum[45]), "+f"(sum[46]), "+f"(sum[47]),
        "+f"(sum[48]), "+f"(sum[49]), "+f"(sum[50]), "+f"(sum[51]), "+f"(sum[52]), "+f"(sum[53]),
        "+f"(sum[54]), "+f"(sum[55]), "+f"(sum[56]), "+f"(sum[57]), "+f"(sum[58]), "+f"(sum[59]),
        "+f"(sum[60]), "+f"(sum[61]), "+f"(sum[62]), "+f"(sum[63])
      : "l"(a), "l"(b));
}

__device__ __forceinline__ void cluster_sync() {
  asm volatile(
      "barrier.cluster.arrive.release.aligned;\n"
      "barrier.cluster.wait.acquire.aligned;" ::
          : "memory");
}

__device__ __forceinline__ float4 load_own(uint32_t address) {
  float4 value;
  asm volatile("ld.shared.v4.f32 {%0, %1, %2, %3}, [%4];"
               : "=f"(value.x), "=f"(value.y), "=f"(value.z), "=f"(value.w)
               : "r"(address)
               : "memory");
  return value;
}

__device__ __forceinline__ float4 load_peer(uint32_t address, int rank) {
  float4 value;
  asm volatile(
      "{\n"
      ".reg .b32 there;\n"
      "mapa.shared::cluster.u32 there, %4, %5;\n"
      "ld.shared::cluster.v4.f32 {%0, %1, %2, %3}, [there];\n"
      "}"
      : "=f"(value.x), "=f"(value.y), "=f"(value.z), "=f"(value.w)
      : "r"(address), "r"(rank)
      : "memory");
  return value;
}

#endif  // __CUDA_ARCH_FEAT_SM90_ALL

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

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)

// Adds up the partial sums of a tile and stores the outputs, a block its share of them. Loads from
// other blocks take long, so many are in flight.
template <int kRows>
struct Finish {
  static constexpr int kThreads = kRows * 2 + 32;
  static constexpr int kStride = kRows + 4;

  uint32_t partial;
  int first_col, first_token, tokens;
  int rank, split;
  bool vector_stores;

  template <bool kGated>
  __device__ __forceinline__ void run(const SkinnyArgs& args) const {
    if (split == 1) return sum<kGated, 1>(args);
    if (split == 2) return sum<kGated, 2>(args);
    if (split <= 4) return sum<kGated, 4>(args);
    sum<kGated, kMaxSplit>(args);
  }

  template <bool kGated, int kPeers>
  __device__ __forceinline__ void sum(const SkinnyArgs& args) const {
    constexpr int kSums = kGated ? 2 : 1;
    constexpr int kQuads = kRows / 4 / kSums;  // outputs of a token, four at a time
    constexpr int kAtOnce = std::max(1, 8 / (kPeers * kSums));
    const int count = tokens * kQuads;
    const int step = split * kThreads;
    for (int first = rank * kThreads + threadIdx.x; first < count; first += step * kAtOnce) {
      float4 parts[kAtOnce][kSums][kPeers];
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
        const int at = first + i * step;
        if (at >= count) continue;
#pragma unroll
        for (int which = 0; which < kSums; ++which) {
          const uint32_t address =
              partial + (at / kQuads * kStride + at % kQuads * 4 + which * (kRows / 2)) * 4;
#pragma unroll
          for (int peer = 0; peer < kPeers; ++peer) {
            if (kPeers == 1 || peer == rank) {
              parts[i][which][peer] = load_own(address);
            } else if (peer < split) {
              parts[i][which][peer] = load_peer(address, peer);
            }
          }
        }
      }
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
        const int at = first + i * step;
        const int col = first_col + at % kQuads * 4;
        if (at >= count || col >= args.out_cols) continue;
        float values[kSums][4];
#pragma unroll
        for (int which = 0; which < kSums; ++which) {
          float4 total = parts[i][which][0];
#pragma unroll
          for (int peer = 1; peer < kPeers; ++peer) {
            if (peer >= split) continue;
            total.x += parts[i][which][peer].x;
            total.y += parts[i][which][peer].y;
            total.z += parts[i][which][peer].z;
            total.w += parts[i][which][peer].w;
          }
          values[which][0] = total.x;
          values[which][1] = total.y;
          values[which][2] = total.z;
          values[which][3] = total.w;
        }
        if (args.bias != nullptr) {
#pragma unroll
          for (int j = 0; j < 4; ++j) {
            if (col + j >= args.out_cols) continue;
            values[0][j] += args.bias[col + j];
            if (kGated) values[kSums - 1][j] += args.bias[args.out_cols + col + j];
          }
        }
        if (kGated) {
#pragma unroll
          for (int j = 0; j < 4; ++j) {
            values[0][j] = skinny_gated_mul(args.activation, values[0][j], values[kSums - 1][j]);
          }
        }
        skinny_store4(args, first_token + at / kQuads, col, values[0], vector_stores);
      }
    }
  }
};

#endif  // __CUDA_ARCH_FEAT_SM90_ALL

template <int kRows, int kTokens>
__global__ void __launch_bounds__(WgmmaShape<kRows, kTokens>::kThreads, kRows <= 128 ? 2 : 1)
    wgmma_kernel(const __grid_constant__ CUtensorMap weight_map,
                 const __grid_constant__ CUtensorMap x_map, SkinnyArgs args, int tile_tokens,
                 int stages, bool vector_stores) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  using Shape = WgmmaShape<kRows, kTokens>;
  constexpr int kStride = Shape::kPartialStride;
  extern __shared__ char unaligned[];
  char* ring =
      unaligned + (kSwizzleBytes - shared_address(unaligned) % kSwizzleBytes) % kSwizzleBytes;
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
      barrier_init(&full[s], 1);
      barrier_init(&empty[s], kRows / 64);
    }
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  }
  __syncthreads();

  float sums[kTokens / 2];
  if (threadIdx.x >= kRows * 2) {
    if (threadIdx.x == kRows * 2) {
      prefetch_map(x_map);
      const auto column = [&](int group) { return (first_group + group) * kGroup; };
      const auto load_weight = [&](int group, int stage) {
        char* to = ring + stage * Shape::kStageBytes;
        barrier_expect(&full[stage], Shape::kWeightBytes + tile_tokens * kRowBytes);
        if (args.gated()) {
          load_pair_tile(to, weight_map, &full[stage], column(group), first_row / 16);
        } else {
          load_tile(to, weight_map, &full[stage], column(group), first_row);
        }
      };
      const auto load_x = [&](int group, int stage) {
        load_tile(ring + stage * Shape::kStageBytes + Shape::kWeightBytes, x_map, &full[stage],
                  column(group), first_token);
      };
      const int ahead = min(stages, num_groups);
      for (int s = 0; s < ahead; ++s) load_weight(s, s);
      wait_for_previous();
      for (int s = 0; s < ahead; ++s) load_x(s, s);
      int stage = 0;
      int parity = 0;
      for (int group = ahead; group < num_groups; ++group) {
        barrier_wait(&empty[stage], parity);
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
      barrier_wait(&full[stage], parity);
      const uint32_t at = shared_address(ring + stage * Shape::kStageBytes);
      const uint64_t a = tile_descriptor(at + warpgroup * 64 * kRowBytes);
      const uint64_t b = tile_descriptor(at + Shape::kWeightBytes);
      multiply_fence();
#pragma unroll
      for (int k = 0; k < kGroup / 16; ++k) multiply(sums, a + k * 2, b + k * 2);
      multiply_commit();
      if (group > 0) {
        multiply_wait<1>();
        if (threadIdx.x % 128 == 0) barrier_arrive(&empty[previous]);
      }
      previous = stage;
      if (++stage == stages) {
        stage = 0;
        parity ^= 1;
      }
    }
    multiply_wait<0>();
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

  const Finish<kRows> finish{shared_address(partial),
                             static_cast<int>(blockIdx.z) * (args.gated() ? kRows / 2 : kRows),
                             first_token,
                             min(tile_tokens, args.tokens - first_token),
                             rank,
                             split,
                             vector_stores};
  if (args.gated()) {
    finish.template run<true>(args);
  } else {
    finish.template run<false>(args);
  }
  if (split > 1) cluster_sync();  // peers may still read this block's partial sums
#endif
}

using EncodeTiled = decltype(&cuTensorMapEncodeTiled);

EncodeTiled encode_tiled() {
  static const EncodeTiled encode = [] {
    void* entry = nullptr;
    cudaDriverEntryPointQueryResult found{};
    check_cuda(cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &entry, 12000,
                                                cudaEnableDefault, &found),
               kSkinnyOp, "cudaGetDriverEntryPointByVersion");
    if (found != cudaDriverEntryPointSuccess || entry == nullptr) {
      fail(ErrorKind::kDevice, kSkinnyOp, "the driver has no cuTensorMapEncodeTiled");
    }
    return reinterpret_cast<EncodeTiled>(entry);
  }();
  return encode;
}

template <int kDims>
CUtensorMap tensor_map(const void* data, const cuuint64_t (&sizes)[kDims],
                       const cuuint64_t (&strides)[kDims - 1], const cuuint32_t (&box)[kDims]) {
  CUtensorMap map;
  cuuint32_t ones[kDims];
  std::fill(ones, ones + kDims, 1);
  const CUresult status =
      encode_tiled()(&map, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, kDims, const_cast<void*>(data), sizes,
                     strides, box, ones, CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
                     CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (status != CUDA_SUCCESS) {
    fail(ErrorKind::kDevice, kSkinnyOp,
         "cuTensorMapEncodeTiled failed: ", static_cast<int>(status));
  }
  return map;
}

// launch() with clusters along x.
template <typename... Params>
void launch_cluster(const StepContext& ctx, void (*kernel)(Params...), dim3 grid, dim3 block,
                    size_t shared_bytes, std::type_identity_t<Params>... args) {
  const OpRange range(kSkinnyOp);
  cudaLaunchAttribute attributes[2]{};
  attributes[0].id = cudaLaunchAttributeClusterDimension;
  attributes[0].val.clusterDim.x = grid.x;
  attributes[0].val.clusterDim.y = 1;
  attributes[0].val.clusterDim.z = 1;
  attributes[1].id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attributes[1].val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = block;
  config.dynamicSmemBytes = shared_bytes;
  config.stream = stream_of(ctx);
  config.attrs = attributes;
  config.numAttrs = may_overlap(ctx) ? 2 : 1;
  const cudaError_t status = cudaLaunchKernelEx(&config, kernel, args...);
  if (ctx.device != nullptr) ++ctx.device->counters().kernel_launches;
  check_kernel(kSkinnyOp, ctx, status, grid, block, shared_bytes);
}

template <int kRows, int kTokens>
void launch_wgmma(const SkinnyArgs& args, const SkinnyConfig& config, const DeviceLimits& limits,
                  const StepContext& ctx) {
  using Shape = WgmmaShape<kRows, kTokens>;
  const auto size = [](int64_t value) { return static_cast<cuuint64_t>(value); };
  const cuuint64_t row_bytes = size(args.k) * 2;
  const CUtensorMap weight_map =
      args.gated()
          ? tensor_map<4>(args.weight, {size(args.k), 8, 2, size(args.out_cols) / 8},
                          {row_bytes, row_bytes * size(args.out_cols), row_bytes * 8},
                          {kGroup, 8, 2, kRows / 16})
          : tensor_map<2>(args.weight, {size(args.k), size(args.n)}, {row_bytes}, {kGroup, kRows});
  // Even tiles of tokens, as TMA is slow to fill rows beyond the last one with zeros. What lies in
  // the rest of a stage only reaches sums that nobody stores.
  const int tiles = (args.tokens + kTokens - 1) / kTokens;
  const int tile_tokens = (args.tokens + tiles - 1) / tiles;
  const CUtensorMap x_map = tensor_map<2>(args.x, {size(args.k), size(args.tokens)}, {row_bytes},
                                          {kGroup, static_cast<cuuint32_t>(tile_tokens)});

  int stages = std::clamp<int>(config.stages, 1, kMaxStages);
  while (stages > 1 &&
         Shape::shared_bytes(stages) + sizeof(uint64_t) * 2 * kMaxStages > limits.shared_bytes) {
    --stages;
  }
  const size_t shared_bytes = Shape::shared_bytes(stages);
  allow_shared_memory(kSkinnyOp, wgmma_kernel<kRows, kTokens>, shared_bytes);
  const int outputs = args.gated() ? kRows / 2 : kRows;
  const dim3 grid(config.split, tiles, (args.out_cols + outputs - 1) / outputs);
  const bool vector_stores =
      args.out_cols % 4 == 0 && reinterpret_cast<uintptr_t>(args.out) % 16 == 0;
  launch_cluster(ctx, wgmma_kernel<kRows, kTokens>, grid, dim3(Shape::kThreads), shared_bytes,
                 weight_map, x_map, args, tile_tokens, stages, vector_stores);
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

void skinny_wgmma(const SkinnyArgs& args, const SkinnyConfig& config, const DeviceLimits& limits,
                  const StepContext& ctx) {
  check(limits.wgmma, kSkinnyOp, "config.engine is kWgmma; it must be kMma on this GPU");
  check(config.split >= 1 && config.split <= kMaxSplit, kSkinnyOp, "config.split is ",
        +config.split, "; it must be in [1, ", kMaxSplit, "]");
  switch (config.tile_rows) {
    case 64:
      return launch_wgmma<64>(args, config, limits, ctx);
    case 128:
      return launch_wgmma<128>(args, config, limits, ctx);
    case 192:
      return launch_wgmma<192>(args, config, limits, ctx);
    case 256:
      return launch_wgmma<256>(args, config, limits, ctx);
    default:
      fail(ErrorKind::kInvalidArgument, kSkinnyOp, "config.tile_rows is ", config.tile_rows,
           "; it must be 64, 128, 192 or 256 with kWgmma");
  }
}

}  // namespace mrv1::cuda
