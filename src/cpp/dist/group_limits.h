// Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
#pragma once

namespace mrv1 {

// Ranks of a group at most, as kernels keep a value of each in registers.
constexpr int kMaxRanks = 8;

// Sets of ExpertBuffers (dist/expert_link.h) that steps may use at the same time: that of whole
// steps, and one for each half of those that are cut.
constexpr int kMaxExpertSets = 3;

}  // namespace mrv1
