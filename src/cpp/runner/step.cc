// Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
#include "runner/step.h"

#include "core/error.h"

namespace mrv1 {

void Step::find_pieces() {
  const std::vector<Op>& ops = program_.ops();
  const auto works_on_logits = [&](const Op& op) {
    return !op.outputs.empty() && program_.values()[op.outputs.back()].space == RowSpace::kLogits;
  };
  // 0: token rows, 1: attention, 2: logits rows. A piece holds ops of one kind.
  const auto kind_of = [&](const Op& op) {
    return op.kind == OpKind::kPagedAttention ? 1 : works_on_logits(op) ? 2 : 0;
  };
  for (size_t first = 0; first < ops.size();) {
    size_t last = first + 1;
    while (last < ops.size() && kind_of(ops[last]) == kind_of(ops[first])) ++last;
    pieces_.push_back({first, last, kind_of(ops[first]) == 0, kind_of(ops[first]) == 2});
    first = last;
  }
}

StepContext Step::context_for(const StepShape& shape) const {
  StepContext ctx = ctx_;
  ctx.sizes = shape.sizes;
  ctx.prefill = shape.prefill;
  ctx.eager_attention = !shape.whole;
  return ctx;
}

void Step::run_front(const StepContext& ctx, int32_t cut_token) const {
  const Kernels& kernels = device_.kernels();
  // Rows have to be what they were in the steps before when others take their places.
  if (!has_logits()) kernels.adopt(ctx);
  kernels.apply(ctx);
  if (ctx.sizes.num_requests == 0) return;
  if (ctx.sizes.speculates) kernels.propose(ctx);
  kernels.infer_params(ctx);
  if (has_logits()) kernels.count_tokens(ctx);
  if (view_) kernels.infer_param_view(view_inputs_, *view_, ctx);
  if (cut_token > 0) {
    halves_->plan(ctx, cut_token);
  } else {
    executable_.plan_attention(ctx);
  }
}

// The whole program, whose plans are there.
void Step::run_program(const StepContext& ctx, int32_t cut_token) const {
  if (cut_token == 0) {
    executable_.run(ctx, 0, executable_.num_ops());
    return;
  }
  halves_->run(ctx, cut_token);
  executable_.run_apart(ctx, halves_->num_ops(), executable_.num_ops());
}

void Step::run_back(const StepContext& ctx) const {
  const Kernels& kernels = device_.kernels();
  if (ctx.sizes.num_requests > 0 && has_logits()) {
    auto* logits = static_cast<float*>(executable_.value(program_.logits_value()));
    kernels.sample({logits, ctx.rows.vocab_size}, ctx);
  }
  kernels.advance(ctx);
}

std::unique_ptr<Graph> Step::capture_step(const StepSizes& sizes, int32_t cut_token,
                                          bool with_draw) {
  return device_.capture([this, sizes, cut_token, with_draw] {
    const StepContext ctx = context_for({.whole = true, .sizes = sizes});
    run_front(ctx, cut_token);
    run_program(ctx, cut_token);
    if (with_draw) run_back(ctx);
  });
}

void Step::capture_full(size_t index, const StepSizes& sizes, int32_t cut_token) {
  if (full_.size() <= index) full_.resize(index + 1);
  full_[index].of(cut_token) = capture_step(sizes, cut_token, /*with_draw=*/true);
}

void Step::capture_pieces(size_t index, int32_t tokens) {
  if (piecewise_.size() <= index) piecewise_.resize(index + 1);
  std::vector<std::unique_ptr<Graph>>& graphs = piecewise_[index];
  graphs.clear();
  for (const Piece& piece : pieces_) {
    if (!piece.captured) continue;
    graphs.push_back(device_.capture([this, piece, tokens] {
      // Only the number of tokens matters to these ops; the others are those of a smallest batch.
      executable_.run(context_for({.sizes = {1, tokens, 1}}), piece.first, piece.last);
    }));
  }
}

void Step::drop_graphs() {
  full_.clear();
  cut_.clear();
  piecewise_.clear();
}

// The head reads hidden states of all the step's tokens, which the logits that it makes leave
// alone.
void Step::score(const Scoring& scoring, const StepContext& ctx, const Piece& head) const {
  const auto* logits = static_cast<const float*>(executable_.value(program_.logits_value()));
  scoring.scorer->run(scoring.tokens, scoring.slot, ctx, logits, [&](const StepContext& pass) {
    executable_.run(pass, head.first, head.last);
  });
}

// Sizes that run cut are recorded when they first do: most never are.
void Step::run_graph(const StepShape& shape) {
  const auto index = static_cast<size_t>(shape.graph);
  if (!shape.cut) {
    device_.launch(*full_.at(index).of(shape.cut_token));
    return;
  }
  if (cut_.size() <= index) cut_.resize(index + 1);
  std::unique_ptr<Graph>& graph = cut_[index].of(shape.cut_token);
  if (graph == nullptr) graph = capture_step(shape.sizes, shape.cut_token, /*with_draw=*/false);
  device_.launch(*graph);
}

void Step::run(const StepShape& shape, const Scoring& scoring) {
  if (shape.mode == StepMode::kFull) {
    run_graph(shape);
    return;
  }
  const StepContext ctx = context_for(shape);
  run_front(ctx, shape.cut_token);
  if (shape.sizes.num_requests > 0) {
    const bool in_halves = shape.cut_token > 0;
    if (in_halves) halves_->run(ctx, shape.cut_token);
    size_t next = 0;
    for (const Piece& piece : pieces_) {
      if (in_halves && !piece.head) continue;
      if (piece.head && !scoring.tokens.empty()) {
        // Halves end with copies, which its first launch must not overlap with.
        StepContext apart = ctx;
        apart.overlap_launches &= !in_halves;
        score(scoring, apart, piece);
      }
      if (shape.mode == StepMode::kPiecewise && piece.captured) {
        device_.launch(*piecewise_.at(static_cast<size_t>(shape.graph)).at(next++));
      } else if (in_halves) {
        executable_.run_apart(ctx, piece.first, piece.last);
      } else {
        executable_.run(ctx, piece.first, piece.last);
      }
    }
  }
  if (!shape.cut) run_back(ctx);
}

void Step::run_and_fail(const StepShape& shape, std::string_view message) const {
  const StepContext ctx = context_for(shape);
  run_front(ctx, shape.cut_token);
  run_program(ctx, shape.cut_token);
  fail(ErrorKind::kInternal, "step", message);
}

}  // namespace mrv1
