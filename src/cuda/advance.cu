// Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
//
// One block advances the rows, a thread for each, and writes the entries to the output slot in
// mapped host memory. Entries are made visible to the host before the barrier; then one thread
// stores the sequence number that the host waits for.
#include <atomic>

#include "check.h"
#include "state/output_ring.h"

namespace mrv1 {
namespace {

constexpr std::string_view kOp = "advance";
constexpr int kThreads = 256;

static_assert(sizeof(std::atomic<uint64_t>) == sizeof(uint64_t) &&
                  std::atomic<uint64_t>::is_always_lock_free,
              "the device stores the sequence as a plain 64-bit word");

__global__ void __launch_bounds__(kThreads)
    advance_kernel(const ControlHeader* record, RowState state, InferParams infer,
                   OutputHeader* slot) {
  const BatchEntry* entries = record_array<BatchEntry>(record, record->entries_offset);
  OutputEntry* out = output_entries(slot);
  for (int32_t i = threadIdx.x; i < record->num_entries; i += kThreads) {
    const BatchEntry entry = entries[i];
    out[i] = advance_row(state, entry, entry.num_tokens, infer.sampled[infer.entry_batch[i]]);
  }
  const uint64_t step = record->step;
  if (threadIdx.x == 0) {
    slot->step = step;
    slot->num_entries = record->num_entries;
  }
  __threadfence_system();
  __syncthreads();
  if (threadIdx.x == 0) {
    __threadfence_system();
    *reinterpret_cast<volatile uint64_t*>(&slot->sequence) = step + 1;
  }
}

}  // namespace

void advance_cuda(const ControlHeader& record, const RowState& state, const InferParams& infer,
                  OutputHeader* slot, const StepContext& ctx) {
  advance_kernel<<<1, kThreads, 0, cuda::stream_of(ctx)>>>(
      cuda::mapped_address(&record, kOp, "the control record"), state, infer,
      cuda::mapped_address(slot, kOp, "the output slot"));
  cuda::check_launch(kOp);
}

}  // namespace mrv1
