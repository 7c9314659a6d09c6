// Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
#include "ops/stage_receive.h"

#include <atomic>

#include "dist/cpu_communicator.h"
#include "dist/stage_link.h"

namespace mrv1 {

void stage_receive_cpu(const StepContext& ctx) {
  auto& group = *static_cast<CpuCommunicator*>(ctx.communicator);
  const StageLink& link = *group.stage_link();
  StageCounters& counters = *link.counters;
  ++counters.received;
  counters.waited_ns += group.wait_for(
      {group.global_rank() - group.size(), "send the values of", *ctx.rings.step}, [&] {
        return std::atomic_ref(link.port->arrived).load(std::memory_order_acquire) >=
               counters.received;
      });
}

void stage_release_cpu(const StepContext& ctx) {
  auto& group = *static_cast<CpuCommunicator*>(ctx.communicator);
  const StageLink& link = *group.stage_link();
  group.post([&] {
    std::atomic_ref(link.previous->taken).store(link.counters->received, std::memory_order_release);
  });
}

}  // namespace mrv1
