// Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
#include "runner/prompt_scores.h"

#include <algorithm>
#include <bit>
#include <limits>
#include <tuple>

#include "core/device.h"
#include "core/error.h"
#include "ops/kernels.h"

namespace mrv1 {
namespace {

constexpr int32_t kLeastRows = 32;

}  // namespace

int32_t PromptScorer::max_rows(const RunnerConfig& config) {
  return std::min(std::max(max_logits_rows(config), kLeastRows), config.max_num_batched_tokens);
}

int64_t PromptScorer::record_bytes(const RunnerConfig& config) {
  const int64_t one = logprob_record_bytes(config.max_logprobs);
  return std::min(config.max_num_batched_tokens * one, std::max(one, kMaxRecordBytes));
}

int64_t PromptScorer::bytes(const RunnerConfig& config, int32_t num_slots) {
  return int64_t{max_rows(config)} * 2 * int64_t{sizeof(int32_t)} +
         num_slots * record_bytes(config);
}

PromptScorer::PromptScorer(const RunnerConfig& config, int32_t num_slots, Device& device)
    : device_(device), max_rows_(max_rows(config)), record_bytes_(record_bytes(config)) {
  rows_ = device.allocate(static_cast<size_t>(max_rows_) * 2 * sizeof(int32_t), "scored rows");
  records_ =
      device.allocate_mapped(static_cast<size_t>(num_slots * record_bytes_), "prompt scores");
}

void PromptScorer::place(std::vector<ScoredTokens>& scored) const {
  // Not std::stable_sort, which allocates.
  std::sort(scored.begin(), scored.end(), [](const ScoredTokens& a, const ScoredTokens& b) {
    return std::tie(a.num_logprobs, a.entry) < std::tie(b.num_logprobs, b.entry);
  });
  int64_t end = 0;
  for (ScoredTokens& tokens : scored) {
    tokens.offset = end;
    end += tokens.count * logprob_record_bytes(tokens.num_logprobs);
  }
  check(end <= record_bytes_, "execute", "the logprobs of the batch's prompt tokens take ", end,
        " bytes, a step has ", record_bytes_,
        ": give it fewer tokens of rows with prompt logprobs");
}

void PromptScorer::run(std::span<const ScoredTokens> scored, uint64_t slot, const StepContext& ctx,
                       const float* logits,
                       const std::function<void(const StepContext&)>& head) const {
  const Kernels& kernels = device_.kernels();
  auto* const indices = static_cast<int32_t*>(rows_.data());
  int32_t* const targets = indices + max_rows_;
  char* const records = static_cast<char*>(records_.data()) + slot * record_bytes_;
  StepContext pass = ctx;
  pass.infer.logits_indices = indices;
  size_t next = 0;
  int32_t done = 0;  // of the next ones
  while (next < scored.size()) {
    const int32_t num_logprobs = scored[next].num_logprobs;
    const int64_t offset = scored[next].offset + done * logprob_record_bytes(num_logprobs);
    int32_t rows = 0;
    while (next < scored.size() && rows < max_rows_ && scored[next].num_logprobs == num_logprobs) {
      const ScoredTokens& tokens = scored[next];
      const int32_t count = std::min(tokens.count - done, max_rows_ - rows);
      if (count > 0) {
        kernels.score_rows({tokens.entry, tokens.first_token + done, rows, count, indices, targets},
                           pass);
      }
      rows += count;
      done += count;
      if (done == tokens.count) {
        ++next;
        done = 0;
      }
    }
    if (rows == 0) continue;
    // Of few different sizes, as libraries choose their kernels by them.
    const auto padded = static_cast<int32_t>(std::bit_ceil(static_cast<uint32_t>(rows)));
    pass.sizes.num_logits = std::min(padded, max_rows_);
    if (pass.sizes.num_logits > rows) {
      kernels.score_rows({-1, 0, rows, pass.sizes.num_logits - rows, indices, targets}, pass);
    }
    head(pass);
    kernels.score({.logits = logits,
                   .num_rows = pass.sizes.num_logits,
                   .vocab_size = pass.rows.vocab_size,
                   .targets = targets,
                   .num_logprobs = num_logprobs,
                   .max_logprobs = num_logprobs,
                   .records = reinterpret_cast<LogprobRecord*>(records + offset)},
                  pass);
  }
}

void PromptScorer::read(std::span<const ScoredTokens> scored, uint64_t slot,
                        std::span<const OutputEntry> entries,
                        std::vector<PromptScores>& out) const {
  char* const records = static_cast<char*>(records_.host()) + slot * record_bytes_;
  for (const ScoredTokens& tokens : scored) {
    if (static_cast<size_t>(tokens.entry) >= entries.size()) continue;  // the step failed
    if (entries[tokens.entry].masked != 0) continue;
    PromptScores& scores = out.emplace_back();
    scores.entry = tokens.entry;
    scores.position = tokens.position;
    scores.num_tokens = tokens.count;
    scores.num_logprobs = tokens.num_logprobs;
    scores.complete = tokens.complete;
    scores.logprobs.reserve(static_cast<size_t>(tokens.count) * (1 + tokens.num_logprobs));
    auto* const first = reinterpret_cast<LogprobRecord*>(records + tokens.offset);
    for (int32_t i = 0; i < tokens.count; ++i) {
      LogprobRecord& record = *logprob_record(first, tokens.num_logprobs, i);
      if (record.count >= 0) {
        append_logprobs(record, scores.logprobs);
      } else {
        constexpr float kNan = std::numeric_limits<float>::quiet_NaN();
        if (scores.nan_position < 0) scores.nan_position = tokens.position + i;
        scores.logprobs.push_back({record.token, kNan, 0});
        scores.logprobs.insert(scores.logprobs.end(), tokens.num_logprobs, {-1, kNan, 0});
      }
    }
  }
}

}  // namespace mrv1
