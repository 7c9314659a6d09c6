// Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
#pragma once

#include <algorithm>
#include <chrono>
#include <cstdint>
#include <string>
#include <utility>
#include <vector>

#include "dist/communicator.h"
#include "program/kv_store.h"
#include "runner/graph_ladder.h"
#include "state/step_context.h"

namespace mrv1 {

// Whether steps run as two halves, each computing while the other meets the other ranks
// (runner/two_batch.h): never, from so many tokens on, or whenever there are two.
enum class TwoBatchMode { kOff, kAuto, kOn };
struct TwoBatchConfig {
  TwoBatchMode mode = TwoBatchMode::kOff;
  int32_t min_prefill_tokens = 0;  // of steps with prompts
  int32_t min_decode_tokens = 0;   // of others, and of those that run as one graph
  // Of a GPU's collectives in halves, at most, so that the other half keeps its processors; 0: as
  // many as they like.
  int32_t collective_blocks = 0;
};

struct RunnerConfig {
  int32_t max_num_seqs = 0;            // rows
  int32_t max_num_batched_tokens = 0;  // tokens of one step
  int32_t max_model_len = 0;           // tokens of one row
  int32_t block_size = 16;             // tokens of one KV block
  int32_t num_blocks = 0;              // KV blocks, the null block included
  KvCacheSpec kv_cache;                // what they hold
  // Candidates that a row may report beside each token (RowSpec::num_logprobs); -1: rows have no
  // logprobs at all, and the output ring no room for them.
  int32_t max_logprobs = -1;
  // Words that the lists of rows get at first, and by which their memory grows (WordPool).
  int64_t sampling_words = 1 << 16;
  // Steps are padded up to these sizes (0: the batch's own). For testing what padding must not
  // change.
  int32_t pad_requests = 0, pad_tokens = 0;
  // Also compute the table-row-order view of state/infer_param_view.h every step.
  bool infer_param_view = false;
  // The fastest way that steps may reach the device, and the sizes that capture_graphs() records.
  StepMode graph_mode = StepMode::kEager;
  std::vector<CaptureSize> capture_sizes;
  std::vector<int32_t> piecewise_sizes;  // tokens
  AttentionBackend attention_backend = AttentionBackend::kNative;
  // Drafts that a decode row may have in a step, by prompt lookup (state/propose.h); 0 = none.
  int32_t num_speculative_tokens = 0;
  NgramRange ngram{1, 3};
  // For testing: rows may carry tokens that take the place of those drawn.
  bool force_tokens = false;
  // Keep what hidden_states() reads.
  bool keep_hidden_states = false;
  bool batch_invariant = false;  // see StepContext
  bool sync_launches = false;    // see StepContext
  // Ranks that compute the model together, in all, the stages of a pipeline that they form, and how
  // long one waits for the others before they all end.
  int32_t num_ranks = 1;
  int32_t num_stages = 1;
  std::chrono::milliseconds rank_timeout{8000};
  // Of ranks on GPUs, and the names that NCCL is opened by if it is needed.
  CollectiveKernels collectives = CollectiveKernels::kAuto;
  std::vector<std::string> nccl;
  TwoBatchConfig two_batch;
  // Ranks have requests of their own each (runner/data_ranks.h); there are no stages then.
  bool data_parallel = false;
};

// Ranks that compute each layer together.
inline int32_t tensor_ranks(const RunnerConfig& config) {
  return config.data_parallel ? 1 : config.num_ranks / config.num_stages;
}

// A request as the runner sees it.
struct RowSpec {
  std::vector<int32_t> token_ids;  // prompt, plus outputs when a preempted request resumes
  int32_t prompt_len = 0;          // of token_ids, how many are the prompt proper
  int32_t num_computed = 0;        // leading tokens whose KV blocks are already filled
  float temperature = 1.0f, top_p = 1.0f, min_p = 0.0f;
  int32_t top_k = 0;
  uint64_t seed = 0;
  int32_t max_tokens = 1;  // outputs counted from prompt_len
  int32_t min_tokens = 0;
  // Drafts of a step at most; -1 = the runner's num_speculative_tokens, which is also the most.
  int32_t num_speculative_tokens = -1;
  std::vector<int32_t> forced_token_ids;  // outputs, counted from prompt_len, whatever is drawn
  std::vector<int32_t> stop_ids;          // EOS and stop tokens
  // Token sequences that end the row once its outputs end with one of them.
  std::vector<std::vector<int32_t>> stop_sequences;
  // Penalties on tokens by how they occurred: presence and frequency of outputs, repetition of
  // prompt and outputs.
  float presence_penalty = 0.0f, frequency_penalty = 0.0f, repetition_penalty = 1.0f;
  std::vector<std::pair<int32_t, float>> logit_bias;  // distinct token ids
  std::vector<int32_t> allowed_token_ids;             // empty: all
  std::vector<std::vector<int32_t>> bad_words;        // token sequences that never come out whole
  // Candidates to report beside each token; -1: not even the token's own logprob.
  int32_t num_logprobs = -1;
  // What may be drawn is told before each draw, by a mask (GrammarMasks); there are no drafts.
  bool grammar = false;
  // Candidates to report beside each token of the prompt but the first; -1: not even its own
  // logprob. What follows the first num_scored tokens has been reported before, and only these may
  // have been computed.
  int32_t num_prompt_logprobs = -1;
  int32_t num_scored = 0;
  // First blocks of each KV group; more by append_blocks. Leading ones whose positions no token
  // sees any more may be 0.
  std::vector<std::vector<int32_t>> block_ids;
};

// Stands for whatever request holds the row now, where a caller does not name a generation.
constexpr int32_t kAnyGeneration = -1;

struct RowHandle {
  int32_t row = -1;
  int32_t generation = kAnyGeneration;
};

// What a step is to compute of a row: of a prefill, that many tokens; of a decode row 1, or 1 + the
// drafts that may be proposed.
struct BatchItem {
  int32_t row;
  int32_t num_tokens;
  int32_t generation = kAnyGeneration;
};

// Block ids that a row can hold.
inline int32_t max_blocks_per_row(const RunnerConfig& config) {
  return (config.max_model_len + config.block_size - 1) / config.block_size;
}

// Steps of a runner that may be in flight and unread. A pipeline of P stages needs P of them to be
// busy, and one more that is being launched.
inline int32_t step_slots(const RunnerConfig& config) {
  return config.num_stages == 1 ? 4 : config.num_stages + 3;
}

// Logits rows of the largest step.
inline int32_t max_logits_rows(const RunnerConfig& config) {
  const int64_t rows = int64_t{config.max_num_seqs} * (1 + config.num_speculative_tokens);
  return static_cast<int32_t>(std::min<int64_t>(rows, config.max_num_batched_tokens));
}

}  // namespace mrv1
