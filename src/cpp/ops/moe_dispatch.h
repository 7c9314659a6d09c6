// Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
#pragma once

#include "dist/expert_link.h"
#include "state/step_context.h"

namespace mrv1 {

// Sends each token of the step to all ranks that have an expert of its own, once to each, with all
// its experts and their weights. In the region of this rank over there tokens lie one after the
// other, in their order, and `counts` of that rank says how many. Comes back when what all ranks
// have sent to this one is there. Between two of them all ranks run a moe_combine: that a rank has
// its sums tells that others have read what it sent.
//
// Ranks may have different numbers of tokens, none included; experts of -1 send nothing. Without a
// communicator in the context there is one rank.
struct MoeDispatchParams {
  const void* x;           // [tokens, hidden] of dtype
  const int32_t* experts;  // [tokens, top_k] among the experts of all ranks, or -1
  const float* weights;    // [tokens, top_k]
  // Out, [tokens, ranks]: the row of the token in the region of this rank there, -1 where it was
  // not sent.
  int32_t* places;
  ExpertShare share;
  // Of this rank, those of the context's expert_set if it has a communicator. As many tokens as
  // region_rows at most.
  ExpertBuffers received;
};

void moe_dispatch_cpu(const MoeDispatchParams& params, const StepContext& ctx);
void moe_dispatch_cuda(const MoeDispatchParams& params, const StepContext& ctx);

// The buffers of all ranks; `own` are those of the only one without a communicator. kInternal if
// the context's are others than `own`, or tokens are too many for them.
ExpertLink expert_link_of(const ExpertBuffers& own, const StepContext& ctx, std::string_view op);

}  // namespace mrv1
