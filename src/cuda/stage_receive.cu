// Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
//
// A warp each: the stage before writes to where the values are read, so that there is nothing to
// copy. The kernels behind stage_receive may be on the GPU already and have asked for their
// weights.
#include "ops/stage_receive.h"

#include "launch.h"
#include "stage_wait.cuh"

namespace mrv1 {
namespace {

constexpr int kThreads = 32;

__global__ void __launch_bounds__(kThreads)
    stage_receive_kernel(const __grid_constant__ cuda::StageView view) {
  cuda::launch_next();
  cuda::wait_for_previous();
  const StageLink& link = view.link;
  const uint64_t received = link.counters->received + 1;
  const cuda::StageWait wait{&link.port->arrived, received, cuda::PeerWait::kValues,
                             view.rank_at(link.stage - 1), 0};
  cuda::await_stage(view, wait, true);
  if (threadIdx.x == 0) link.counters->received = received;
}

// The readers have ended before this kernel passes its wait.
__global__ void __launch_bounds__(kThreads)
    stage_release_kernel(const __grid_constant__ cuda::StageView view) {
  cuda::launch_next();
  cuda::wait_for_previous();
  if (threadIdx.x != 0) return;
  cuda::store_flag(&view.link.previous->taken, view.link.counters->received);
}

}  // namespace

namespace cuda {

void load_stage_receive() {
  load_kernel("stage_receive", stage_receive_kernel);
  load_kernel("stage_release", stage_release_kernel);
}

}  // namespace cuda

void stage_receive_cuda(const StepContext& ctx) {
  constexpr std::string_view kOp = "stage_receive";
  cuda::launch(kOp, ctx, stage_receive_kernel, 1, kThreads, 0, cuda::stage_view(kOp, ctx));
}

void stage_release_cuda(const StepContext& ctx) {
  constexpr std::string_view kOp = "stage_release";
  cuda::launch(kOp, ctx, stage_release_kernel, 1, kThreads, 0, cuda::stage_view(kOp, ctx));
}

}  // namespace mrv1
