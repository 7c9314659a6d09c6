// Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>
#include <memory>
#include <span>
#include <vector>

#include "core/device.h"
#include "core/dtype.h"
#include "dist/communicator.h"
#include "state/step_context.h"

namespace mrv1 {

// Values on their way through the stages of a pipeline by themselves, for benchmarks: a graph of
// several messages on every rank, one of which is on its way between two stages at a time. A
// message ends when the next stage has let go of it.
class StageSendProbe {
 public:
  struct Options {
    DType dtype = DType::kBF16;
    int32_t rows = 1;
    int64_t cols = 1;
    int32_t calls = 1;    // messages of a graph
    bool copies = false;  // copies of the device to the next stage's buffer instead, as a floor
  };

  // A stage each.
  StageSendProbe(std::vector<std::shared_ptr<Device>> devices, GroupOptions group,
                 const Options& options);

  int size() const { return static_cast<int>(ranks_.size()); }
  const Options& options() const { return options_; }

  // What the first stage sends: [calls, rows, cols], rounded to dtype.
  void set_values(std::span<const float> values);
  // Runs the graph of every rank `launches` times.
  void run(int32_t launches);
  // What has come to a stage other than the first last: [rows, cols].
  std::vector<float> received(int rank);

  // Seconds of a message: of the slowest rank, in each of `repeats` runs of `launches` graphs. By
  // the clock of a GPU, else of the host.
  std::vector<double> time(int32_t repeats, int32_t launches);

 private:
  struct Rank {
    std::shared_ptr<Device> device;  // outlives what follows
    std::unique_ptr<Communicator> communicator;
    Buffer values, received, outputs, step;
    StepContext ctx;
    std::unique_ptr<Graph> graph;
  };

  int64_t call_bytes() const;
  void link_ranks();
  void launch_calls(Rank& rank);

  Options options_;
  std::vector<Rank> ranks_;
};

}  // namespace mrv1
