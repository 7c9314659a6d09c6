// Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
#pragma once

#include <memory>
#include <span>
#include <variant>
#include <vector>

#include "core/device.h"
#include "ops/kernels.h"
#include "program/plan.h"
#include "program/program.h"

namespace mrv1 {

// A program bound to a device: every op has its kernel's parameters with final addresses, so a run
// only walks a list. Weights and the KV cache must outlive it; their views are read when an op runs
// or was bound, as noted.
class Executable {
 public:
  // `weights` by weight index (matrices as views, vectors as float32 arrays); `kv` by kv layer,
  // addresses stable, contents may be filled in later. `max_position` rows of rope are computed.
  Executable(const Program& program, const PlanLimits& limits, Device& device,
             std::span<const WeightView> weights, std::span<const KvCacheLayer> kv,
             int64_t max_position);

  // Runs ops [first, last).
  void run(const StepContext& ctx, size_t first, size_t last) const;
  void run(const StepContext& ctx) const { run(ctx, 0, calls_.size()); }

  // Device address of a value. Its bytes are reused after its last reader, unless it is an input or
  // an output. kInvalidArgument if no op writes it.
  void* value(int32_t id) const;

 private:
  using Call = std::variant<EmbeddingParams, RmsNormParams, LinearParams, AddParams, SiluMulParams,
                            GatherRowsParams, QkvPrepareParams, PagedAttentionParams>;
  Call bind(const Program& program, const Op& op, std::span<const WeightView> weights,
            std::span<const KvCacheLayer> kv) const;

  Device* device_;
  Plan plan_;
  Buffer arena_;
  std::vector<Buffer> ropes_;
  int64_t max_position_;
  std::vector<Call> calls_;
};

}  // namespace mrv1
