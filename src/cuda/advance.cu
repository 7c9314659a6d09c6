// Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
//
// One block advances the rows, a thread for each. Entries go to the output slot in mapped host
// memory by way of shared memory, so that a warp writes whole lines, which travel over the bus in
// one piece. After a barrier one thread stores the sequence number that the host waits for, with a
// release over everything that the block has written.
#include <atomic>

#include "launch.h"
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

__device__ void store_release(std::atomic<uint64_t>* target, uint64_t value) {
  asm volatile("st.release.sys.global.u64 [%0], %1;" ::"l"(target), "l"(value) : "memory");
}

__global__ void __launch_bounds__(kThreads)
    advance_kernel(StepRings rings, RowState state, InferParams infer) {
  __shared__ __align__(16) OutputEntry tile[kThreads];
  __shared__ int32_t token_tile[kThreads * kMostTokens];
  cuda::launch_next();
  cuda::wait_for_previous();
  const auto* staged = reinterpret_cast<const cuda::StagedRecord*>(rings.staged);
  const BatchEntry* entries = cuda::staged_entries(staged);
  const int32_t num_entries = staged->header.num_entries;
  const uint64_t step = staged->header.step;
  const uint64_t begin_ns = staged->begin_ns;
  OutputHeader* slot = rings.output_slot();
  OutputEntry* out = output_entries(slot);
  int32_t* out_tokens = output_tokens(slot, infer.max_requests);
  const int32_t stride = 1 + state.max_drafts;
  for (int32_t first = 0; first < num_entries; first += kThreads) {
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
    for (int32_t word = threadIdx.x; word < count * kEntryWords; word += kThreads) {
      reinterpret_cast<int4*>(out + first)[word] = reinterpret_cast<const int4*>(tile)[word];
    }
    for (int32_t word = threadIdx.x; word < count * stride; word += kThreads) {
      out_tokens[first * stride + word] = token_tile[word];
    }
    __syncthreads();  // `tile` may be written again
  }
  if (threadIdx.x != 0) return;
  *rings.step = step + 1;
  slot->step = step;
  slot->num_entries = num_entries;
  slot->begin_ns = begin_ns;
  slot->end_ns = cuda::device_clock_ns();
  store_release(&slot->sequence, step + 1);
}

}  // namespace

void advance_cuda(const StepContext& ctx) {
  check_internal(ctx.rings.staged != nullptr && ctx.rings.step != nullptr, kOp,
                 "the step's rings are not set up");
  cuda::launch(kOp, ctx, advance_kernel, 1, kThreads, 0, ctx.rings, ctx.rows, ctx.infer);
}

}  // namespace mrv1
