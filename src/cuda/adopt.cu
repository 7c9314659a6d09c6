// Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
//
// One block: a thread takes a row of a step's outputs, which the last stage has written into this
// GPU's memory, step after step, as a row may be in several. The record is still where the host
// wrote it, since apply comes later: one word of it is read from there.
#include "state/adopt.h"

#include "launch.h"
#include "stage_wait.cuh"
#include "state/control_record.h"

namespace mrv1 {
namespace {

constexpr std::string_view kOp = "adopt";
constexpr int kThreads = 256;
constexpr int32_t kEntryWords = sizeof(OutputEntry) / sizeof(int4);

// Written by the last stage: past the caches of the SM.
__device__ __forceinline__ OutputEntry load_entry(const OutputEntry* from) {
  int4 words[kEntryWords];
#pragma unroll
  for (int i = 0; i < kEntryWords; ++i) words[i] = __ldcg(reinterpret_cast<const int4*>(from) + i);
  OutputEntry entry;
  memcpy(&entry, words, sizeof(entry));
  return entry;
}

__global__ void __launch_bounds__(kThreads)
    adopt_kernel(const __grid_constant__ cuda::StageView view,
                 const __grid_constant__ StepRings rings, const __grid_constant__ RowState state,
                 int32_t max_requests) {
  cuda::launch_next();
  cuda::wait_for_previous();
  const StageLink& link = view.link;
  __shared__ uint64_t range[2];
  if (threadIdx.x == 0) {
    range[0] = link.counters->adopted;
    range[1] = __ldcv(reinterpret_cast<const unsigned long long*>(&rings.record()->adopt_through));
  }
  __syncthreads();
  const uint64_t adopted = range[0], through = range[1];
  if (through <= adopted) return;
  const auto num_slots = static_cast<uint64_t>(link.num_slots);
  for (uint64_t step = adopted + 1; step <= through; ++step) {
    auto* slot = reinterpret_cast<OutputHeader*>(
        link.outputs + static_cast<int64_t>(step % num_slots) * link.outputs_bytes);
    bool arrived = true;
    if (threadIdx.x < 32) {
      const cuda::StageWait wait{reinterpret_cast<const uint64_t*>(&slot->sequence), step + 1,
                                 cuda::PeerWait::kOutputs, view.rank_at(link.num_stages - 1), step};
      arrived = cuda::await_stage(view, wait, true);
    }
    // Is also what makes rows of the step before, by other threads, those of this one.
    if (__syncthreads_and(arrived) == 0) return;
    const int32_t num_entries = __ldcg(&slot->num_entries);
    const OutputEntry* entries = output_entries(slot);
    const int32_t* tokens = output_tokens(slot, max_requests);
    for (int32_t i = static_cast<int32_t>(threadIdx.x); i < num_entries; i += kThreads) {
      adopt_row(state, load_entry(entries + i), tokens + int64_t{i} * (1 + state.max_drafts));
    }
  }
  __syncthreads();
  if (threadIdx.x != 0) return;
  link.counters->adopted = through;
  cuda::store_flag(&link.last->adopted[link.stage], through);
}

}  // namespace

namespace cuda {

void load_adopt() { load_kernel(kOp, adopt_kernel); }

}  // namespace cuda

void adopt_cuda(const StepContext& ctx) {
  check_internal(ctx.rings.step != nullptr, kOp, "the step's rings are not set up");
  const cuda::StageView view = cuda::stage_view(kOp, ctx);
  check_internal(view.link.outputs != nullptr, kOp, "the last stage has nothing to adopt");
  cuda::launch(kOp, ctx, adopt_kernel, 1, kThreads, 0, view, ctx.rings, ctx.rows,
               ctx.infer.max_requests);
}

}  // namespace mrv1
