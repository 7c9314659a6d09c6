// Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
// The fusion pass: a table of patterns, each a chain of ops in which every op reads the first
// output of the one before, and a function that writes the op that replaces the chain.
#include <algorithm>
#include <array>
#include <span>

#include "core/error.h"
#include "ops/weight_view.h"
#include "program/program.h"

namespace mrv1 {
namespace {

using Chain = std::span<const Op* const>;

struct Pattern {
  std::string_view name;
  std::vector<OpKind> chain;
  // True if ops after the chain may still read the first op's output: the fused op writes it too.
  bool keeps_first_output;
  bool (*accepts)(Chain chain, const Program& program);
  Op (*fuse)(Chain chain);
};

bool always(Chain, const Program&) { return true; }

Op fuse_add_norm(Chain chain) {
  Op op = *chain[1];
  op.kind = OpKind::kAddRmsNorm;
  op.inputs = chain[0]->inputs;
  op.outputs = {chain[0]->outputs[0], chain[1]->outputs[0]};
  return op;
}

bool norm_reads_tokens(Chain chain, const Program& program) {
  return program.values()[chain[1]->outputs[0]].space == RowSpace::kTokens;
}

// The cache write is the last of the chain but has no output; the value that attention reads is the
// rope's.
Op fuse_qkv_prepare(Chain chain) {
  Op op = *chain.front();
  const Op& rope = *chain[chain.size() - 2];
  op.kind = OpKind::kQkvPrepare;
  op.outputs = rope.outputs;
  op.rope = rope.rope;
  op.kv_layer = chain.back()->kv_layer;
  return op;
}

Op fuse_linear_gate(Chain chain) {
  Op op = *chain[0];
  op.kind = OpKind::kLinearGatedMul;
  op.activation = chain[1]->activation;
  op.outputs = chain[1]->outputs;
  return op;
}

// The kernel pairs whole panels of gate and up rows, and has no bias.
bool gate_up_aligned(Chain chain, const Program& program) {
  const Op& linear = *chain[0];
  return linear.weights.size() == 1 &&
         program.weights()[linear.weights[0]].rows / 2 % kPanelRows == 0;
}

Op fuse_router(Chain chain) {
  Op op = *chain[1];
  op.kind = OpKind::kRouter;
  op.inputs = chain[0]->inputs;
  op.weights.insert(op.weights.begin(), chain[0]->weights[0]);
  op.outputs.insert(op.outputs.begin(), chain[0]->outputs[0]);
  return op;
}

// Of all columns, on this rank alone, without a bias.
bool is_whole_router(Chain chain, const Program&) {
  return chain[0]->weights.size() == 1 && !chain[0]->row_parallel;
}

// Longer chains first: they contain the shorter ones.
const std::array<Pattern, 5>& patterns() {
  static const std::array<Pattern, 5> table = {{
      {"qk_norm + rope + cache_write",
       {OpKind::kQkNorm, OpKind::kRope, OpKind::kCacheWrite},
       false,
       always,
       fuse_qkv_prepare},
      {"rope + cache_write", {OpKind::kRope, OpKind::kCacheWrite}, true, always, fuse_qkv_prepare},
      {"residual + rms_norm",
       {OpKind::kAdd, OpKind::kRmsNorm},
       true,
       norm_reads_tokens,
       fuse_add_norm},
      {"linear + gated_mul",
       {OpKind::kLinear, OpKind::kGatedMul},
       false,
       gate_up_aligned,
       fuse_linear_gate},
      {"linear + moe_route",
       {OpKind::kLinear, OpKind::kMoeRoute},
       true,
       is_whole_router,
       fuse_router},
  }};
  return table;
}

bool reads(const Op& op, int32_t value) {
  return std::find(op.inputs.begin(), op.inputs.end(), value) != op.inputs.end();
}

// Finds the chain that starts at op `first`; returns the op indices, or nothing.
std::vector<int32_t> match(const Program& program, const Pattern& pattern, int32_t first) {
  const std::vector<Op>& ops = program.ops();
  if (ops[first].kind != pattern.chain[0]) return {};
  std::vector<int32_t> found = {first};
  for (size_t step = 1; step < pattern.chain.size(); ++step) {
    // The chain value: the newest output on the path (a cache write has none).
    const int32_t chained = ops[found.back()].outputs.at(0);
    const bool last_link = step + 1 == pattern.chain.size();
    // A value that stays readable may have further readers, all after the chain.
    const bool kept = (step == 1 && pattern.keeps_first_output) ||
                      (last_link && pattern.chain.back() == OpKind::kCacheWrite);
    if (!kept && std::count(program.outputs().begin(), program.outputs().end(), chained) > 0) {
      return {};
    }
    int32_t next = -1;
    int readers = 0;
    for (int32_t i = found.back() + 1; i < static_cast<int32_t>(ops.size()); ++i) {
      if (!reads(ops[i], chained)) continue;
      ++readers;
      if (readers == 1 && ops[i].kind == pattern.chain[step]) next = i;
    }
    if (next < 0 || (!kept && readers != 1)) return {};
    found.push_back(next);
  }
  return found;
}

}  // namespace

std::vector<std::pair<std::string, int>> Program::fuse() {
  std::vector<std::pair<std::string, int>> counts;
  for (const Pattern& pattern : patterns()) {
    int count = 0;
    for (int32_t i = 0; i < static_cast<int32_t>(ops_.size()); ++i) {
      const std::vector<int32_t> found = match(*this, pattern, i);
      if (found.empty()) continue;
      std::vector<const Op*> chain;
      for (int32_t index : found) chain.push_back(&ops_[index]);
      if (!pattern.accepts(chain, *this)) continue;
      Op fused = pattern.fuse(chain);
      for (const Op* op : chain) {
        for (int32_t id : op->outputs) {
          values_[id].fused_away =
              std::find(fused.outputs.begin(), fused.outputs.end(), id) == fused.outputs.end();
        }
      }
      ops_[found.back()] = std::move(fused);
      for (size_t k = found.size() - 1; k-- > 0;) ops_.erase(ops_.begin() + found[k]);
      ++count;
      --i;
    }
    counts.emplace_back(pattern.name, count);
  }
  place_release();
  return counts;
}

}  // namespace mrv1
