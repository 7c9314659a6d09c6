// Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
//
// Between linear_skinny.cc and the kernels.
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#include "activation.cuh"
#endif
#include "launch.h"
#include "linear_skinny.h"

namespace mrv1::cuda {

constexpr std::string_view kSkinnyOp = "linear";

// What the kernels get of a linear.
struct SkinnyArgs {
  const BFloat16* x;       // [tokens, k], rows `stride` apart
  const BFloat16* weight;  // [n, k], rows `stride` apart
  const float* bias;       // [n] or null
  void* out;               // [tokens, out_cols], bfloat16 or float32
  int tokens, n, k;
  int stride;    // elements, a multiple of 8
  int out_cols;  // n, or n / 2 if gated
  Activation activation;
  bool out_f32;

  MRV1_HD bool gated() const { return activation != Activation::kNone; }
};

struct DeviceLimits {
  int sms = 0;
  int major = 0;
  size_t shared_bytes = 0;  // of a block, at most
  bool wgmma = false;       // the GPU has it, and this build the code for it
};
DeviceLimits device_limits();

// Whether the code that runs on this GPU was built for sm_90a.
bool wgmma_is_built();

void skinny_mma(const SkinnyArgs& args, const SkinnyConfig& config, const DeviceLimits& limits,
                const StepContext& ctx);
void skinny_wgmma(const SkinnyArgs& args, const SkinnyConfig& config, const DeviceLimits& limits,
                  const StepContext& ctx);
bool wgmma_offers(const SkinnyConfig& config);
void skinny_wide(const SkinnyArgs& args, const SkinnyConfig& config, const DeviceLimits& limits,
                 const StepContext& ctx);

// What kWide offers: tiles of so many weight rows ...
constexpr int kWideRows[] = {64, 96, 112, 128, 192, 224};
bool wide_offers(const SkinnyConfig& config);
// ... and, with those, so many tokens. More are cut into even tiles.
int wide_tile_tokens(int tile_rows);
// How many clusters of so many blocks run at once on the current device.
int wide_clusters(int blocks);

#if defined(__CUDACC__)
// How the second cache keeps weights. A step streams many times what the cache holds: those that it
// reads once leave first, so as not to drive out what it reads again and again, which is small
// arrays, and the code of its kernels. Device code, like all below.
__device__ __forceinline__ uint64_t weight_policy(bool read_once) {
  uint64_t policy;
  if (read_once) {
    asm("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
  } else {
    asm("createpolicy.fractional.L2::evict_normal.b64 %0, 1.0;" : "=l"(policy));
  }
  return policy;
}

// Stores one output of a token.
__device__ __forceinline__ void skinny_store(const SkinnyArgs& args, int token, int col,
                                             float value) {
  const int64_t at = int64_t{token} * args.out_cols + col;
  if (args.out_f32) {
    static_cast<float*>(args.out)[at] = value;
  } else {
    static_cast<BFloat16*>(args.out)[at] = from_float<BFloat16>(value);
  }
}

// Stores four neighbours; `whole` says that they may be stored at once.
__device__ __forceinline__ void skinny_store4(const SkinnyArgs& args, int token, int col,
                                              const float (&values)[4], bool whole) {
  if (!whole) {
    for (int i = 0; i < 4 && col + i < args.out_cols; ++i) {
      skinny_store(args, token, col + i, values[i]);
    }
    return;
  }
  const int64_t at = int64_t{token} * args.out_cols + col;
  if (args.out_f32) {
    *reinterpret_cast<float4*>(static_cast<float*>(args.out) + at) =
        make_float4(values[0], values[1], values[2], values[3]);
  } else {
    const auto bits = [&](int i) { return uint32_t{from_float<BFloat16>(values[i]).bits}; };
    *reinterpret_cast<uint2*>(static_cast<BFloat16*>(args.out) + at) =
        make_uint2(bits(0) | bits(1) << 16, bits(2) | bits(3) << 16);
  }
}

// activation(gate) * up, both rounded to bfloat16 first.
__device__ __forceinline__ float skinny_gated_mul(Activation activation, float gate, float up) {
  return gated_mul(activation, to_float(from_float<BFloat16>(gate)),
                   to_float(from_float<BFloat16>(up)));
}
#endif

}  // namespace mrv1::cuda
