// Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
#include "ops/stage_send.h"

#include <atomic>
#include <cstring>

#include "core/error.h"
#include "dist/cpu_communicator.h"

namespace mrv1 {

void stage_send_cpu(const StageSendParams& params, const StepContext& ctx) {
  auto& group = *static_cast<CpuCommunicator*>(ctx.communicator);
  const StageLink& link = *group.stage_link();
  check_internal(params.num_values == link.num_values, "stage_send", params.num_values,
                 " values are sent, and ", link.num_values, " are linked");
  StageCounters& counters = *link.counters;
  counters.waited_ns += group.wait_for(
      {group.global_rank() + group.size(), "let go of the values before", *ctx.rings.step}, [&] {
        return std::atomic_ref(link.port->taken).load(std::memory_order_acquire) >= counters.sent;
      });
  for (int32_t i = 0; i < params.num_values; ++i) {
    const int64_t bytes = params.row_bytes[i];
    ctx.pool->parallel_for(ctx.sizes.num_tokens, 16, [&](int64_t begin, int64_t end, int) {
      std::memcpy(static_cast<char*>(link.next_values[i]) + begin * bytes,
                  static_cast<const char*>(params.values[i]) + begin * bytes,
                  static_cast<size_t>((end - begin) * bytes));
    });
  }
  ++counters.sent;
  group.post(
      [&] { std::atomic_ref(link.next->arrived).store(counters.sent, std::memory_order_release); });
}

}  // namespace mrv1
