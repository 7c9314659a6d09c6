// Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>
#include <span>
#include <string>
#include <vector>

#include "core/dtype.h"
#include "core/portable.h"
#include "dist/group_limits.h"

namespace mrv1 {

class Communicator;  // dist/communicator.h

// A value that crosses from one stage of a pipeline to the next: a row a token.
struct StageValue {
  std::string name;  // the key under which both stages know it
  int64_t cols = 0;
  DType dtype = DType::kF32;
  bool operator==(const StageValue&) const = default;
};

// Values that cross one boundary, at most: the residual, and what is still to be added to it.
constexpr int kMaxStageValues = 4;

// What a rank of a pipeline shows the others before the first step: what it sends and takes, and
// where in its device's memory others may write.
struct StageBuffers {
  std::vector<StageValue> sends;     // to the next stage, empty on the last
  std::vector<StageValue> receives;  // from the stage before, empty on the first
  std::vector<void*> received;       // one a value that it takes: [max tokens, cols]
  // Outputs of steps as the last stage knows them, for stages before the last: slots as those of
  // StepRings::output, each outputs_bytes, without logprobs. Null on the last stage.
  void* outputs = nullptr;
  int64_t outputs_bytes = 0;
  int32_t num_slots = 0;
};

// Flags of a rank, in its device's memory. Others write them, only the rank itself reads them: a
// word each, which grows by one writer's stores alone.
struct StagePort {
  alignas(128) uint64_t arrived;  // steps whose values the stage before has written
  alignas(128) uint64_t taken;    // of the values that this rank sent, steps that were let go of
  // On the last stage: the newest step whose outputs each stage has adopted, by stage.
  alignas(128) uint64_t adopted[kMaxRanks];
};

// A rank's own counters, in its device's memory.
struct StageCounters {
  uint64_t sent;       // steps
  uint64_t received;   // steps
  uint64_t adopted;    // the newest step whose outputs are in the row state
  uint64_t waited_ns;  // in all waits for other stages, since the start
};

// A rank's view of its pipeline, as ops get it. Addresses are the device's; those of other ranks
// can be written from here. Ranks of one place in their stages are linked with each other.
struct StageLink {
  int32_t stage = 0, num_stages = 1;
  StageCounters* counters = nullptr;
  StagePort* port = nullptr;                // of this rank
  StagePort* previous = nullptr;            // of the stage before; null on the first
  StagePort* next = nullptr;                // of the stage after; null on the last
  StagePort* last = nullptr;                // of the last stage
  int32_t num_values = 0;                   // that this rank sends
  void* next_values[kMaxStageValues] = {};  // where they go
  char* outputs = nullptr;                  // StageBuffers::outputs of this rank
  char* stage_outputs[kMaxRanks] = {};      // on the last stage: those of the others, by stage
  int64_t outputs_bytes = 0;
  int32_t num_slots = 0;

  MRV1_HD bool is_last() const { return stage + 1 == num_stages; }
};

// Links the ranks of a pipeline, given in the order of make_group(), each with its buffers. Before
// the first step. kInvalidArgument naming the key if what a stage sends is not what the next one
// takes: names, columns and dtypes in their order.
void link_stages(std::span<Communicator* const> ranks, std::span<const StageBuffers> buffers);

}  // namespace mrv1
