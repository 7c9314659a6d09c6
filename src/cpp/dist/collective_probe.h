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
#include "state/step_context.h"

namespace mrv1 {

// Collectives by themselves, for tests and benchmarks: a graph of several calls on every rank, each
// with values of its own, run by a thread of each rank.
class CollectiveProbe {
 public:
  enum class Op { kAllReduce, kAllGather };
  struct Options {
    Op op = Op::kAllReduce;
    DType dtype = DType::kBF16;
    DType out_dtype = DType::kBF16;
    int32_t rows = 1;
    int64_t cols = 1;  // of one rank
    int32_t calls = 1;
    bool in_place = false;   // sums take the place of the values
    bool with_bias = false;  // of all_reduce
    int64_t offset = 0;      // elements that every array lies behind an aligned address
    bool batch_invariant = false;
    // Before each call a rank waits up to as long, at random.
    std::chrono::microseconds delay{0};
  };

  CollectiveProbe(std::vector<std::shared_ptr<Device>> devices, const GroupOptions& group,
                  const Options& options);

  int size() const { return static_cast<int>(ranks_.size()); }
  const Options& options() const { return options_; }
  // Columns of a result.
  int64_t out_cols() const;

  // Values of a rank: [calls, rows, cols], rounded to dtype.
  void set_values(int rank, std::span<const float> values);
  // Of every rank: [cols].
  void set_bias(std::span<const float> bias);

  // Runs the graph of every rank `launches` times; rank `absent`, if any, does not come. kDevice if
  // the group has ended.
  void run(int32_t launches, int absent = -1);
  // [calls, rows, out_cols]
  std::vector<float> result(int rank);
  // Ends the group as a rank that fails does.
  void abort(std::string_view reason) { ranks_[0].communicator->abort(reason); }

  // Seconds of a call: of the slowest rank, in each of `repeats` runs of `launches` graphs. By the
  // clock of a GPU, else of the host.
  std::vector<double> time(int32_t repeats, int32_t launches);

 private:
  struct Rank {
    std::shared_ptr<Device> device;  // outlives what follows
    std::unique_ptr<Communicator> communicator;
    Buffer values, work, results, bias;
    StepContext ctx;
    std::unique_ptr<Graph> graph;
  };

  int64_t call_elements() const { return options_.rows * options_.cols; }
  int64_t out_elements() const { return options_.rows * out_cols(); }
  // fn(rank) in a thread of each rank's own, but for `absent`; throws what one of them threw.
  template <typename Fn>
  void each_rank(int absent, const Fn& fn);
  void launch_calls(Rank& rank);
  void capture();

  Options options_;
  std::vector<Rank> ranks_;
};

}  // namespace mrv1
