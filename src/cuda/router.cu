// Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
//
// A router of few tokens in one launch, on Hopper: a cluster whose warps have an expert each, and
// its weights in registers before the kernel waits for the one before it. The first block of the
// cluster gets the logits and chooses. More tokens, and batch-invariant steps, take linear and
// moe_route.
#include "launch.h"
#include "linear_wgmma.cuh"
#include "moe_route.cuh"
#include "ops/router.h"
#include "shared_memory.cuh"
#include "vector.cuh"

namespace mrv1 {
namespace cuda {
namespace {

constexpr std::string_view kOp = "router";
constexpr int kBlocks = 8;     // of the cluster
constexpr int kMaxWarps = 16;  // of a block
constexpr int kMaxExperts = kBlocks * kMaxWarps;
constexpr int kMaxTokens = 4;
constexpr int kMaxVectors = 16;  // of 8 weights, of a lane
constexpr int kSize = kVectorSize<BFloat16>;

// kVectors vectors of a lane at most.
template <int kVectors>
__global__ void __launch_bounds__(kMaxWarps* kWarpSize)
    router_kernel(RouterParams params, const int32_t* token_batch, int32_t num_tokens) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  __shared__ RouteScratch scratch;
  __shared__ float logits[kMaxTokens][kMaxExperts];
  const LinearParams& linear = params.linear;
  const int lane = threadIdx.x % kWarpSize;
  const int expert = blockIdx.x * (blockDim.x / kWarpSize) + threadIdx.x / kWarpSize;
  const bool exists = expert < params.route.num_experts;
  const int vectors = static_cast<int>(linear.weight.cols) / kSize;
  uint4 weight[kVectors];
  if (exists) {
    const BFloat16* from =
        static_cast<const BFloat16*>(linear.weight.data) + int64_t{expert} * linear.weight.cols;
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
      const int at = i * kWarpSize + lane;
      if (at < vectors) weight[i] = load_vector(from, at);
    }
  }
  const bool routes = blockIdx.x == 0;
  float bias = 0.0f;
  if (routes && params.route.bias != nullptr &&
      static_cast<int>(threadIdx.x) < params.route.num_experts) {
    bias = params.route.bias[threadIdx.x];
  }
  launch_next();
  cluster_arrive();  // nobody reaches into the first block before it is there
  wait_for_previous();
  float sums[kMaxTokens] = {};
  if (exists) {
    for (int token = 0; token < num_tokens; ++token) {
      const BFloat16* x =
          static_cast<const BFloat16*>(linear.x) + int64_t{token} * linear.weight.cols;
      float sum = 0.0f;
#pragma unroll
      for (int i = 0; i < kVectors; ++i) {
        const int at = i * kWarpSize + lane;
        if (at >= vectors) continue;
        float a[kSize], b[kSize];
        unpack(load_vector(x, at), a);
        unpack(weight[i], b);
#pragma unroll
        for (int j = 0; j < kSize; ++j) sum = fmaf(a[j], b[j], sum);
      }
      sum = warp_sum(sum);
#pragma unroll
      for (int t = 0; t < kMaxTokens; ++t) {
        if (t == token) sums[t] = sum;
      }
    }
  }
  cluster_wait();
  if (exists && lane < num_tokens) {
    const float mine = lane == 0 ? sums[0] : lane == 1 ? sums[1] : lane == 2 ? sums[2] : sums[3];
    static_cast<float*>(linear.out)[int64_t{lane} * params.route.num_experts + expert] = mine;
    st_shared_cluster_f32(shared_address(&logits[lane][expert]), /*rank=*/0, mine);
  }
  cluster_sync();
  if (!routes) return;
  const bool has_logit = static_cast<int>(threadIdx.x) < params.route.num_experts;
  for (int token = 0; token < num_tokens; ++token) {
    const float logit = has_logit ? logits[token][threadIdx.x] : 0.0f;
    route_by_count(params.route, token_batch, token, logit, bias, scratch);
  }
#endif
}

bool is_few(const RouterParams& params, const StepContext& ctx) {
  const LinearParams& linear = params.linear;
  return ctx.sizes.num_tokens <= kMaxTokens && !ctx.batch_invariant &&
         linear.dtype == DType::kBF16 && linear.weight.dtype == DType::kBF16 &&
         linear.weight.layout == WeightLayout::kRowMajor && linear.weight.cols % kSize == 0 &&
         linear.weight.cols <= kMaxVectors * kWarpSize * kSize &&
         params.route.num_experts <= kMaxExperts && linear.bias == nullptr &&
         is_vector_aligned(linear.x) && is_vector_aligned(linear.weight.data) &&
         device_limits().wgmma;
}

void route_few(const RouterParams& params, const StepContext& ctx) {
  const int warps = (params.route.num_experts + kBlocks - 1) / kBlocks;
  constexpr int kFew = kMaxVectors / 2;
  auto* kernel = params.linear.weight.cols <= kFew * kWarpSize * kSize ? router_kernel<kFew>
                                                                       : router_kernel<kMaxVectors>;
  launch_cluster(kOp, ctx, kernel, dim3(kBlocks), dim3(kBlocks), dim3(warps * kWarpSize), 0, params,
                 ctx.infer.token_batch, ctx.sizes.num_tokens);
}

}  // namespace
}  // namespace cuda

void router_cuda(const RouterParams& params, const StepContext& ctx) {
  if (ctx.sizes.num_tokens == 0) return;
  if (cuda::is_few(params, ctx)) return cuda::route_few(params, ctx);
  linear_cuda(params.linear, ctx);
  moe_route_cuda(params.route, ctx);
}

}  // namespace mrv1
