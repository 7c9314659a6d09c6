// Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
#include "runner/two_batch.h"

#include <algorithm>

#include "core/error.h"

namespace mrv1 {
namespace {

constexpr std::string_view kWhere = "two-batch overlap";

int32_t round_up(int32_t value, int32_t unit) { return (value + unit - 1) / unit * unit; }

// Ops before the first that works on logits rows.
size_t num_token_ops(const Program& program) {
  const auto works_on_logits = [&](const Op& op) {
    return !op.outputs.empty() && program.values()[op.outputs.back()].space == RowSpace::kLogits;
  };
  const std::vector<Op>& ops = program.ops();
  return std::find_if(ops.begin(), ops.end(), works_on_logits) - ops.begin();
}

// Halves have no logits rows, so the ops of the head, which they do not run, get one.
PlanLimits half_limits(PlanLimits limits, const RunnerConfig& config) {
  limits.max_tokens = TwoBatch::max_tokens(config);
  limits.max_logits = 1;
  return limits;
}

// row, query_start_loc and seq_lens, and the counts.
int64_t half_ints(const RunnerConfig& config) {
  return 3 * int64_t{config.max_num_seqs} + 1 + static_cast<int64_t>(sizeof(InferCounts) / 4);
}

}  // namespace

bool runs_in_halves(const TwoBatchConfig& config, std::span<const StepLoad> ranks) {
  if (config.mode == TwoBatchMode::kOff) return false;
  StepLoad most;
  for (const StepLoad& load : ranks) {
    most.tokens = std::max(most.tokens, load.tokens);
    most.has_prompts |= load.has_prompts;
  }
  if (most.tokens < 2) return false;  // each half has a token
  if (config.mode == TwoBatchMode::kOn) return true;
  return most.tokens >= (most.has_prompts ? config.min_prefill_tokens : config.min_decode_tokens);
}

bool TwoBatch::applies(const Program& program, const RunnerConfig& config) {
  // The largest step decides whether there is ever one.
  const StepLoad decode{config.max_num_batched_tokens, /*has_prompts=*/false};
  const StepLoad prompts{config.max_num_batched_tokens, /*has_prompts=*/true};
  if (!runs_in_halves(config.two_batch, {&decode, 1}) &&
      !runs_in_halves(config.two_batch, {&prompts, 1})) {
    return false;
  }
  // What stages pass on is that of whole steps.
  if (config.num_stages > 1) return false;
  const std::vector<Op>& ops = program.ops();
  return std::any_of(ops.begin(), ops.begin() + num_token_ops(program),
                     [](const Op& op) { return is_collective(op.kind); });
}

int32_t TwoBatch::max_tokens(const RunnerConfig& config) {
  return round_up((config.max_num_batched_tokens + 1) / 2, 1 + config.num_speculative_tokens);
}

int64_t TwoBatch::bytes(const Program& program, const RunnerConfig& config,
                        const PlanLimits& limits, Device& device) {
  if (!applies(program, config)) return 0;
  const PlanLimits half = half_limits(limits, config);
  return 2 * (Executable::bytes(program, half, device, /*max_position=*/0) + half_ints(config) * 4);
}

TwoBatch::TwoBatch(const Program& program, const Executable& whole, const RunnerConfig& config,
                   const PlanLimits& limits, Device& device, std::span<const WeightView> weights,
                   std::span<const KvCacheLayer> kv)
    : program_(program),
      whole_(whole),
      device_(device),
      max_tokens_(max_tokens(config)),
      places_(1 + config.num_speculative_tokens),
      collective_blocks_(config.two_batch.collective_blocks),
      num_ops_(num_token_ops(program)) {
  for (Half& half : halves_) {
    half.executable = std::make_unique<Executable>(program, half_limits(limits, config), device,
                                                   weights, kv, config.max_model_len, &whole);
    half.ints = device.allocate(static_cast<size_t>(half_ints(config)) * 4, "infer params");
    auto* ints = static_cast<int32_t*>(half.ints.data());
    InferParams& infer = half.infer;
    infer.row = ints;
    infer.seq_lens = infer.row + config.max_num_seqs;
    infer.query_start_loc = infer.seq_lens + config.max_num_seqs;
    infer.counts = reinterpret_cast<InferCounts*>(infer.query_start_loc + config.max_num_seqs + 1);
    half.computed = device.make_mark();
    half.met = device.make_mark();
  }
  device.side_stream();  // not made in a step
  const std::vector<Op>& ops = program.ops();
  size_t first = 0;
  for (size_t i = 0; i < num_ops_; ++i) {
    if (!is_collective(ops[i].kind)) continue;
    pieces_.push_back({first, i, true});
    first = i + 1;
  }
  pieces_.push_back({first, num_ops_, false});
  // What halves have written and is read where whole steps have it.
  const auto is_half = [&](int32_t id) {
    return std::any_of(ops.begin(), ops.begin() + num_ops_, [&](const Op& op) {
      return std::find(op.outputs.begin(), op.outputs.end(), id) != op.outputs.end();
    });
  };
  const auto add = [&](int32_t id) {
    if (is_half(id) && std::find(joined_.begin(), joined_.end(), id) == joined_.end()) {
      joined_.push_back(id);
    }
  };
  for (size_t i = num_ops_; i < ops.size(); ++i) {
    for (const int32_t id : ops[i].inputs) add(id);
  }
  for (const int32_t id : program.outputs()) add(id);
}

int32_t TwoBatch::cut_of(int32_t tokens, int32_t padded, bool speculates) const {
  check_internal(padded >= 2 && padded <= 2 * max_tokens_, kWhere, "no halves of ", padded,
                 " tokens");
  // Padding stands at the end. Where there is so much of it that the second half had no room for
  // it all, the cut moves up.
  const int32_t middle = std::max((std::max(tokens, 2) + 1) / 2, padded - max_tokens_);
  const int32_t between = round_up(middle, speculates ? places_ : 1);
  return between < padded && between <= max_tokens_ ? between : middle;
}

std::array<StepContext, 2> TwoBatch::contexts(const StepContext& ctx, int32_t cut) const {
  std::array<StepContext, 2> contexts{ctx, ctx};
  for (int i = 0; i < 2; ++i) {
    StepContext& half = contexts[i];
    const int32_t first = i == 0 ? 0 : cut;
    half.sizes.num_tokens = i == 0 ? cut : ctx.sizes.num_tokens - cut;
    half.sizes.num_logits = 0;
    half.expert_set = 1 + i;
    half.collective_blocks = collective_blocks_;
    half.infer = halves_[i].infer;
    half.infer.token_batch = ctx.infer.token_batch + first;
    half.infer.token_ids = ctx.infer.token_ids + first;
    half.infer.positions = ctx.infer.positions + first;
    half.infer.slot_mapping = ctx.infer.slot_mapping + first;
    half.infer.max_requests = ctx.infer.max_requests;
    half.infer.max_tokens = ctx.infer.max_tokens;  // between the groups of slot_mapping
  }
  check_internal(cut > 0 && contexts[1].sizes.num_tokens > 0 &&
                     std::max(cut, contexts[1].sizes.num_tokens) <= max_tokens_,
                 kWhere, "a step of ", ctx.sizes.num_tokens, " tokens cannot be cut at ", cut,
                 ": halves have room for ", max_tokens_);
  return contexts;
}

void TwoBatch::plan(const StepContext& ctx, int32_t cut) const {
  const std::array<StepContext, 2> halves = contexts(ctx, cut);
  device_.kernels().split_params({halves[0].infer, halves[1].infer, cut}, ctx);
  for (int i = 0; i < 2; ++i) halves_[i].executable->plan_attention(halves[i]);
}

void TwoBatch::run(const StepContext& ctx, int32_t cut) const {
  const std::array<StepContext, 2> computing = contexts(ctx, cut);
  std::array<StepContext, 2> meeting = computing;
  for (StepContext& half : meeting) {
    half.stream = device_.side_stream();
    half.workspace = nullptr;  // the other half uses it meanwhile
    half.workspace_bytes = 0;
  }
  for (size_t p = 0; p < pieces_.size(); ++p) {
    const Piece& piece = pieces_[p];
    for (int i = 0; i < 2; ++i) {
      const Half& half = halves_[i];
      if (p > 0) half.met->wait(ctx.stream);
      half.executable->run_apart(computing[i], piece.first, piece.collective);
      if (!piece.meets) continue;
      half.computed->record(ctx.stream);
      half.computed->wait(meeting[i].stream);
      half.executable->run_apart(meeting[i], piece.collective, piece.collective + 1);
      half.met->record(meeting[i].stream);
    }
  }
  join(ctx, cut);
}

void TwoBatch::join(const StepContext& ctx, int32_t cut) const {
  for (const int32_t id : joined_) {
    const Value& value = program_.values()[id];
    const size_t row = static_cast<size_t>(value.cols) * dtype_size(value.dtype);
    auto* to = static_cast<char*>(whole_.value(id));
    const size_t rest = static_cast<size_t>(ctx.sizes.num_tokens - cut);
    device_.copy_within(to, halves_[0].executable->value(id), cut * row);
    device_.copy_within(to + cut * row, halves_[1].executable->value(id), rest * row);
  }
}

}  // namespace mrv1
