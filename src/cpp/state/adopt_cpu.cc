// Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
#include "state/adopt.h"

#include <atomic>

#include "dist/cpu_communicator.h"
#include "dist/stage_link.h"

namespace mrv1 {

void adopt_cpu(const StepContext& ctx) {
  auto& group = *static_cast<CpuCommunicator*>(ctx.communicator);
  const StageLink& link = *group.stage_link();
  StageCounters& counters = *link.counters;
  const uint64_t through = ctx.rings.record()->adopt_through;
  if (through <= counters.adopted) return;
  const int leader = (link.num_stages - 1) * group.size() + group.rank();
  for (uint64_t step = counters.adopted + 1; step <= through; ++step) {
    auto* slot = reinterpret_cast<OutputHeader*>(
        link.outputs + static_cast<int64_t>(step % link.num_slots) * link.outputs_bytes);
    counters.waited_ns += group.wait_for({leader, "publish the outputs of", step}, [&] {
      return slot->sequence.load(std::memory_order_acquire) >= step + 1;
    });
    const OutputEntry* entries = output_entries(slot);
    const int32_t* tokens = output_tokens(slot, ctx.infer.max_requests);
    for (int32_t i = 0; i < slot->num_entries; ++i) {
      adopt_row(ctx.rows, entries[i], tokens + int64_t{i} * (1 + ctx.rows.max_drafts));
    }
  }
  counters.adopted = through;
  group.post([&] {
    std::atomic_ref(link.last->adopted[link.stage]).store(through, std::memory_order_release);
  });
}

}  // namespace mrv1
