// Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
#pragma once

#include <chrono>
#include <cstdint>
#include <functional>
#include <memory>
#include <random>
#include <span>
#include <string_view>
#include <vector>

#include "core/device.h"
#include "core/dtype.h"
#include "dist/communicator.h"
#include "runner/control_writer.h"
#include "state/output_ring.h"
#include "state/step_context.h"

namespace mrv1 {

// What passes between the stages of a pipeline by itself, for tests: ranks that run all phases of
// steps around a model that is the least which tells values apart. Its values are x_v =
// table_v[token]; each layer adds a row of numbers to each of them; and the logits are the first
// value plus all those that are as wide and of float32, so that each token depends on every value
// that has crossed, and on the tokens before it. The layers are shared out evenly among the stages,
// one stage has all of them: outputs are the same, bit for bit.
class StageProbe {
 public:
  struct Value {
    int64_t cols = 0;
    DType dtype = DType::kF32;
  };
  struct Options {
    int32_t num_stages = 1;
    int32_t num_layers = 1;
    int32_t vocab_size = 0;
    std::vector<Value> values;  // the first: vocab_size columns of float32
    int32_t num_rows = 1;       // as many may be in a batch
    int32_t max_tokens = 1;     // of a batch
    int32_t max_model_len = 1;
    int32_t num_drafts = 0;  // of a row
    int32_t num_slots = 4;   // of all rings
    bool graphs = false;     // steps with a batch are replays of one graph
    // Before each thing that others may wait for, a rank waits up to as long, at random.
    std::chrono::microseconds delay{0};
    int slow_rank = -1;  // the one that does; all, if negative
  };
  // A row that a step's record adds: all of its tokens are its prompt's.
  struct NewProbeRow {
    int32_t row = 0, generation = 0;
    std::vector<int32_t> tokens;
    int32_t max_total_len = 0, num_drafts = 0;
  };
  struct ProbeStep {
    uint64_t adopt_through = 0;
    std::vector<FreeRow> freed;
    std::vector<NewProbeRow> added;
    std::vector<BatchEntry> entries;
  };
  // What a rank's host reads of a step.
  struct Output {
    uint64_t step = 0, waited_ns = 0;
    std::vector<OutputEntry> entries;
    std::vector<int32_t> tokens;  // [entries, 1 + num_drafts], kNoToken behind the new ones
  };
  struct RowView {
    Row row{};
    std::vector<int32_t> tokens;  // total_len
  };

  // Ranks in the order of make_group(). With graphs this runs a first step, which has no entries.
  StageProbe(std::vector<std::shared_ptr<Device>> devices, GroupOptions group,
             const Options& options, uint64_t seed);

  int size() const { return static_cast<int>(ranks_.size()); }
  const Options& options() const { return options_; }
  // What the model is made of: numbers that follow from the seed, rounded to the value's dtype.
  std::vector<float> table(int32_t value) const;                 // [vocab_size, cols]
  std::vector<float> shift(int32_t layer, int32_t value) const;  // [cols]

  // The step that run() begins with.
  uint64_t next_step() const { return next_step_; }
  // Random lives of rows for the next run(): prompts in chunks, rows that finish and stay in
  // batches a while, that are freed while steps with them are on their way, and places that others
  // take at once; steps without a batch. Each adopts what it must, and at times more; the last one,
  // all. No row must be in use.
  std::vector<ProbeStep> random_steps(int32_t count, uint64_t seed) const;
  // Runs steps on all ranks; rank `absent`, if any, leaves out those from number `from` on. kDevice
  // if the group has ended.
  void run(std::span<const ProbeStep> steps, int absent = -1, uint64_t from = 0);
  // Of the steps of the last run.
  const std::vector<Output>& outputs(int rank) const { return rank_at(rank).outputs; }
  RowView row(int rank, int32_t row);
  // A value as it has last crossed to this rank: [max_tokens, cols].
  std::vector<float> received(int rank, int32_t value);
  void abort(std::string_view reason) { ranks_[0]->communicator->abort(reason); }

 private:
  struct Rank;
  struct Task {
    StageProbe* probe;
    Rank* rank;
    StepSizes sizes;
  };
  struct Rank {
    std::shared_ptr<Device> device;  // outlives what follows
    std::unique_ptr<Communicator> communicator;
    std::vector<Buffer> buffers;
    std::vector<void*> tables, received, values;      // by value
    std::vector<std::vector<void*>> shifts;           // by layer of the stage, by value
    char *control = nullptr, *host_output = nullptr;  // as the host addresses them
    char* stage_outputs = nullptr;
    float* logits = nullptr;
    StepContext ctx;
    std::unique_ptr<Graph> graph;
    ControlWriter writer;
    std::mt19937_64 random;  // of delays
    std::vector<Task> tasks;
    std::vector<Output> outputs;
  };

  Rank& rank_at(int rank) const;
  const Value& value_at(int32_t value) const;
  void check_step(const ProbeStep& step, uint64_t number) const;
  std::vector<float> numbers(int64_t count, uint64_t kind, DType dtype, float deviation) const;
  void make_rank(Rank& rank);
  void link_ranks();
  template <typename T>
  T* allocate(Rank& rank, int64_t count, const char* what);
  void* put(Rank& rank, const std::vector<float>& values, DType dtype);
  StepSizes sizes_of(const ProbeStep& step) const;
  void run_rank(Rank& rank, std::span<const ProbeStep> steps);
  bool collect(Rank& rank, uint64_t step);
  void launch_step(Rank& rank, const StepSizes& sizes) const;
  void launch_model(Rank& rank, const StepContext& ctx, const std::function<void()>& dawdle) const;
  static void run_task(void* arg);

  Options options_;
  uint64_t seed_;
  int64_t control_bytes_ = 0, output_bytes_ = 0;
  uint64_t next_step_ = 1;
  bool warms_up_ = false;  // a step without entries runs at the sizes of the graph
  std::vector<std::unique_ptr<Rank>> ranks_;
};

}  // namespace mrv1
