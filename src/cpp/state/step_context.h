// Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstddef>
#include <cstdint>

#include "core/portable.h"
#include "state/infer_params.h"
#include "state/row_state.h"

namespace mrv1 {

class Communicator;   // dist/communicator.h
class Device;         // core/device.h
struct OutputHeader;  // state/output_ring.h
class ThreadPool;     // core/thread_pool.h

// Sizes a step is launched for: the batch's own, or those of the bucket that it is padded to.
struct StepSizes {
  int32_t num_requests = 0, num_tokens = 0, num_logits = 0;
  bool speculates = false;  // decode rows may have drafts
};

// Where the records and outputs of steps lie, and which step this is: addresses that never change,
// so that a captured graph finds its step's slot by itself. Slot s holds every step with
// step % num_slots == s.
struct StepRings {
  char* control = nullptr;  // ControlHeader and its arrays, a slot each control_bytes
  char* output = nullptr;   // OutputHeader and its entries, a slot each output_bytes
  int64_t control_bytes = 0, output_bytes = 0;
  int32_t num_slots = 0;
  uint64_t* step = nullptr;  // the step that runs; advance() counts it up
  // Where apply() puts the header and the batch entries of the record, for the kernels after it:
  // device memory on a GPU, null where the record itself is as near.
  char* staged = nullptr;

  // The record and the output slot of the step that runs.
  MRV1_HD const ControlHeader* record() const {
    return reinterpret_cast<const ControlHeader*>(control + *step % num_slots * control_bytes);
  }
  MRV1_HD OutputHeader* output_slot() const {
    return reinterpret_cast<OutputHeader*>(output + *step % num_slots * output_bytes);
  }
};

// What attention has to do for the extend and prefill rows of a step, as the host knows it. Zeros
// where it does not: with rows like that, kernels are chosen that need no such bound.
struct PrefillWork {
  int64_t keys = 0;    // positions that these rows have in the cache after the step, at most
  int64_t scores = 0;  // products of a row's tokens in the step and its positions
};

// Which kernels compute the attention of decode rows.
enum class AttentionBackend { kNative, kFlashInfer };

// All that a step reads and writes besides weights, row state and KV cache. Ops get it as an
// argument; nothing about a step is global. One context runs one step at a time.
struct StepContext {
  Device* device = nullptr;
  ThreadPool* pool = nullptr;  // CPU
  void* stream = nullptr;      // CUDA: cudaStream_t
  StepSizes sizes;             // padded
  PrefillWork prefill;
  StepRings rings;            // device addresses
  RowState rows{};            // device addresses
  InferParams infer{};        // device addresses, written by infer_params
  void* workspace = nullptr;  // scratch of ops, workspace_bytes long; contents do not outlive an op
  size_t workspace_bytes = 0;
  Communicator* communicator = nullptr;  // of the rank; null where there is one rank
  int32_t expert_set = 0;                // of ExpertBuffers, that the step uses
  // Of a half of a step: thread blocks that a collective takes at most, and that kernels which fill
  // a GPU leave room for, as it runs beside them; 0: as many as it likes, as nothing else runs.
  int32_t collective_blocks = 0;
  // A row's results must not depend on what else is in the batch, bit for bit.
  bool batch_invariant = false;
  AttentionBackend attention_backend = AttentionBackend::kNative;
  // Attention is launched for this batch alone, not captured for later ones: it may use kernels
  // whose launch sizes follow the host's knowledge of the batch.
  bool eager_attention = false;
  // A kernel may start, and read weights, before the launch before it has ended. Not so where that
  // launch may have written them.
  bool overlap_launches = true;
  bool sync_launches = false;  // wait after every launch, so that an error names its kernel
};

}  // namespace mrv1
