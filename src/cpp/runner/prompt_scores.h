// Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>
#include <functional>
#include <span>
#include <vector>

#include "core/device.h"
#include "runner/runner_config.h"
#include "runner/token_logprobs.h"
#include "state/output_ring.h"
#include "state/step_context.h"

namespace mrv1 {

// Tokens of a prompt that an entry of a batch scores in a step.
struct ScoredTokens {
  int32_t entry = 0;        // of the batch
  int32_t first_token = 0;  // of the entry's tokens in the step: what the first is scored from
  int32_t count = 0;
  int32_t position = 0;      // of the first one in the prompt
  int32_t num_logprobs = 0;  // candidates beside each
  bool complete = false;     // the prompt has no further ones
  int64_t offset = 0;        // bytes of the step's records before these
};

// What a step says of them.
struct PromptScores {
  int32_t entry = 0;          // of the batch
  int32_t position = 0;       // of the first token in the prompt
  int32_t num_tokens = 0;     // may be 0 where the prompt is complete
  int32_t num_logprobs = 0;   // candidates beside each token
  bool complete = false;      // with these, every token of the prompt but the first has been scored
  int32_t nan_position = -1;  // of the first token whose logits hold a NaN; -1: none
  // [num_tokens, 1 + num_logprobs]: of each token itself, then of the candidates. NaN, without
  // candidates, for tokens whose logits hold a NaN.
  std::vector<TokenLogprob> logprobs;
};

// Scores prompts: the logprob of each token given those before it. The hidden states that a step
// leaves go through the output head again in passes of at most max_rows() rows, so that the memory
// does not depend on the prompt. Records go to mapped host memory, a part for each slot of the
// rings, and are read when the step has retired.
class PromptScorer {
 public:
  // Logits rows of the largest pass: those of the largest step, or a few more where that has few,
  // as a pass reads the whole head.
  static int32_t max_rows(const RunnerConfig& config);
  // Bytes of records that one step can leave: those of max_num_batched_tokens tokens, or as many as
  // fit in kMaxRecordBytes, but at least one.
  static int64_t record_bytes(const RunnerConfig& config);
  // Bytes that a scorer allocates for so many slots.
  static int64_t bytes(const RunnerConfig& config, int32_t num_slots);

  PromptScorer(const RunnerConfig& config, int32_t num_slots, Device& device);

  // Orders what a step scores by the records' size, and places them. kInvalidArgument if one step
  // cannot hold them.
  void place(std::vector<ScoredTokens>& scored) const;

  // Scores them in the stream: `head` computes the logits of the context's logits rows.
  void run(std::span<const ScoredTokens> scored, uint64_t slot, const StepContext& ctx,
           const float* logits, const std::function<void(const StepContext&)>& head) const;

  // Reads what a retired step left for the entries that were not masked.
  void read(std::span<const ScoredTokens> scored, uint64_t slot,
            std::span<const OutputEntry> entries, std::vector<PromptScores>& out) const;

 private:
  static constexpr int64_t kMaxRecordBytes = int64_t{32} << 20;

  Device& device_;
  const int32_t max_rows_;
  const int64_t record_bytes_;
  Buffer rows_;     // indices, then targets of a pass
  Buffer records_;  // [slots, record_bytes_]
};

}  // namespace mrv1
