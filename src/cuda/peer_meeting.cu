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

// A lane for each rank that can be reached: tells it, and waits to be told.
__global__ void __launch_bounds__(kThreads) trial_kernel(const __grid_constant__ PeerWatch watch,
                                                         const __grid_constant__ PeerStates peers) {
  launch_next();
  wait_for_previous();
  constexpr int kLooksPerClock = 256;
  const int rank = static_cast<int>(threadIdx.x);
  if (rank >= watch.num_ranks || peers.states[rank] == nullptr) return;
  store_word(&peers.states[rank]->met[watch.rank], 1);
  PeerPatience patience;
  for (int looks = 1; load_word(&watch.state->met[rank]) == 0; ++looks) {
    if (looks % kLooksPerClock != 0) continue;
    if (gives_up(watch, PeerWait::kTrial, 0, rank, &patience)) return;
  }
}

}  // namespace

void load_meeting() {
  load_kernel("meeting", meeting_kernel);
  load_kernel("trial", trial_kernel);
}

void launch_meeting(const PeerView& peers, const StepContext& ctx) {
  launch("meeting", ctx, meeting_kernel, dim3(1), dim3(kThreads), 0, peers);
}

void launch_trial(const PeerWatch& watch, const PeerStates& peers, const StepContext& ctx) {
  launch("trial", ctx, trial_kernel, dim3(1), dim3(kThreads), 0, watch, peers);
}

}  // namespace mrv1::cuda
