// Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
//
// A thread writes a row.
#include "launch.h"
#include "ops/sampling_rows.h"

namespace mrv1 {
namespace {

constexpr int kThreads = 128;

__global__ void __launch_bounds__(kThreads) sampling_rows_kernel(SamplingRowsParams params) {
  cuda::launch_next();
  cuda::wait_for_previous();
  const int64_t row = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (row < params.num_rows) write_sampling_row(params, row);
}

}  // namespace

void sampling_rows_cuda(const SamplingRowsParams& params, const StepContext& ctx) {
  if (params.num_rows == 0) return;
  const auto blocks = static_cast<unsigned>((params.num_rows + kThreads - 1) / kThreads);
  cuda::launch("sampling_rows", ctx, sampling_rows_kernel, dim3(blocks), dim3(kThreads), 0, params);
}

}  // namespace mrv1
