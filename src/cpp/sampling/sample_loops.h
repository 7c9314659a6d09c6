// Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>

#include "ops/cpu_isa.h"
#include "sampling/processors.h"

namespace mrv1 {

// Logits are worked on in blocks of this many; every loop below takes one block, or its beginning.
constexpr int64_t kSampleBlock = 256;

// Classes of weight_exponent for the histogram: class 0 holds the largest logits, and a larger
// logit is never in a later class.
constexpr int32_t kNumClasses = 2048;
constexpr float kClassesPerUnit = 44.0f;

struct KeyRange {
  int32_t low, high;
};

// The vectorised loops of the CPU sampler, compiled once an instruction set from one source. They
// all give the same bits.
struct SampleLoops {
  // Smallest and largest logit_key.
  KeyRange (*key_range)(const float* logits, int64_t count);
  // weights[i] = token_weight(logits[i]).
  void (*weights)(const float* logits, int64_t count, const WeightRule& rule, uint64_t* weights);
  // Sum of the weights.
  uint64_t (*weight_sum)(const float* logits, int64_t count, const WeightRule& rule);
  // weights[i], with the class of each logit.
  void (*classify)(const float* logits, int64_t count, const WeightRule& rule, uint64_t* weights,
                   int32_t* classes);
  // Logits whose key is above `key`.
  int32_t (*count_above)(const float* logits, int64_t count, int32_t key);
  // Makes logits -inf whose bit in the mask is 0, but no NaN; bit 0 belongs to logits[0].
  void (*mask)(float* logits, int64_t count, const uint32_t* mask);
  // Sum of the weights of kept tokens; logits[0] belongs to first_id.
  uint64_t (*kept_sum)(const float* logits, int64_t count, int32_t first_id, const WeightRule& rule,
                       SetEdge edge);
};

// The variant for an instruction set, which this processor must have.
const SampleLoops& sample_loops(CpuIsa isa);

}  // namespace mrv1
