// Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>
#include <string_view>

#include "dist/stage_link.h"
#include "peer_memory.h"
#include "state/step_context.h"

namespace mrv1::cuda {

// A rank's view of its pipeline, as kernels get it. Ports, values and outputs lie in the memory of
// the GPU that reads them: whoever writes them writes to a peer, and all waits are for the GPU's
// own memory.
struct StageView {
  StageLink link;
  PeerWatch watch;
  int32_t stage_size;    // ranks of a stage
  const uint64_t* step;  // StepRings::step, for reports

  // Number, among all ranks, of the one that this rank is linked with in another stage.
  MRV1_HD int rank_at(int stage) const { return watch.rank + (stage - link.stage) * stage_size; }
};

// That of the context's rank, for `op`. kDevice if the group has ended, kInternal if the rank is
// not linked.
StageView stage_view(std::string_view op, const StepContext& ctx);

// Each loads kernels that wait for other stages, on the current GPU: one that is loaded at its
// first launch may wait for others that wait for it.
void load_stage_send();
void load_stage_receive();
void load_adopt();
void load_advance();

}  // namespace mrv1::cuda
