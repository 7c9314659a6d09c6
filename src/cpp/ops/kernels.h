// Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
#pragma once

#include "ops/all_gather.h"
#include "ops/all_reduce.h"
#include "ops/cache_write.h"
#include "ops/copy_blocks.h"
#include "ops/elementwise.h"
#include "ops/embedding.h"
#include "ops/fill_random.h"
#include "ops/fp4_tiles.h"
#include "ops/gather_blocks.h"
#include "ops/linear.h"
#include "ops/moe_combine.h"
#include "ops/moe_dispatch.h"
#include "ops/moe_experts.h"
#include "ops/moe_route.h"
#include "ops/ngram_propose.h"
#include "ops/paged_attention.h"
#include "ops/qkv_prepare.h"
#include "ops/rms_norm.h"
#include "ops/router.h"
#include "ops/sampling_rows.h"
#include "ops/stage_receive.h"
#include "ops/stage_send.h"
#include "ops/swap_blocks.h"
#include "ops/token_map.h"
#include "ops/zero_blocks.h"
#include "sampling/penalties.h"
#include "sampling/sample.h"
#include "sampling/score.h"
#include "state/adopt.h"
#include "state/infer_param_view.h"
#include "state/infer_params.h"
#include "state/output_ring.h"
#include "state/propose.h"
#include "state/score_rows.h"
#include "state/split_params.h"

namespace mrv1 {

// Sizes from which a backend says how much scratch its kernels need at most.
struct WorkspaceLimits {
  int64_t vocab_size, head_dim;
  int64_t max_tokens, max_logits;
  int64_t fp4_elements;  // of the largest NVFP4 weight of a linear, 0 if there is none
  int64_t gated_rows;    // weight rows of the largest linear with an activation, 0 if there is none
  int64_t float8_keys;   // positions that prompts may read from an E4M3 cache; 0 for other caches
  int64_t float8_kv_heads;  // of the layer that has most
  // Of moe_experts, 0 if there is none: rows times top_k, a matrix's sizes, matrices, and the bytes
  // of an element of x; each the largest of any layer.
  int64_t moe_rows, moe_hidden, moe_intermediate, moe_experts, moe_element_bytes;
  int64_t moe_fp4_elements;  // of gate and up of all experts, where they are NVFP4; else 0
  int num_threads;
};

// The backend table: one entry an op and one a phase of the step. The program and the runner call
// through it and do not know which backend runs. This header is the only place that lists them.
struct Kernels {
  void (*embedding)(const EmbeddingParams&, const StepContext&);
  void (*rms_norm)(const RmsNormParams&, const StepContext&);
  void (*linear)(const LinearParams&, const StepContext&);
  void (*add)(const AddParams&, const StepContext&);
  void (*gated_mul)(const GatedMulParams&, const StepContext&);
  void (*soft_cap)(const SoftCapParams&, const StepContext&);
  void (*gather_rows)(const GatherRowsParams&, const StepContext&);
  void (*router)(const RouterParams&, const StepContext&);
  void (*moe_route)(const MoeRouteParams&, const StepContext&);
  void (*moe_experts)(const MoeExpertsParams&, const StepContext&);
  void (*qkv_prepare)(const QkvPrepareParams&, const StepContext&);
  void (*cache_write)(const CacheWriteParams&, const StepContext&);
  void (*plan_attention)(const AttentionPlan&, const StepContext&);
  void (*paged_attention)(const PagedAttentionParams&, const StepContext&);
  void (*all_reduce)(const AllReduceParams&, const StepContext&);
  void (*all_gather)(const AllGatherParams&, const StepContext&);
  void (*moe_dispatch)(const MoeDispatchParams&, const StepContext&);
  void (*moe_combine)(const MoeCombineParams&, const StepContext&);
  void (*stage_send)(const StageSendParams&, const StepContext&);
  void (*stage_receive)(const StepContext&);
  void (*stage_release)(const StepContext&);

  // The phases of a step find rings, rows and infer_params in the context.
  void (*adopt)(const StepContext&);
  void (*apply)(const StepContext&);
  void (*propose)(const StepContext&);
  void (*infer_params)(const StepContext&);
  void (*split_params)(const SplitParams&, const StepContext&);
  void (*infer_param_view)(const InferParamInputs&, const InferParamView&, const StepContext&);
  void (*count_tokens)(const StepContext&);
  void (*sample)(const SampleParams&, const StepContext&);
  void (*advance)(const StepContext&);

  // Before sample, in steps that score prompts: the rows of a pass of the output head, and the
  // logprobs of their targets.
  void (*score_rows)(const ScoreRowsParams&, const StepContext&);
  void (*score)(const ScoreParams&, const StepContext&);

  // Between steps: blocks that a row is about to write and shares with others.
  void (*copy_blocks)(const CopyBlocksParams&, const StepContext&);

  // For callers of single ops: moves of blocks.
  void (*gather_blocks)(const GatherBlocksParams&, const StepContext&);
  void (*zero_blocks)(const ZeroBlocksParams&, const StepContext&);
  void (*swap_blocks)(const SwapBlocksParams&, const StepContext&);

  // For callers of single ops: what infer_params and apply give a step.
  void (*token_map)(const TokenMapParams&, const StepContext&);
  void (*sampling_rows)(const SamplingRowsParams&, const StepContext&);
  void (*ngram_propose)(const NgramProposeParams&, const StepContext&);

  // Outside of steps: weights and KV cache of a benchmark.
  void (*fill_random)(const FillRandomParams&, const StepContext&);
  // What brings NVFP4 weights from rows into fp4_layout; null if that is not kTile16.
  void (*fp4_tiles)(const Fp4TilesParams&, const StepContext&);

  // Bytes of StepContext::workspace that the largest of the kernels needs.
  int64_t (*workspace_bytes)(const WorkspaceLimits&);
  // Bytes of AttentionPlan::data.
  int64_t (*attention_plan_bytes)(const AttentionPlan&, Device&);
  // Whose kernels take a step's decode rows: the context's attention_backend, if it can.
  AttentionBackend (*decode_backend)(const AttentionPlan&, const StepContext&);
  // Layout that `linear` reads, for the loader; that of NVFP4 weights.
  WeightLayout linear_layout;
  WeightLayout fp4_layout;
};

const Kernels& cpu_kernels();

}  // namespace mrv1
