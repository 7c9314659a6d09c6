// Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
//
// What the wgmma kernels of linear have in common: the ring, the sum over the blocks of a cluster,
// maps of tensors, and launching with clusters.
#pragma once

#include <cuda.h>

#include <algorithm>
#include <type_traits>

#include "async_copy.cuh"
#include "linear_skinny_kernels.h"
#include "tensor_cores.cuh"

namespace mrv1::cuda {

constexpr int kGroup = 64;      // columns of a stage: one 128-byte row of the swizzle
constexpr int kRowBytes = 128;  // of a stage
constexpr int kMaxStages = 12;
// A stage is given back once the products of the next one are under way, which therefore must not
// wait for it: with one stage a block of two groups would wait for ever.
constexpr int kMinStages = 2;
constexpr int kMaxSplit = 8;
constexpr int kSwizzleBytes = 1024;  // the period of the swizzle, to which the ring is aligned

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)

// Where the ring begins in a block's shared memory.
__device__ __forceinline__ char* ring_of(char* shared) {
  return shared + (kSwizzleBytes - shared_address(shared) % kSwizzleBytes) % kSwizzleBytes;
}

// Weight rows in pieces of 8 of gate and the 8 of up that go with them:
// [pieces][gate, up][8 rows][columns]
__device__ __forceinline__ void load_pair_tile(void* to, const CUtensorMap& map, uint64_t* barrier,
                                               int col, int piece, uint64_t policy) {
  tma_load_4d(to, map, barrier, col, 0, 0, piece, policy);
}

// Adds up the partial sums of a tile and stores the outputs, a block its share of them. Loads from
// other blocks take long, so many are in flight. In a block the kRows sums of a token lie side by
// side, all of gate before all of up; those of the next token kStride floats on.
template <int kRows, int kStride, int kThreads>
struct Finish {
  uint32_t partial;
  int first_col, first_token, tokens;
  int rank, split;  // this block among those of the tile, and how many they are
  int first_peer;   // rank in the cluster of the first of them
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
              parts[i][which][peer] = ld_shared_v4_f32(address);
            } else if (peer < split) {
              parts[i][which][peer] = ld_shared_cluster_v4_f32(address, first_peer + peer);
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

using EncodeTiled = decltype(&cuTensorMapEncodeTiled);

inline EncodeTiled encode_tiled() {
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

// Describes the weight of a linear in tiles of kRows rows of 64 columns, with an activation as
// load_pair_tile() loads them.
template <int kRows>
CUtensorMap skinny_weight_map(const SkinnyArgs& args) {
  const auto size = [](int64_t value) { return static_cast<cuuint64_t>(value); };
  const cuuint64_t row_bytes = size(args.stride) * 2;
  if (!args.gated()) {
    return tensor_map<2>(args.weight, {size(args.k), size(args.n)}, {row_bytes}, {kGroup, kRows});
  }
  return tensor_map<4>(args.weight, {size(args.k), 8, 2, size(args.out_cols) / 8},
                       {row_bytes, row_bytes * size(args.out_cols), row_bytes * 8},
                       {kGroup, 8, 2, kRows / 16});
}

// Describes its rows of x, in tiles of so many.
inline CUtensorMap skinny_x_map(const SkinnyArgs& args, int tile_tokens) {
  const auto size = [](int64_t value) { return static_cast<cuuint64_t>(value); };
  return tensor_map<2>(args.x, {size(args.k), size(args.tokens)}, {size(args.stride) * 2},
                       {kGroup, static_cast<cuuint32_t>(tile_tokens)});
}

// Whether skinny_store4() may store four at once.
inline bool stores_vectors(const SkinnyArgs& args) {
  return args.out_cols % 4 == 0 && reinterpret_cast<uintptr_t>(args.out) % 16 == 0;
}

// The stages of a ring: as many as asked for, of those that a block has the memory for.
template <typename Shape>
int ring_stages(const SkinnyConfig& config, const DeviceLimits& limits) {
  constexpr size_t kBarriers = sizeof(uint64_t) * 2 * kMaxStages;
  int stages = std::clamp<int>(config.stages, kMinStages, kMaxStages);
  while (stages > kMinStages && Shape::shared_bytes(stages) + kBarriers > limits.shared_bytes) {
    --stages;
  }
  return stages;
}

// launch() with clusters.
template <typename... Params>
void launch_cluster(std::string_view op, const StepContext& ctx, void (*kernel)(Params...),
                    dim3 grid, dim3 cluster, dim3 block, size_t shared_bytes,
                    std::type_identity_t<Params>... args) {
  const OpRange range(op);
  cudaLaunchAttribute attributes[2]{};
  attributes[0].id = cudaLaunchAttributeClusterDimension;
  attributes[0].val.clusterDim.x = cluster.x;
  attributes[0].val.clusterDim.y = cluster.y;
  attributes[0].val.clusterDim.z = cluster.z;
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
  count_launch(ctx);
  check_kernel(op, ctx, status, grid, block, shared_bytes);
}

}  // namespace mrv1::cuda
