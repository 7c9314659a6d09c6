// Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>
#include <span>
#include <string>
#include <vector>

#include "state/control_record.h"
#include "state/step_context.h"

namespace mrv1 {

// How a step reaches the device, from the slowest for the host to the fastest.
enum class StepMode {
  kEager,      // every kernel is launched by itself
  kPiecewise,  // attention is launched by itself, what lies between as graphs
  kFull,       // the whole step is one graph
};
constexpr int kNumStepModes = 3;
const char* step_mode_name(StepMode mode);

// A size that whole steps are captured at: `requests` places of `tokens_per_request` tokens each. A
// request with more tokens takes as many places as it needs.
struct CaptureSize {
  int32_t requests = 0, tokens_per_request = 1;

  int32_t tokens() const { return requests * tokens_per_request; }
  bool operator==(const CaptureSize&) const = default;
};

// How one step runs, and at which sizes.
struct StepShape {
  StepMode mode = StepMode::kEager;
  int32_t graph = -1;  // index of the size, in the order of the ladder
  bool whole = false;  // the size is one of whole steps, so these kernels run in every mode
  StepSizes sizes;
  PrefillWork prefill = {};
  bool cut = false;  // the draw, and what follows it, is launched apart from the rest
  // The first token of the second half, where the step runs as two (runner/two_batch.h); else 0.
  int32_t cut_token = 0;
};

// The sizes that are captured, and which of them a batch runs at: the smallest that holds it.
class GraphLadder {
 public:
  // Sizes are sorted by tokens, then requests, and repeated ones dropped. `mode` is the fastest
  // that steps may use; with kEager they are padded to the captured sizes all the same, so that
  // they run the very kernels that the graphs would.
  GraphLadder() = default;
  GraphLadder(StepMode mode, std::vector<CaptureSize> full, std::vector<int32_t> piecewise,
              int32_t max_drafts);

  // Whole steps of so many requests, for decode rows: of a token each, and of 1 + max_drafts each
  // where rows may have drafts and max_tokens allows it. Whoever chooses sizes gives requests; that
  // they come in pairs is decided here and nowhere else.
  static std::vector<CaptureSize> full_sizes(std::span<const int32_t> requests, int32_t max_drafts,
                                             int32_t max_tokens);
  // Numbers of requests that leave little of a step unused: every one at the small end, where
  // padding costs most, then in growing steps up to the limit.
  static std::vector<int32_t> default_requests(int32_t max_requests);
  static std::vector<int32_t> default_piecewise(int32_t max_tokens);

  // What a step of a size is launched for.
  StepSizes sizes_of(const CaptureSize& size) const;
  // With `scores`, tokens of prompts are scored too: work that no whole step has room for.
  StepShape choose(std::span<const BatchEntry> entries, StepSizes exact, bool scores);
  // A batch that could not use the mode that was asked for; each kind of miss is told once.
  struct Miss {
    std::string text;          // empty: nothing new
    bool decode_only = false;  // a step of one token a request, which should not miss
  };
  Miss take_miss();

  StepMode mode() const { return mode_; }
  const std::vector<CaptureSize>& full() const { return full_; }
  const std::vector<int32_t>& piecewise() const { return piecewise_; }

 private:
  void note_miss(StepMode taken, std::span<const BatchEntry> entries, const StepSizes& exact);

  StepMode mode_ = StepMode::kEager;
  int32_t max_drafts_ = 0;
  std::vector<CaptureSize> full_;
  std::vector<int32_t> piecewise_;
  bool reported_[2][kNumStepModes] = {};  // by decode-only or not, and mode taken
  Miss miss_;
};

}  // namespace mrv1
