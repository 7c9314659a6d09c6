// Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "program/program.h"

namespace mrv1 {

// What a step costs in each layer, as bytes of the weights that it reads there: decoding is bound
// by them. The last layer bears the output head too, as a stage that has one has the other; of an
// embedding a step reads single rows, which weigh nothing.
std::vector<int64_t> layer_costs(const Program& program);

// How many layers each of `num_stages` stages takes, at least one, so that the stage that costs
// most costs as little as can be: it sets the pace of all. Among such the one whose stages differ
// least (sum of squared costs), then the one with more layers in front. kInvalidArgument if there
// are fewer layers than stages.
std::vector<int32_t> balance_layers(std::span<const int64_t> costs, int32_t num_stages);

}  // namespace mrv1
