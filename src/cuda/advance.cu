// Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
//
// One block advances the rows, a thread for each. Entries go to the output slot in mapped host
// memory by way of shared memory, so that a warp writes whole lines, which travel over the bus in
// one piece. After a barrier one thread stores the sequence number that the host waits for, with a
// release over everything that the block has written.
//
// On the last stage of a pipeline the same goes to the memory of the GPUs before it, and there
// first: they may wait for it, and the way to the host is longer.
#include <atomic>
#include <type_traits>

#include "dist/communicator.h"
#include "launch.h"
#include "stage_wait.cuh"
#include "staged_record.h"
#include "state/output_ring.h"

namespace mrv1 {
namespace {

constexpr std::string_view kOp = "advance";
constexpr int kThreads = 256;

static_assert(sizeof(std::atomic<uint64_t>) == sizeof(uint64_t) &&
                  std::atomic<uint64_t>::is_always_lock_free,
              "the device stores the sequence as a plain 64-bit word");
constexpr int32_t kEntryWords = sizeof(OutputEntry) / sizeof(int4);
constexpr int32_t kMostTokens = 1 + kMaxSpeculativeTokens;  // of an entry

struct NoStages {};

// Where a step's outputs go: a slot of a ring.
struct OutputPlace {
  OutputHeader* slot;

  // Entries from `first` on and their tokens, by the whole block.
  __device__ void store(const OutputEntry* tile, const int32_t* token_tile, int32_t first,
                        int32_t count, int32_t stride, int32_t max_requests) const {
    auto* entries = reinterpret_cast<int4*>(output_entries(slot) + first);
    for (int32_t word = threadIdx.x; word < count * kEntryWords; word += kThreads) {
      entries[word] = reinterpret_cast<const int4*>(tile)[word];
    }
    int32_t* tokens = output_tokens(slot, max_requests) + first * stride;
    for (int32_t word = threadIdx.x; word < count * stride; word += kThreads) {
      tokens[word] = token_tile[word];
    }
  }

  // After a barrier.
  __device__ void publish(uint64_t step, int32_t num_entries) const {
    slot->step = step;
    slot->num_entries = num_entries;
    cuda::store_flag(reinterpret_cast<uint64_t*>(&slot->sequence), step + 1);
  }
};

__device__ OutputPlace stage_place(const StageLink& link, int stage, uint64_t step) {
  const auto slot = static_cast<int64_t>(step % static_cast<uint64_t>(link.num_slots));
  return {reinterpret_cast<OutputHeader*>(link.stage_outputs[stage] + slot * link.outputs_bytes)};
}

// Waits until the stages before the last have adopted what the step's outputs are written over. By
// a whole warp; false if the group has ended.
__device__ bool await_places(const cuda::StageView& view, uint64_t step) {
  const StageLink& link = view.link;
  const auto num_slots = static_cast<uint64_t>(link.num_slots);
  const int lane = static_cast<int>(threadIdx.x % 32);
  cuda::StageWait wait{};
  if (lane < link.stage && step > num_slots) {
    wait = {&link.port->adopted[lane], step - num_slots, cuda::PeerWait::kOutputsAdopted,
            view.rank_at(lane), step - num_slots};
  }
  return cuda::await_stages(view, wait, true);
}

// `Stages` is NoStages, or the rank's view of its pipeline.
template <typename Stages>
__global__ void __launch_bounds__(kThreads)
    advance_kernel(StepRings rings, RowState state, InferParams infer,
                   const __grid_constant__ Stages stages) {
  constexpr bool kHasStages = std::is_same_v<Stages, cuda::StageView>;
  __shared__ __align__(16) OutputEntry tile[kThreads];
  __shared__ int32_t token_tile[kThreads * kMostTokens];
  cuda::launch_next();
  cuda::wait_for_previous();
  const auto* staged = reinterpret_cast<const cuda::StagedRecord*>(rings.staged);
  const BatchEntry* entries = cuda::staged_entries(staged);
  const uint64_t step = staged->header.step;
  const uint64_t begin_ns = staged->begin_ns;
  const OutputPlace host{rings.output_slot()};
  const int32_t stride = 1 + state.max_drafts;
  int32_t num_entries = staged->header.num_entries;
  int num_others = 0;  // stages that get the outputs, too
  if constexpr (kHasStages) {
    bool is_open = true;
    if (!stages.link.is_last()) {
      for (auto i = static_cast<int32_t>(threadIdx.x); i < num_entries; i += kThreads) {
        advance_unfinished(state, entries[i]);
      }
      num_entries = 0;
    } else if (threadIdx.x < 32) {
      // What a rank has after the end is nobody's to write to.
      const bool has_ended = cuda::has_ended(stages);
      is_open = await_places(stages, step) && !has_ended;
    }
    if (__syncthreads_and(is_open) != 0) num_others = stages.link.is_last() ? stages.link.stage : 0;
  }
  // Once, without entries, for steps that have none.
  int32_t first = 0;
  do {
    const int32_t count = min(kThreads, num_entries - first);
    const int32_t i = first + static_cast<int32_t>(threadIdx.x);
    if (i < num_entries) {
      const int4 words = reinterpret_cast<const int4*>(entries)[i];
      const BatchEntry entry{words.x, words.y, words.z, words.w};
      const int32_t start = infer.logits_start[infer.entry_batch[i]];
      int32_t* tokens = token_tile + threadIdx.x * stride;
      for (int32_t place = 0; place < stride; ++place) tokens[place] = kNoToken;
      tile[threadIdx.x] =
          advance_row(state, entry, start < 0 ? nullptr : infer.sampled + start, tokens);
    }
    __syncthreads();
    if constexpr (kHasStages) {
      const StageLink& link = stages.link;
      for (int stage = 0; stage < num_others; ++stage) {
        stage_place(link, stage, step)
            .store(tile, token_tile, first, count, stride, infer.max_requests);
      }
      if (first + kThreads >= num_entries) {
        __syncthreads();
        const int stage = static_cast<int>(threadIdx.x);
        if (stage < num_others) stage_place(link, stage, step).publish(step, num_entries);
      }
    }
    host.store(tile, token_tile, first, count, stride, infer.max_requests);
    __syncthreads();  // `tile` may be written again
    first += kThreads;
  } while (first < num_entries);
  if (threadIdx.x != 0) return;
  *rings.step = step + 1;
  uint64_t waited_ns = 0;
  if constexpr (kHasStages) {
    waited_ns = stages.link.counters->waited_ns;
    cuda::store_relaxed(&stages.watch.reports[stages.watch.rank].step, step);
  }
  OutputHeader* slot = host.slot;
  slot->begin_ns = begin_ns;
  slot->end_ns = cuda::device_clock_ns();
  slot->waited_ns = waited_ns;
  host.publish(step, num_entries);
}

}  // namespace

namespace cuda {

void load_advance() { load_kernel(kOp, advance_kernel<StageView>); }

}  // namespace cuda

void advance_cuda(const StepContext& ctx) {
  check_internal(ctx.rings.staged != nullptr && ctx.rings.step != nullptr, kOp,
                 "the step's rings are not set up");
  const auto launch = [&](auto* kernel, const auto& stages) {
    cuda::launch(kOp, ctx, kernel, 1, kThreads, 0, ctx.rings, ctx.rows, ctx.infer, stages);
  };
  if (ctx.communicator == nullptr || ctx.communicator->stage_link() == nullptr) {
    launch(advance_kernel<NoStages>, NoStages{});
  } else {
    launch(advance_kernel<cuda::StageView>, cuda::stage_view(kOp, ctx));
  }
}

}  // namespace mrv1
