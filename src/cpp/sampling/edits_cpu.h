// Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>

#include "sampling/processors.h"
#include "sampling/sample_loops.h"

namespace mrv1 {

// The processors of a row that edit its logits, in place.
class LogitEdits {
 public:
  // `history` is the row's, place the one whose token is drawn; `scratch` takes [vocab] logits.
  LogitEdits(float* logits, int64_t vocab_size, const int32_t* history, int32_t place,
             float* scratch, const SampleLoops& loops)
      : logits_(logits),
        vocab_(vocab_size),
        history_(history),
        place_(place),
        scratch_(scratch),
        loops_(loops) {}

  void apply(GrammarMask, const Row& row, const SamplingRow& sampling);
  void apply(RawLogprobs, const Row& row, const SamplingRow& sampling);
  void apply(LogitBias, const Row& row, const SamplingRow& sampling);
  void apply(AllowedTokens, const Row& row, const SamplingRow& sampling);
  void apply(MinTokens, const Row& row, const SamplingRow& sampling);
  void apply(Penalties, const Row& row, const SamplingRow& sampling);
  void apply(BadWords, const Row& row, const SamplingRow& sampling);

  // The logits as raw logprobs are about, if they apply.
  const float* raw() const { return raw_; }

 private:
  void mask(const uint32_t* mask);
  void ban(int32_t id);

  float* logits_;
  int64_t vocab_;
  const int32_t* history_;
  int32_t place_;
  float* scratch_;
  const SampleLoops& loops_;
  const float* raw_ = nullptr;
};

}  // namespace mrv1
