// Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
#include <algorithm>

#include "ops/kernels.h"
#include "ops/workspace_cpu.h"
#include "sampling/sample_cpu.h"

namespace mrv1 {
namespace {

int64_t workspace_bytes_cpu(const WorkspaceLimits& limits) {
  return std::max({paged_attention_workspace_cpu(limits), sample_workspace_cpu(limits),
                   moe_experts_workspace_cpu(limits)});
}

}  // namespace

const Kernels& cpu_kernels() {
  static const Kernels kernels = {
      .embedding = embedding_cpu,
      .rms_norm = rms_norm_cpu,
      .linear = linear_cpu,
      .add = add_cpu,
      .gated_mul = gated_mul_cpu,
      .soft_cap = soft_cap_cpu,
      .gather_rows = gather_rows_cpu,
      .router = router_cpu,
      .moe_route = moe_route_cpu,
      .moe_experts = moe_experts_cpu,
      .qkv_prepare = qkv_prepare_cpu,
      .cache_write = cache_write_cpu,
      .plan_attention = [](const AttentionPlan&, const StepContext&) {},
      .paged_attention = paged_attention_cpu,
      .all_reduce = all_reduce_cpu,
      .all_gather = all_gather_cpu,
      .moe_dispatch = moe_dispatch_cpu,
      .moe_combine = moe_combine_cpu,
      .stage_send = stage_send_cpu,
      .stage_receive = stage_receive_cpu,
      .stage_release = stage_release_cpu,
      .adopt = adopt_cpu,
      .apply = apply_cpu,
      .propose = propose_cpu,
      .infer_params = infer_params_cpu,
      .split_params = split_params_cpu,
      .infer_param_view = infer_param_view_cpu,
      .count_tokens = count_tokens_cpu,
      .sample = sample_cpu,
      .advance = advance_cpu,
      .score_rows = score_rows_cpu,
      .score = score_cpu,
      .copy_blocks = copy_blocks_cpu,
      .gather_blocks = gather_blocks_cpu,
      .zero_blocks = zero_blocks_cpu,
      .swap_blocks = swap_blocks_cpu,
      .token_map = token_map_cpu,
      .sampling_rows = sampling_rows_cpu,
      .ngram_propose = ngram_propose_cpu,
      .fill_random = fill_random_cpu,
      .fp4_tiles = nullptr,
      .workspace_bytes = workspace_bytes_cpu,
      .attention_plan_bytes = [](const AttentionPlan&, Device&) -> int64_t { return 0; },
      .decode_backend = [](const AttentionPlan&,
                           const StepContext&) { return AttentionBackend::kNative; },
      .linear_layout = WeightLayout::kPanel16,
      .fp4_layout = WeightLayout::kPanel16,
  };
  return kernels;
}

}  // namespace mrv1
