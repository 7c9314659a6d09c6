// Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "program/program.h"

namespace mrv1 {

// Rows a program is planned for.
struct PlanLimits {
  int64_t max_tokens = 0;
  int64_t max_logits = 0;
  int64_t max_requests = 0;
  int64_t float8_keys = 0;  // positions that prompts may read from an E4M3 cache
  int64_t ranks = 1;        // that send each other tokens, each at most max_tokens
};

// Where each value lies in the activation arena. Values whose lives overlap do not share bytes; an
// op that may work in place writes over an input of the same size that dies with it. What others
// write at any time of a step has bytes of its own: what a stage receives, and what ranks send each
// other in moe_dispatch and moe_combine, for which all layers have the same place.
struct Plan {
  std::vector<int64_t> offsets;  // by value, bytes; -1 for values no op writes or reads
  int64_t arena_bytes = 0;       // exact
};

constexpr int64_t kArenaAlignment = 256;

// Rows of a value at the limits.
int64_t space_rows(RowSpace space, const PlanLimits& limits);

// Bytes of a value at the limits. kInvalidArgument above kMaxTensorBytes.
int64_t value_bytes(const Value& value, const PlanLimits& limits);

Plan plan_buffers(const Program& program, const PlanLimits& limits);

}  // namespace mrv1
