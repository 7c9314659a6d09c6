// Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <string_view>
#include <vector>

#include "program/executable.h"
#include "program/program.h"
#include "runner/graph_ladder.h"
#include "runner/prompt_scores.h"
#include "runner/two_batch.h"
#include "state/infer_param_view.h"
#include "state/step_context.h"

namespace mrv1 {

// The device side of a step: its phases and the program, launched by themselves, in pieces or as
// one graph. Everything here runs inside tasks of the device's stream. A program without logits is
// a stage of a pipeline before the last: it draws nothing, but learns what the last one drew.
class Step {
 public:
  // The program, executable and device outlive it. `ctx` holds every address; its sizes are set
  // for each run.
  Step(const Program& program, const Executable& executable, Device& device, const StepContext& ctx)
      : program_(program), executable_(executable), device_(device), ctx_(ctx) {
    find_pieces();
  }

  // Also compute the view of state/infer_param_view.h.
  void set_view(const InferParamInputs& inputs, const InferParamView& view) {
    view_inputs_ = inputs;
    view_ = view;
  }

  // Steps that have a cut_token run as halves of it, which outlives this.
  void set_halves(const TwoBatch* halves) { halves_ = halves; }

  const StepContext& context() const { return ctx_; }
  StepContext& context() { return ctx_; }

  // Records the graphs of size `index` of the ladder, for whole steps and for halves apart. An
  // eager run of the kind and at that size must have come before: libraries choose their kernels,
  // and the driver loads code, on first use.
  void capture_full(size_t index, const StepSizes& sizes, int32_t cut_token);
  void capture_pieces(size_t index, int32_t tokens);
  void drop_graphs();

  // What a step scores of its prompts.
  struct Scoring {
    const PromptScorer* scorer = nullptr;
    std::span<const ScoredTokens> tokens;
    uint64_t slot = 0;
  };

  // Launches the whole step, or of one that is cut what comes before the draw. Sizes of 0 requests:
  // a record that only applies changes.
  void run(const StepShape& shape, const Scoring& scoring);
  // Launches the rest of a step that is cut.
  void run_rest(const StepShape& shape) const { run_back(context_for(shape)); }
  // As run() with every kernel launched by itself, and a failure after the program: for testing.
  void run_and_fail(const StepShape& shape, std::string_view message) const;

 private:
  // Ops between two cuts at attention.
  struct Piece {
    size_t first = 0, last = 0;
    bool captured = false;  // works on tokens alone, so that the number of tokens is its only size
    bool head = false;      // works on logits rows
  };

  void find_pieces();
  bool has_logits() const { return program_.logits_value() >= 0; }
  StepContext context_for(const StepShape& shape) const;
  void run_front(const StepContext& ctx, int32_t cut_token) const;
  void run_program(const StepContext& ctx, int32_t cut_token) const;
  std::unique_ptr<Graph> capture_step(const StepSizes& sizes, int32_t cut_token, bool with_draw);
  void score(const Scoring& scoring, const StepContext& ctx, const Piece& head) const;
  void run_back(const StepContext& ctx) const;
  void run_graph(const StepShape& shape);

  const Program& program_;
  const Executable& executable_;
  Device& device_;
  StepContext ctx_;
  std::optional<InferParamView> view_;
  InferParamInputs view_inputs_{};
  std::vector<Piece> pieces_;
  const TwoBatch* halves_ = nullptr;
  // By size: of whole steps, and of halves.
  struct SizeGraphs {
    std::unique_ptr<Graph> whole, halves;
    std::unique_ptr<Graph>& of(int32_t cut_token) { return cut_token > 0 ? halves : whole; }
  };
  std::vector<SizeGraphs> full_;
  std::vector<SizeGraphs> cut_;  // full_ without the draw and what follows it
  std::vector<std::vector<std::unique_ptr<Graph>>> piecewise_;  // by size, by captured piece
};

}  // namespace mrv1
