// Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
#include <algorithm>
#include <limits>

#include "linear_skinny_kernels.h"

namespace mrv1::cuda {
namespace {

bool aligned(const void* pointer) { return reinterpret_cast<uintptr_t>(pointer) % 16 == 0; }

int attribute(cudaDeviceAttr which, int device) {
  int value = 0;
  check_cuda(cudaDeviceGetAttribute(&value, which, device), kSkinnyOp, "cudaDeviceGetAttribute");
  return value;
}

}  // namespace

DeviceLimits device_limits() {
  int device = 0;
  check_cuda(cudaGetDevice(&device), kSkinnyOp, "cudaGetDevice");
  return {attribute(cudaDevAttrMultiProcessorCount, device),
          attribute(cudaDevAttrComputeCapabilityMajor, device)};
}

bool skinny_supports(const LinearParams& params, int64_t rows) {
  constexpr int64_t kMaxInt = std::numeric_limits<int32_t>::max();
  const WeightView& weight = params.weight;
  return params.dtype == DType::kBF16 && weight.dtype == DType::kBF16 &&
         weight.layout == WeightLayout::kRowMajor && weight.cols % 8 == 0 && weight.cols > 0 &&
         aligned(params.x) && aligned(weight.data) && rows < kMaxInt && weight.rows < kMaxInt / 2 &&
         weight.cols < kMaxInt / 2 && device_limits().major >= 8;
}

std::span<const SkinnyConfig> skinny_configs(int64_t rows, int64_t n, int64_t k, bool silu) {
  static constexpr SkinnyConfig kConfigs[] = {{SkinnyEngine::kMma, 8, 1, 3, 32}};
  return kConfigs;
}

SkinnyConfig skinny_default(int64_t rows, int64_t n, int64_t k, bool silu) {
  return {SkinnyEngine::kMma, 8, 1, 3, 32};
}

SkinnyConfig skinny_invariant(int64_t n, int64_t k, bool silu) {
  return {SkinnyEngine::kMma, 8, 1, 3, 32};
}

int64_t skinny_workspace_bytes(const SkinnyConfig&, int64_t, int64_t, int64_t) { return 0; }

void linear_skinny(const LinearParams& params, const SkinnyConfig& config, int64_t rows,
                   const StepContext& ctx) {
  const SkinnyArgs args = {
      .x = static_cast<const BFloat16*>(params.x),
      .weight = static_cast<const BFloat16*>(params.weight.data),
      .bias = params.bias,
      .out = params.out,
      .tokens = static_cast<int>(rows),
      .n = static_cast<int>(params.weight.rows),
      .k = static_cast<int>(params.weight.cols),
      .out_cols = static_cast<int>(params.silu_mul ? params.weight.rows / 2 : params.weight.rows),
      .silu = params.silu_mul,
      .out_f32 = params.out_dtype == DType::kF32,
  };
  const DeviceLimits limits = device_limits();
  switch (config.engine) {
    case SkinnyEngine::kMma:
      return skinny_mma(args, config, limits, ctx);
    case SkinnyEngine::kWgmma:
      return skinny_wgmma(args, config, limits, ctx);
  }
}

}  // namespace mrv1::cuda
