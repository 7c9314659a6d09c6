// Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
#include "launch.h"

#include "core/device.h"

namespace mrv1::cuda {
namespace {

std::string extent_text(dim3 extent) {
  return concat("(", extent.x, ", ", extent.y, ", ", extent.z, ")");
}

}  // namespace

bool may_overlap(const StepContext& ctx) {
  return ctx.overlap_launches && ctx.device != nullptr && ctx.device->overlaps_launches();
}

void count_launch(const StepContext& ctx) {
  if (ctx.device != nullptr) ++ctx.device->counters().kernel_launches;
}

void check_kernel(std::string_view op, const StepContext& ctx, cudaError_t status, dim3 grid,
                  dim3 block, size_t shared_bytes) {
  std::string_view when = "launch";
  if (status == cudaSuccess && ctx.sync_launches) {
    cudaStreamCaptureStatus capture = cudaStreamCaptureStatusNone;
    status = cudaStreamIsCapturing(stream_of(ctx), &capture);
    if (status == cudaSuccess && capture == cudaStreamCaptureStatusNone) {
      when = "run";
      status = cudaStreamSynchronize(stream_of(ctx));
    }
  }
  if (status == cudaSuccess) [[likely]] {
    return;
  }
  cudaGetLastError();  // an error that is not sticky must not be blamed on a later launch
  fail(ErrorKind::kDevice, op, "kernel ", when, " failed: ", cudaGetErrorName(status), " (",
       cudaGetErrorString(status), "); grid ", extent_text(grid), ", block ", extent_text(block),
       ", ", shared_bytes, " bytes of shared memory");
}

}  // namespace mrv1::cuda
