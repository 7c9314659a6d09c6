// Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
#include "kernels.h"

#include <algorithm>

#include "attention_backends.h"
#include "linear_context.h"
#include "linear_fp4.h"
#include "moe_experts.h"
#include "sample.h"

namespace mrv1 {

const Kernels& cuda_kernels() {
  static constexpr Kernels kKernels = {
      .embedding = embedding_cuda,
      .rms_norm = rms_norm_cuda,
      .linear = linear_cuda,
      .add = add_cuda,
      .gated_mul = gated_mul_cuda,
      .soft_cap = soft_cap_cuda,
      .gather_rows = gather_rows_cuda,
      .router = router_cuda,
      .moe_route = moe_route_cuda,
      .moe_experts = moe_experts_cuda,
      .qkv_prepare = qkv_prepare_cuda,
      .cache_write = cache_write_cuda,
      .plan_attention = plan_attention_cuda,
      .paged_attention = paged_attention_cuda,
      .all_reduce = all_reduce_cuda,
      .all_gather = all_gather_cuda,
      .moe_dispatch = moe_dispatch_cuda,
      .moe_combine = moe_combine_cuda,
      .stage_send = stage_send_cuda,
      .stage_receive = stage_receive_cuda,
      .stage_release = stage_release_cuda,
      .adopt = adopt_cuda,
      .apply = apply_cuda,
      .propose = propose_cuda,
      .infer_params = infer_params_cuda,
      .split_params = split_params_cuda,
      .infer_param_view = infer_param_view_cuda,
      .count_tokens = count_tokens_cuda,
      .sample = sample_cuda,
      .advance = advance_cuda,
      .score_rows = score_rows_cuda,
      .score = score_cuda,
      .copy_blocks = copy_blocks_cuda,
      .gather_blocks = gather_blocks_cuda,
      .zero_blocks = zero_blocks_cuda,
      .swap_blocks = swap_blocks_cuda,
      .token_map = token_map_cuda,
      .sampling_rows = sampling_rows_cuda,
      .ngram_propose = ngram_propose_cuda,
      .fill_random = fill_random_cuda,
      .fp4_tiles = fp4_tiles_cuda,
      .workspace_bytes = [](const WorkspaceLimits& limits) -> int64_t {
        return std::max({cuda::linear_workspace_bytes(limits.max_tokens, limits.gated_rows) +
                             cuda::fp4_workspace_bytes(limits.fp4_elements, limits.max_tokens),
                         sample_workspace_cuda(limits), flashinfer_workspace_bytes(limits),
                         moe_experts_workspace_cuda(limits)});
      },
      .attention_plan_bytes = attention_plan_bytes_cuda,
      .decode_backend = decode_backend_cuda,
      .linear_layout = WeightLayout::kRowMajor,
      .fp4_layout = WeightLayout::kTile16,
  };
  return kKernels;
}

}  // namespace mrv1
