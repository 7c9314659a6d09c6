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
  // addresses stable, contents may be filled in later. `max_position` rows of rope are computed,
  // unless `tables` is given: another executable of the program, which outlives this one and whose
  // rope tables it reads.
  Executable(const Program& program, const PlanLimits& limits, Device& device,
             std::span<const WeightView> weights, std::span<const KvCacheLayer> kv,
             int64_t max_position, const Executable* tables = nullptr);

  // Bytes an executable allocates: arena, rope tables (none of 0 positions), attention plans.
  static int64_t bytes(const Program& program, const PlanLimits& limits, Device& device,
                       int64_t max_position);

  // Sizes by which a backend says how much scratch the program's kernels need.
  static WorkspaceLimits workspace_limits(const Program& program, const PlanLimits& limits,
                                          Device& device);

  // A whole run: the attention plans, then every op.
  void run(const StepContext& ctx) const;
  // The same in parts: plans, then ops [first, last).
  void plan_attention(const StepContext& ctx) const;
  void run(const StepContext& ctx, size_t first, size_t last) const;
  // The same, whose first op follows what another stream or a copy has written: its kernels do not
  // start before that has ended.
  void run_apart(StepContext ctx, size_t first, size_t last) const;
  size_t num_ops() const { return calls_.size(); }

  // Where other ranks write what they send this one's experts, and what theirs have made of its
  // tokens; empty if the program has no moe_dispatch. Ranks link them (dist/expert_link.h).
  const ExpertBuffers& expert_buffers() const { return expert_buffers_; }

  // Device address of a value. Its bytes are reused after its last reader, unless it is an input,
  // an output or received from another stage. kInvalidArgument if no op writes it.
  void* value(int32_t id) const;

 private:
  // Ops without parameters.
  struct StageReceive {};
  struct StageRelease {};
  using Call = std::variant<EmbeddingParams, RmsNormParams, LinearParams, AddParams, GatedMulParams,
                            SoftCapParams, GatherRowsParams, RouterParams, MoeRouteParams,
                            MoeExpertsParams, MoeDispatchParams, MoeCombineParams, QkvPrepareParams,
                            CacheWriteParams, PagedAttentionParams, AllReduceParams,
                            AllGatherParams, StageSendParams, StageReceive, StageRelease>;
  Call bind(const Program& program, const Op& op, std::span<const WeightView> weights,
            std::span<const KvCacheLayer> kv) const;
  const AttentionPlan* plan_of(const Op& op) const;
  void find_expert_buffers(const Program& program, int64_t region_rows);

  Device* device_;
  Plan plan_;
  Buffer arena_;
  std::vector<Buffer> rope_buffers_;
  std::vector<const float*> ropes_;
  KvLayout kv_layout_;
  std::vector<AttentionPlan> attention_plans_;  // one for each geometry of attention
  std::vector<Buffer> attention_buffers_;
  int64_t max_position_;
  ExpertBuffers expert_buffers_;
  int32_t expert_ranks_;
  std::vector<Call> calls_;
};

}  // namespace mrv1
