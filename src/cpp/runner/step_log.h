// Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>
#include <utility>
#include <vector>

#include "runner/graph_ladder.h"

namespace mrv1 {

// What the device of a rank did with one step, by its own clock, which those of other GPUs are not
// set by.
struct StepTime {
  uint64_t step = 0;
  uint64_t begin_ns = 0, end_ns = 0;  // as StepOutput
  // For other stages of a pipeline, since the step before had ended.
  uint64_t waited_ns = 0;
  int32_t requests = 0, tokens = 0;  // of the batch
  StepMode mode = StepMode::kEager;
  int32_t cut_token = 0;  // StepShape::cut_token
};

// The steps of a rank, for benchmarks and traces: kept while it is on.
class StepLog {
 public:
  bool is_on() const { return is_on_; }
  // From `first_step` on, before which the device had waited for so long.
  void start(uint64_t first_step, uint64_t waited_ns) {
    is_on_ = true;
    next_ = first_step;
    waited_ns_ = waited_ns;
    times_.clear();
  }
  void stop() { is_on_ = false; }
  // The next step, which has retired; `waited_ns` is in all steps up to it. Steps that are known
  // already change nothing.
  void add(StepTime time, uint64_t waited_ns) {
    if (!is_on_ || time.step < next_) return;
    next_ = time.step + 1;
    time.waited_ns = waited_ns - std::exchange(waited_ns_, waited_ns);
    times_.push_back(time);
  }
  std::vector<StepTime> take() { return std::exchange(times_, {}); }

 private:
  bool is_on_ = false;
  uint64_t next_ = 0, waited_ns_ = 0;
  std::vector<StepTime> times_;
};

}  // namespace mrv1
