// Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
#pragma once

#include <chrono>
#include <cstdint>
#include <memory>
#include <span>
#include <string_view>
#include <vector>

#include "core/device.h"
#include "core/dtype.h"
#include "dist/communicator.h"
#include "dist/expert_link.h"
#include "state/step_context.h"

namespace mrv1 {

// moe_dispatch and moe_combine by themselves, for tests and benchmarks: a graph of several of both
// on every rank, each with tokens of its own, run by a thread of each rank. In place of experts
// stand partial sums that are set beforehand, or what has come itself.
class ExpertProbe {
 public:
  enum class Part { kBoth, kDispatch, kCombine };
  struct Options {
    Part part = Part::kBoth;  // what a graph is of; one part alone for timing
    DType dtype = DType::kBF16;
    DType sum_dtype = DType::kBF16;
    std::vector<int32_t> tokens;  // of each rank
    int64_t region_rows = 1;
    int64_t hidden = 1;
    int32_t top_k = 1;
    int32_t num_experts = 1;
    int32_t calls = 1;
    // Before each call a rank waits up to as long, at random.
    std::chrono::microseconds delay{0};
  };

  ExpertProbe(std::vector<std::shared_ptr<Device>> devices, const GroupOptions& group,
              const Options& options);

  int size() const { return static_cast<int>(ranks_.size()); }
  const Options& options() const { return options_; }

  // Of a rank: values [calls, tokens, hidden], rounded to dtype; experts and weights
  // [calls, tokens, top_k].
  void set_tokens(int rank, std::span<const float> values, std::span<const int32_t> experts,
                  std::span<const float> weights);
  // What a rank has computed of the tokens of all: [ranks, region_rows, hidden], rounded to
  // sum_dtype. Without it, what has come; sum_dtype is dtype then.
  void set_partial(int rank, std::span<const float> values);

  // Runs the graph of every rank `launches` times; rank `absent`, if any, does not come. kDevice if
  // the group has ended.
  void run(int32_t launches, int absent = -1);
  // Of a rank: [calls, tokens, hidden].
  std::vector<float> result(int rank);
  // Of the last call: what has come to a rank, and where its own tokens went.
  struct Received {
    std::vector<float> x;          // [ranks, region_rows, hidden]
    std::vector<int32_t> experts;  // [ranks, region_rows, top_k]
    std::vector<float> weights;    // [ranks, region_rows, top_k]
    std::vector<int32_t> counts;   // [ranks]
    std::vector<int32_t> places;   // [tokens, ranks]
  };
  Received received(int rank);
  // Ends the group as a rank that fails does.
  void abort(std::string_view reason) { ranks_[0].communicator->abort(reason); }

  // Seconds of a call: of the slowest rank, in each of `repeats` runs of `launches` graphs. By the
  // clock of a GPU, else of the host.
  std::vector<double> time(int32_t repeats, int32_t launches);

 private:
  struct Rank {
    std::shared_ptr<Device> device;  // outlives what follows
    std::unique_ptr<Communicator> communicator;
    Buffer values, experts, weights, places, partial, results;
    Buffer received_x, received_experts, received_weights, counts, sums;
    ExpertBuffers received;
    StepContext ctx;
    std::unique_ptr<Graph> graph;
  };

  Rank& rank_at(int rank);
  int64_t region_elements() const { return size() * options_.region_rows * options_.hidden; }
  void launch_calls(Rank& rank);
  void capture();

  Options options_;
  std::vector<Rank> ranks_;
};

}  // namespace mrv1
