// Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstddef>
#include <cstdint>

#include "core/device.h"
#include "state/infer_params.h"
#include "state/row_state.h"

namespace mrv1 {

// Sizes a step is launched for. On the CPU they are the batch's own unless a bucket was asked for.
struct StepSizes {
  int32_t num_requests = 0, num_tokens = 0, num_logits = 0;
};

// All that a step reads and writes besides weights, row state and KV cache. Ops get it as an
// argument; nothing about a step is global. One context runs one step at a time.
struct StepContext {
  Device* device = nullptr;
  ThreadPool* pool = nullptr;  // CPU
  void* stream = nullptr;      // CUDA: cudaStream_t
  StepSizes sizes;             // padded
  RowState rows;               // device addresses
  InferParams infer;           // device addresses, written by infer_params
  void* workspace = nullptr;  // scratch of ops, workspace_bytes long; contents do not outlive an op
  size_t workspace_bytes = 0;
};

}  // namespace mrv1
