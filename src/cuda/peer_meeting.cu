// Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
#include "launch.h"
#include "peer_group.h"
#include "peer_memory.cuh"

namespace mrv1::cuda {
namespace {

constexpr int kThreads = 32;
static_assert(kThreads >= kMaxRanks);

__global__ void __launch_bounds__(kThreads) meeting_kernel(const __grid_constant__ PeerView peers) {
  launch_next();
  wait_for_previous();
  const uint64_t call = begin_call(peers);
  if (call == 0) return;
  count_call(peers);
  signal_peers(peers, 0, call);
  await_signals(peers, PeerWait::kStart, 0, call);
}

}  // namespace

void load_meeting() {
  cudaFuncAttributes attributes;
  check_cuda(cudaFuncGetAttributes(&attributes, meeting_kernel), "meeting",
             "cudaFuncGetAttributes");
}

void launch_meeting(const PeerView& peers, const StepContext& ctx) {
  launch("meeting", ctx, meeting_kernel, dim3(1), dim3(kThreads), 0, peers);
}

}  // namespace mrv1::cuda
