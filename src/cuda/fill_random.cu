// Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
//
// Values from a counter hash: each is computed on its own, and the hash costs more than the store,
// so a thread takes one element at a time and neighbours store next to each other.
#include <algorithm>

#include "launch.h"
#include "ops/fill_random.h"

namespace mrv1 {
namespace {

constexpr int kThreads = 256;
constexpr int64_t kMaxBlocks = 4096;

template <typename T>
__global__ void __launch_bounds__(kThreads) fill_random_kernel(FillRandomParams params) {
  cuda::launch_next();
  cuda::wait_for_previous();
  T* data = static_cast<T*>(params.data);
  const int64_t stride = int64_t{gridDim.x} * kThreads;
  for (int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x; i < params.count; i += stride) {
    const float unit = random_unit(params.key, params.first + static_cast<uint64_t>(i));
    // Not fused, as on the CPU.
    const float value = __fadd_rn(params.center, __fmul_rn(params.width, unit));
    const BFloat16 rounded = from_float<BFloat16>(value);
    data[i] = from_float<T>(to_float(rounded));
  }
}

__global__ void __launch_bounds__(kThreads) fill_random_bytes_kernel(FillRandomParams params) {
  cuda::launch_next();
  cuda::wait_for_previous();
  auto* bytes = static_cast<uint8_t*>(params.data);
  const int64_t stride = int64_t{gridDim.x} * kThreads;
  for (int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x; i < params.count; i += stride) {
    bytes[i] = random_byte(params.key, params.first + static_cast<uint64_t>(i));
  }
}

}  // namespace

void fill_random_cuda(const FillRandomParams& params, const StepContext& ctx) {
  check_params(params);
  if (params.count == 0) return;
  const int64_t blocks = std::min(kMaxBlocks, (params.count + kThreads - 1) / kThreads);
  if (params.dtype == DType::kE2M1) {
    cuda::launch("fill_random", ctx, fill_random_bytes_kernel, dim3(static_cast<unsigned>(blocks)),
                 dim3(kThreads), 0, params);
    return;
  }
  dispatch_cache(params.dtype, "fill_random", [&](auto tag) {
    cuda::launch("fill_random", ctx, fill_random_kernel<typename decltype(tag)::type>,
                 dim3(static_cast<unsigned>(blocks)), dim3(kThreads), 0, params);
  });
}

}  // namespace mrv1
