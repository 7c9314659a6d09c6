// Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
#pragma once

#include <memory>
#include <vector>

#include "core/device.h"
#include "runner/runner_config.h"
#include "state/step_context.h"

namespace mrv1 {

// Sampling by itself, for benchmarks: the phases count_tokens and sample of a step over random
// logits, normal with a standard deviation of 3.
class SampleProbe {
 public:
  struct Options {
    int32_t batch = 1;  // rows, one logits row each
    int32_t vocab_size = 0;
    RowSpec spec;        // of every row but for the seed, to which its number is added
    int32_t copies = 1;  // of the logits, all different: a run goes through them, a call each
  };

  // Throws kInvalidArgument for what cannot be.
  SampleProbe(std::shared_ptr<Device> device, const Options& options);

  // Seconds of one call, and of one plain read of the same logits, in each of `repeats` runs
  // (time_probe). Calls leave logits as sample() does, so those of a later run may be edited.
  std::vector<double> time_runs(int32_t repeats);
  std::vector<double> time_reads(int32_t repeats);  // on a GPU
  // Of the last call, one a row.
  std::vector<int32_t> tokens();
  // Where a copy's [batch, vocab_size] logits lie, for other samplers to be timed on.
  const float* logits(int32_t copy) const;

 private:
  template <typename T>
  T* put(const std::vector<T>& values);
  Buffer& allocate(size_t bytes);
  void make_rows();
  void make_logits();
  int64_t copy_elements() const { return int64_t{options_.batch} * options_.vocab_size; }

  std::shared_ptr<Device> device_;  // outlives the buffers
  Options options_;
  std::vector<Buffer> buffers_;
  float* logits_ = nullptr;  // [copies, batch, vocab_size]
  uint64_t* sum_ = nullptr;  // of what plain reads read
  StepContext ctx_;
};

}  // namespace mrv1
