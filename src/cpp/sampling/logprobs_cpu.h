// Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>

#include "sampling/logprobs.h"
#include "sampling/row_blocks_cpu.h"

namespace mrv1 {

// Writes the record of a token, or of kErrorToken, and its `count` candidates, at most the
// vocabulary. The logits are those that raw logprobs are about.
void write_logprobs(const float* logits, int64_t vocab_size, int32_t token, int32_t count,
                    const RowScratch& scratch, const SampleLoops& loops, LogprobRecord* record);

}  // namespace mrv1
