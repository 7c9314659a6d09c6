// Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>
#include <limits>

#include "ops/activation.h"
#include "ops/linear.h"
#include "ops/weight_view.h"
#include "state/step_context.h"

namespace mrv1 {

// Rows times top_k of a call.
constexpr int64_t kMaxExpertPairs = std::numeric_limits<int32_t>::max();

// Gated MLPs of which each row goes through some:
//   out = sum over j of weights[j] * down_e (activation(gate_e x) * (up_e x)), e = experts[j].
// Experts -1, and those outside of [first_expert, first_expert + gate_up.matrices), which other
// ranks have, add nothing. Roundings are those of the parts: gate, up, their product and what comes
// of each down are rounded to dtype; the weighted sum is made in float32, by ascending j, and
// rounded once. How many rows an expert gets is known to the device alone; a row's result does not
// depend on the others, on a GPU in batch-invariant steps.
//
// In a batch-invariant step the sum over ranks has the same bits whichever rank has which experts:
// those of all ranks are sum_groups() groups of neighbours, a row's choices among each are added by
// ascending j, and the groups in the order of sum_in_order.
struct MoeExpertsParams {
  const void* x;           // [rows, hidden] of dtype
  const int32_t* experts;  // [rows, top_k] among the experts of all ranks, no id twice in a row
  const float* weights;    // [rows, top_k]
  WeightView gate_up;      // matrices [2 * intermediate, hidden], gate over up
  WeightView down;         // as many matrices [hidden, intermediate]
  void* out;               // [rows, hidden] of out_dtype; zeros where a row has no expert here
  DType dtype;             // float32 or bfloat16
  DType out_dtype;         // dtype, or float32
  Activation activation;   // not kNone
  int32_t top_k;
  int32_t first_expert;
  int32_t num_experts;  // of all ranks
  // Rows are the step's tokens; or, with regions, what each of several ranks has sent: `regions`
  // times `region_rows`, of which the first counts[r] of region r count. The rest is not read, nor
  // written.
  int32_t regions = 0;
  int64_t region_rows = 0;
  const int32_t* counts = nullptr;  // [regions], device memory

  int64_t hidden() const { return down.rows / down.matrices; }
  int64_t intermediate() const { return down.cols; }
  int sum_groups(const StepContext& ctx) const { return ctx.batch_invariant ? kInvariantParts : 1; }
  // The group of an expert: groups are as even as can be, and those of a rank are neighbours.
  MRV1_HD int32_t sum_group(int32_t expert, int groups) const {
    return expert * groups / num_experts;
  }
  int64_t num_rows(const StepContext& ctx) const {
    return regions > 0 ? regions * region_rows : ctx.sizes.num_tokens;
  }
};

void moe_experts_cpu(const MoeExpertsParams& params, const StepContext& ctx);
void moe_experts_cuda(const MoeExpertsParams& params, const StepContext& ctx);

}  // namespace mrv1
