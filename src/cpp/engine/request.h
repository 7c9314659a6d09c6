// Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
#pragma once

#include <compare>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "engine/block_pool.h"
#include "engine/mask_source.h"
#include "runner/model_runner.h"

namespace mrv1 {

// A request as the engine takes it. Of `row`, num_computed, block_ids and grammar are the engine's
// to fill, and every token of token_ids is the prompt's.
struct RequestSpec {
  RowSpec row;
  int32_t priority = 0;  // lower is more urgent; equal ones in order of arrival
  CacheScope scope;
  bool use_prefix_cache = true;      // takes blocks from the prefix cache, and leaves its own there
  std::shared_ptr<Grammar> grammar;  // of all samples; null if outputs are free
};

// Logprobs of the tokens of a prompt but the first, given those before each:
// [tokens, 1 + num_logprobs], of each token itself, then of the candidates.
struct PromptLogprobs {
  int32_t num_logprobs = -1;  // candidates; -1: there are none at all
  std::vector<TokenLogprob> tokens;
};

enum class RequestEnd { kNone, kStop, kLength, kAbort, kError };

// News of one request. Its last one has an end other than kNone.
struct RequestEvent {
  int32_t slot = -1;
  RequestEnd end = RequestEnd::kNone;
  int32_t num_tokens = 0;        // that many of EventBatch::tokens
  int32_t num_logprobs = 0;      // that many of EventBatch::logprobs
  int32_t stop_sequence = -1;    // which one stopped the request
  int32_t error = -1;            // index into EventBatch::errors
  int32_t prompt_logprobs = -1;  // index into EventBatch::prompt_logprobs
  int32_t num_cached_tokens = 0;
  int32_t num_draft_tokens = 0, num_accepted_tokens = 0;  // of the request so far
};

// Events in the order they happened. Its arrays keep their capacity.
struct EventBatch {
  std::vector<RequestEvent> events;
  std::vector<int32_t> ends;           // indices of the events with an end
  std::vector<int32_t> tokens;         // of the events, one after the other
  std::vector<TokenLogprob> logprobs;  // of the events, as StepOutput has them
  std::vector<std::string> errors;
  std::vector<PromptLogprobs> prompt_logprobs;

  void clear() {
    events.clear();
    ends.clear();
    tokens.clear();
    logprobs.clear();
    errors.clear();
    prompt_logprobs.clear();
  }
};

struct EngineStats {
  uint64_t steps = 0;
  uint64_t prefill_tokens = 0, decode_tokens = 0;  // computed
  uint64_t preemptions = 0;
  uint64_t prefix_hit_tokens = 0;  // found in the prefix cache at admission, resumed ones included
  uint64_t draft_tokens = 0, accepted_tokens = 0;
  // Results nobody waited for: of requests that had stopped in the step before, masked by the
  // device, and of those that ended otherwise, as by an abort, while the step ran.
  uint64_t masked_results = 0, dropped_results = 0;
  uint64_t device_wait_cpu_ns = 0;  // CPU time that waiting for the device took
  int32_t running = 0, waiting = 0;
  int32_t free_blocks = 0, cached_blocks = 0;
};

// The order of everything that is scheduled: a total order, smaller is more urgent.
struct Urgency {
  int32_t priority = 0;
  uint64_t arrival = 0;
  int32_t sample = 0;

  auto operator<=>(const Urgency&) const = default;
};

enum class RequestState : uint8_t {
  kNone,     // the slot is free
  kHeld,     // a further sample of a prompt that the first one still computes
  kWaiting,  // in line; may hold blocks that it shares with the first sample
  kRunning,  // has a row
};

// What a decode step touches of a request: two cache lines, in an array by slot, so that a step
// follows no pointer for a request that merely goes on.
struct alignas(64) Request {
  static constexpr int32_t kTail = 16;

  RequestState state = RequestState::kNone;
  bool has_held = false;      // RequestDetails::held is not empty
  bool keeps_blocks = false;  // its blocks enter the prefix cache
  uint8_t num_tail = 0;
  int32_t slot = -1;
  RowHandle handle;            // of no row unless running
  int32_t prefill_target = 0;  // tokens known at admission
  int32_t num_drafts = 0;      // at most, a step
  // Bounds of the tokens computed once all launched steps have retired. They differ by drafts that
  // steps in flight may reject. What they are above num_computed is what the steps in flight add.
  int32_t num_launched = 0;  // at most
  int32_t num_certain = 0;   // at least, unless the row stops
  int32_t num_computed = 0;  // tokens computed by retired steps
  int32_t capacity = 0;      // tokens that the blocks hold
  int32_t max_total_len = 0;
  int32_t num_kept = 0;            // leading blocks that were offered to the prefix cache
  int32_t next_drop = 0;           // num_computed at which blocks fall below a window
  int32_t num_cached_tokens = -1;  // -1: not admitted yet
  uint64_t last_step = 0;
  // The newest outputs, which RequestDetails::row does not have yet.
  int32_t tail[kTail] = {};
};
static_assert(sizeof(Request) == 128);

// The rest of a request: what admission, a new block and the end touch.
struct alignas(64) RequestDetails {
  // What a new block touches comes first, up to the tokens.
  std::vector<std::vector<int32_t>> blocks;  // [group]; equally many, 0 where dropped
  CacheScope scope;
  int32_t prefix = BlockPool::kRoot;  // pinned: of the first num_kept blocks
  bool forked = false;                // waiting, with blocks of the first sample
  RowSpec row;                        // token_ids grows with the outputs
  std::shared_ptr<Grammar> grammar;
  int32_t num_told = 0;  // outputs that the grammar has heard of
  Urgency urgency;
  std::vector<int32_t> num_dropped;  // [group] leading blocks below the window
  int32_t num_draft_tokens = 0, num_accepted_tokens = 0;
  int32_t first_sample = -1;       // held: the slot of the one that computes the prompt
  std::vector<int32_t> held;       // slots of samples that wait for this one's prompt
  PromptLogprobs prompt_logprobs;  // of the tokens scored so far; row.num_scored follows
};

}  // namespace mrv1
