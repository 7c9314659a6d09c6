// Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>
#include <string_view>

namespace mrv1 {

struct StepContext;
struct WorkspaceLimits;  // ops/kernels.h

// Bytes of StepContext::workspace that sample_cpu needs: one slice for each thread.
int64_t sample_workspace_cpu(const WorkspaceLimits& limits);
// Throws kInternal where a step has less, or the vocabulary is none that weights can be added up
// of.
void check_sample_workspace(std::string_view op, int64_t vocab_size, const StepContext& ctx);

}  // namespace mrv1
