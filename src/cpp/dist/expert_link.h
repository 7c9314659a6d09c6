// Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>
#include <span>

#include "core/dtype.h"
#include "core/portable.h"
#include "dist/group_limits.h"

namespace mrv1 {

class Communicator;  // dist/communicator.h

// Which rank has which experts: neighbours, as many on each rank, or one more. Ranks may have none.
struct ExpertShare {
  int32_t num_experts = 0, ranks = 1;

  MRV1_HD int32_t rank_of(int32_t expert) const { return expert * ranks / num_experts; }
};

// Where a rank takes what others send it in expert parallelism, in its own device's memory: written
// by all ranks, itself included, read by it alone. A region for each rank, of region_rows rows.
struct ExpertBuffers {
  int64_t region_rows = 0;  // tokens that a rank may have in a step
  int64_t hidden = 0;
  int32_t top_k = 0;
  DType dtype = DType::kF32;      // of activations
  DType sum_dtype = DType::kF32;  // of partial sums
  // What moe_dispatch sends, by the rank that it comes from.
  void* x = nullptr;           // [ranks, region_rows, hidden] of dtype
  int32_t* experts = nullptr;  // [ranks, region_rows, top_k]
  float* weights = nullptr;    // [ranks, region_rows, top_k]
  int32_t* counts = nullptr;   // [ranks] rows of each region that are there
  // What moe_combine sends back, by the rank that has computed it, in the rows that the tokens had
  // there: [ranks, region_rows, hidden] of sum_dtype.
  void* sums = nullptr;
};

// The buffers of all ranks, as ops of one get them. Those of other ranks can be written from here,
// or are memory of this rank, laid out alike, from which NCCL sends (Communicator::stage_experts).
struct ExpertLink {
  ExpertBuffers ranks[kMaxRanks];
};

// Shows each rank the buffers of all, by rank; ops find them by StepContext::expert_set. Before the
// first step. kInvalidArgument naming what differs between ranks.
void link_experts(std::span<Communicator* const> ranks, std::span<const ExpertBuffers> buffers,
                  int set = 0);

}  // namespace mrv1
