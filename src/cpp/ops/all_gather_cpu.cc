// Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
#include "ops/all_gather.h"

#include <cstring>

#include "core/thread_pool.h"
#include "dist/cpu_communicator.h"

namespace mrv1 {

void all_gather_cpu(const AllGatherParams& params, const StepContext& ctx) {
  constexpr std::string_view kOp = "all_gather";
  const int64_t rows = params.logits_rows ? ctx.sizes.num_logits : ctx.sizes.num_tokens;
  auto* group = static_cast<CpuCommunicator*>(ctx.communicator);
  const int size = group == nullptr ? 1 : group->size();
  CpuCommunicator::Addresses inputs{params.x};
  if (group != nullptr) inputs = group->exchange(params.x, kOp);
  const auto bytes = params.cols * static_cast<int64_t>(dtype_size(params.dtype));
  ctx.pool->parallel_for(rows * size, 1, [&](int64_t begin, int64_t end, int) {
    for (int64_t i = begin; i < end; ++i) {
      std::memcpy(static_cast<char*>(params.out) + i * bytes,
                  static_cast<const char*>(inputs[i % size]) + i / size * bytes,
                  static_cast<size_t>(bytes));
    }
  });
  if (group != nullptr) group->barrier(kOp);  // what follows may write over x
}

}  // namespace mrv1
