// Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
#pragma once

#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "core/device.h"
#include "io/weight_store.h"
#include "program/executable.h"
#include "program/kv_store.h"
#include "program/program.h"
#include "state/step_context.h"

namespace mrv1 {

// Runs a program over inputs, infer_params and a KV cache that the caller sets by hand: how a
// single op or a fused form is tested on either backend. Values cross as float32 and are converted
// to their dtype.
class ProgramSession {
 public:
  struct Limits {
    int32_t max_requests = 1, max_tokens = 1, max_logits = 1;
    int32_t num_blocks = 1, block_size = 16, max_blocks = 1;
    int64_t max_position = 1;
    std::optional<DType> kv_cache_dtype = {};     // FP8; none: the program's
    KvScaleKind kv_scales = KvScaleKind::kToken;  // of an FP8 cache; static ones are 1 at first
  };

  ProgramSession(std::shared_ptr<Device> device, Program program, const Limits& limits);

  WeightStore& weights() { return weights_; }
  const Program& program() const { return program_; }
  const std::shared_ptr<Device>& device() const { return device_; }
  // Inputs and outputs of the program only: the bytes of other values are reused during a run.
  void set_value(int32_t value, const std::vector<float>& data);
  std::vector<float> value(int32_t value, int64_t rows);
  // Where the rows of an input or output lie on the device.
  struct DeviceValue {
    void* data;
    DType dtype;
    int64_t max_rows, cols;
  };
  DeviceValue device_value(int32_t value);
  // name: counts (the six of InferCounts), row, query_start_loc, seq_lens, token_batch, token_ids,
  // positions, slot_mapping ([KV groups, max_tokens]), logits_indices, logits_batch, or block_table
  // ([KV groups, max_requests, max_blocks]).
  void set_ints(const std::string& name, const std::vector<int32_t>& data);
  // Keys (or values) of a layer, [num_blocks, kv_heads, block_size, head_dim]; of an FP8 cache what
  // its codes stand for, without scales.
  void set_cache(int32_t layer, bool values, const std::vector<float>& data);
  std::vector<float> cache(int32_t layer, bool values);
  // Scales of a layer's keys (or values): one, one a head, or [num_blocks, kv_heads, block_size].
  void set_cache_scales(int32_t layer, bool values, const std::vector<float>& data);
  std::vector<float> cache_scales(int32_t layer, bool values);
  // Random values in the caches of all layers (program/kv_store.h): for timing.
  void fill_cache(uint64_t seed);
  void run(int32_t num_requests, int32_t num_tokens, int32_t num_logits);
  // Seconds of each of `repeats` runs, after one that warms up. On a GPU a run is launched as one
  // graph, and the time is that of the GPU's clock.
  std::vector<double> time_runs(int32_t num_requests, int32_t num_tokens, int32_t num_logits,
                                int32_t repeats);
  // As the fields of StepContext, for the runs that follow.
  void set_options(bool batch_invariant, bool eager_attention, AttentionBackend backend);

 private:
  void set_sizes(int32_t num_requests, int32_t num_tokens, int32_t num_logits);
  const Value& lasting_value(int32_t id) const;
  int64_t max_rows(const Value& value) const;
  const KvCacheLayer& cache_layer(int32_t layer) const;
  std::pair<float*, int64_t> scales_of(int32_t layer, bool values) const;
  void write_floats(void* target, int64_t count, const std::vector<float>& data, DType dtype);
  std::vector<float> read_floats(const void* source, int64_t count, DType dtype);

  std::shared_ptr<Device> device_;
  Program program_;
  Limits limits_;
  WeightStore weights_;
  std::vector<Buffer> buffers_;
  std::vector<KvCacheLayer> kv_;
  StepContext ctx_;
  std::vector<int32_t> seq_lens_, query_start_loc_;  // as set last
  std::unique_ptr<Executable> executable_;
};

}  // namespace mrv1
