// Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
#pragma once

#include <array>
#include <cstdint>
#include <memory>
#include <span>
#include <vector>

#include "core/device.h"
#include "program/executable.h"
#include "program/plan.h"
#include "program/program.h"
#include "runner/runner_config.h"
#include "runner/step_agreement.h"
#include "state/step_context.h"

namespace mrv1 {

// Whether a step of ranks that compute one model, but maybe each a batch of its own, runs as two
// halves: one answer for all, as each half has its own collectives. The fullest rank, whose step
// takes longest, decides.
bool runs_in_halves(const TwoBatchConfig& config, std::span<const StepLoad> ranks);

// Two-batch overlap: the tokens of a step are cut into two halves, and while one half meets the
// other ranks in a collective, the other one computes.
//
//   device's own stream:  A0  B0  A1  B1  A2  B2 ...     pieces between collectives
//   side stream:              a0  b0  a1  b1  ...        the collectives themselves
//
// A1 waits for a0, which waits for A0; each stream runs in order, so collectives have one order on
// all ranks, and what a request's tokens of the first half write to the KV cache is there before
// those of the second half read it. Halves share weights, rope tables, KV cache and the workspace,
// which collectives do not use; each has its own arena, attention plans and infer_params. The head
// runs once, over the whole step.
class TwoBatch {
 public:
  // Whether the program has collectives that halves could hide, and the runner asks for it.
  static bool applies(const Program& program, const RunnerConfig& config);
  // Device memory that halves need beside what whole steps do.
  static int64_t bytes(const Program& program, const RunnerConfig& config, const PlanLimits& limits,
                       Device& device);
  // Tokens of a half at most.
  static int32_t max_tokens(const RunnerConfig& config);

  // `whole` runs the program over whole steps of `limits`; it, the program and the device outlive
  // this.
  TwoBatch(const Program& program, const Executable& whole, const RunnerConfig& config,
           const PlanLimits& limits, Device& device, std::span<const WeightView> weights,
           std::span<const KvCacheLayer> kv);

  // Where a step of `padded` tokens, 2 at least, is cut, `tokens` of which are the batch's: the
  // first token of the second half. With drafts that is between the places of two requests, if
  // halves have room for it. Both halves have a token, if only one of padding.
  int32_t cut_of(int32_t tokens, int32_t padded, bool speculates) const;

  // In place of the whole program's plans of attention, after infer_params.
  void plan(const StepContext& ctx, int32_t cut) const;
  // The ops before num_ops(), in halves; afterwards the values that later ones and outputs are read
  // from lie where whole steps have them. The op that follows must not overlap with it.
  void run(const StepContext& ctx, int32_t cut) const;
  size_t num_ops() const { return num_ops_; }
  // What runs a half; 0 is the first.
  const Executable& executable(int half) const { return *halves_[half].executable; }
  // Where a half's counts and arrays of batch positions lie; 0 is the first.
  const InferParams& infer(int half) const { return halves_[half].infer; }

 private:
  struct Half {
    std::unique_ptr<Executable> executable;
    Buffer ints;          // of infer
    InferParams infer{};  // arrays of tokens are set for each step
    std::unique_ptr<StreamMark> computed, met;
  };
  // Ops [first, collective) and the collective, or the last ops of all and none.
  struct Piece {
    size_t first = 0, collective = 0;
    bool meets = false;
  };

  std::array<StepContext, 2> contexts(const StepContext& ctx, int32_t cut) const;
  void join(const StepContext& ctx, int32_t cut) const;

  const Program& program_;
  const Executable& whole_;
  Device& device_;
  int32_t max_tokens_, places_, collective_blocks_;
  std::array<Half, 2> halves_;
  size_t num_ops_ = 0;
  std::vector<Piece> pieces_;
  std::vector<int32_t> joined_;  // values
};

}  // namespace mrv1
