// Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
#pragma once

#include <memory>
#include <span>
#include <vector>

#include "core/device.h"
#include "ops/paged_attention.h"
#include "state/step_context.h"

namespace mrv1 {

// Decode attention by itself, for benchmarks: one bfloat16 token for each of some requests over
// random caches, whose blocks are mixed as in a cache that has been used for a while.
class AttentionProbe {
 public:
  struct Options {
    HeadShape shape;
    DType cache_dtype = DType::kBF16;         // or FP8
    KvScaleKind scales = KvScaleKind::kNone;  // of an FP8 cache
    bool tokens_first = false;                // [blocks, block_size, kv heads, head_dim]
    int32_t block_size = 16;
    std::vector<int32_t> lengths;  // cached tokens of each request, its own included
    int32_t copies = 1;            // caches, so that those of a run are in no processor's cache
  };

  AttentionProbe(std::shared_ptr<Device> device, const Options& options);

  // Whether there are kernels of `backend` for it.
  bool supports(AttentionBackend backend);
  // Seconds of one call in each of `repeats` runs over all caches, after one that warms up, on a
  // GPU after 0.1 s of them. There a run is one graph, timed by its clock. The plan of the batch is
  // made before.
  std::vector<double> time_runs(AttentionBackend backend, int32_t repeats);
  // Of the last call: [requests, heads, head_dim].
  std::vector<float> output();
  // Keys, values and scales that a call must read.
  int64_t read_bytes() const;

 private:
  Buffer& allocate(int64_t bytes);
  int32_t* ints(std::span<const int32_t> values);
  void make_batch();
  void make_cache(int32_t copy);

  std::shared_ptr<Device> device_;  // outlives the buffers
  Options options_;
  std::vector<Buffer> buffers_;
  std::vector<KvCacheLayer> caches_;
  StepContext ctx_;
  AttentionPlan plan_;
  const void* queries_ = nullptr;
  void* out_ = nullptr;
  int32_t num_blocks_ = 1;  // the null block included
};

}  // namespace mrv1
