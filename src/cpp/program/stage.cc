// Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
#include "program/stage.h"

#include <algorithm>
#include <limits>

#include "core/error.h"

namespace mrv1 {
namespace {

constexpr std::string_view kWhere = "stage";

// The layer that each op goes with: what stands before the first goes with that, what stands behind
// a layer with the one before it.
std::vector<int32_t> layers_of(const std::vector<Op>& ops) {
  std::vector<int32_t> layers;
  int32_t layer = 0;
  for (const Op& op : ops) {
    check(op.layer < 0 || op.layer >= layer, kWhere,
          "layers must follow each other in the list: ", op_name(op), " of layer ", op.layer,
          " stands behind layer ", layer);
    layer = std::max(layer, op.layer);
    layers.push_back(layer);
  }
  return layers;
}

bool is_fused(OpKind kind) {
  return kind == OpKind::kAddRmsNorm || kind == OpKind::kQkvPrepare ||
         kind == OpKind::kLinearGatedMul || kind == OpKind::kRouter;
}

bool holds(const std::vector<int32_t>& ids, int32_t id) {
  return std::find(ids.begin(), ids.end(), id) != ids.end();
}

// Numbers anew what is used of a list, in the order of its first use.
class Renumbering {
 public:
  explicit Renumbering(size_t count) : numbers_(count, -1) {}

  int32_t of(int32_t id) {
    if (numbers_[id] < 0) {
      numbers_[id] = static_cast<int32_t>(used_.size());
      used_.push_back(id);
    }
    return numbers_[id];
  }
  void renumber(std::vector<int32_t>& ids) {
    for (int32_t& id : ids) id = of(id);
  }
  // The old numbers of what is used, by the new ones.
  const std::vector<int32_t>& used() const { return used_; }
  template <typename T>
  std::vector<T> pick(const std::vector<T>& from) const {
    std::vector<T> picked;
    for (const int32_t id : used_) picked.push_back(from[id]);
    return picked;
  }

 private:
  std::vector<int32_t> numbers_, used_;
};

}  // namespace

// A value keeps its name across a boundary whatever else crosses: the newest, which the layer
// before it leaves behind, is the hidden state, the others are named by what writes them.
CrossingValues Program::crossing(std::span<const int32_t> layers, int32_t boundary) const {
  CrossingValues found;
  if (boundary <= 0 || boundary >= num_layers()) return found;
  std::vector<bool> is_written(values_.size());
  std::vector<std::string> names(values_.size());
  for (const int32_t id : inputs_) {
    is_written[id] = true;
    names[id] = values_[id].name;
  }
  size_t i = 0;
  for (; i < ops_.size() && layers[i] < boundary; ++i) {
    for (const int32_t id : ops_[i].outputs) {
      is_written[id] = true;
      names[id] = concat(op_name(ops_[i]), ".", id);
    }
  }
  for (; i < ops_.size(); ++i) {
    for (const int32_t id : ops_[i].inputs) {
      if (is_written[id] && !holds(found.ids, id)) found.ids.push_back(id);
    }
  }
  std::sort(found.ids.begin(), found.ids.end());
  check(found.ids.size() <= kMaxStageValues, kWhere, "layer ", boundary,
        " cannot begin a stage: it and those behind it read ", found.ids.size(),
        " values from before it, at most ", kMaxStageValues, " can cross");
  for (const int32_t id : found.ids) {
    const Value& value = values_[id];
    check(value.space == RowSpace::kTokens, kWhere, "layer ", boundary,
          " cannot begin a stage: ", names[id], " has a row for each that is sampled");
    const bool is_newest = id == found.ids.back() && !holds(inputs_, id);
    found.schema.push_back({is_newest ? "hidden" : names[id], value.cols, value.dtype});
  }
  return found;
}

Program Program::stage(int32_t first, int32_t last) const {
  const int32_t end = num_layers();
  check(first >= 0 && first < last && last <= end, kWhere, "layers [", first, ", ", last,
        ") are none of a model of ", end);
  check(!stage_layout_, kWhere, "the program is a stage already");
  const std::vector<int32_t> layers = layers_of(ops_);
  Program part(dtype_);
  Renumbering values(values_.size()), weights(weights_.size()), ropes(ropes_.size()),
      kv_layers(kv_layers_.size());
  const auto take = [&](const CrossingValues& whole) {
    CrossingValues own = whole;
    values.renumber(own.ids);
    return own;
  };
  part.received_ = take(crossing(layers, first));
  if (!part.received_.ids.empty()) {
    part.ops_.push_back({.kind = OpKind::kStageReceive, .outputs = part.received_.ids});
  }
  std::vector<bool> is_written(values_.size());
  for (size_t i = 0; i < ops_.size(); ++i) {
    check(!is_fused(ops_[i].kind), kWhere, "the program is fused already: ", op_name(ops_[i]));
    if (layers[i] < first || layers[i] >= last) continue;
    Op& op = part.ops_.emplace_back(ops_[i]);
    for (const int32_t id : op.outputs) is_written[id] = true;
    values.renumber(op.inputs);
    values.renumber(op.outputs);
    weights.renumber(op.weights);
    if (op.rope >= 0) op.rope = ropes.of(op.rope);
    if (op.kv_layer >= 0) op.kv_layer = kv_layers.of(op.kv_layer);
  }
  part.sent_ = take(crossing(layers, last));
  if (!part.sent_.ids.empty()) {
    part.ops_.push_back({.kind = OpKind::kStageSend, .inputs = part.sent_.ids});
  }
  if (first == 0) {
    part.inputs_ = inputs_;
    values.renumber(part.inputs_);
  }
  for (const int32_t id : outputs_) {
    if (is_written[id] || (first == 0 && holds(inputs_, id))) {
      part.outputs_.push_back(values.of(id));
    }
  }
  if (logits_ >= 0 && is_written[logits_]) {
    part.logits_ = values.of(logits_);
    part.hidden_ = values.of(hidden_);
  }
  part.vocab_size_ = vocab_size_;
  part.values_ = values.pick(values_);
  for (size_t i = 0; i < part.received_.ids.size(); ++i) {
    part.values_[part.received_.ids[i]].name = part.received_.schema[i].name;
  }
  part.weights_ = weights.pick(weights_);
  part.ropes_ = ropes.pick(ropes_);
  part.kv_layers_ = kv_layers.pick(kv_layers_);
  part.kv_windows_ = kv_layers.pick(kv_windows_);
  part.stage_layout_ = part_of(kv_layout(), kv_layers.used());
  part.place_release();
  return part;
}

// The stage before may write the next step's values once this op has run, so it stands behind all
// ops that read this step's. The output head may run several times in a step, so it is not in its
// midst.
void Program::place_release() {
  if (received_.ids.empty()) return;
  std::erase_if(ops_, [](const Op& op) { return op.kind == OpKind::kStageRelease; });
  size_t last = 0;
  for (size_t i = 0; i < ops_.size(); ++i) {
    for (const int32_t id : ops_[i].inputs) {
      if (holds(received_.ids, id)) last = i;
    }
  }
  const std::vector<int32_t>& outputs = ops_[last].outputs;
  if (!outputs.empty() && values_[outputs.back()].space == RowSpace::kLogits) {
    last = ops_.size() - 1;
  }
  ops_.insert(ops_.begin() + static_cast<std::ptrdiff_t>(last) + 1,
              Op{.kind = OpKind::kStageRelease, .layer = ops_[last].layer});
}

std::vector<int64_t> layer_costs(const Program& program) {
  std::vector<int64_t> costs(static_cast<size_t>(program.num_layers()));
  const std::vector<int32_t> layers = layers_of(program.ops());
  for (size_t i = 0; i < program.ops().size(); ++i) {
    const Op& op = program.ops()[i];
    if (op.kind == OpKind::kEmbedding) continue;
    for (const int32_t id : op.weights) {
      costs[layers[i]] += weight_bytes(program.weights()[id], program.dtype());
    }
  }
  return costs;
}

std::vector<int32_t> balance_layers(std::span<const int64_t> costs, int32_t num_stages) {
  const auto layers = static_cast<int32_t>(costs.size());
  check(num_stages >= 1 && num_stages <= layers, kWhere, "a model of ", layers,
        " layers cannot have ", num_stages, " stages: each holds a layer or more");
  std::vector<int64_t> until(costs.size() + 1);  // cost of the layers below
  for (size_t i = 0; i < costs.size(); ++i) until[i + 1] = until[i] + costs[i];
  constexpr int64_t kNever = std::numeric_limits<int64_t>::max();
  // By layer that a stage begins with: the least that the costliest of the last stages can cost.
  std::vector<int64_t> least(costs.size() + 1, kNever);
  least.back() = 0;
  for (int32_t stage = 0; stage < num_stages; ++stage) {
    std::vector<int64_t> before(costs.size() + 1, kNever);
    for (int32_t first = 0; first < layers; ++first) {
      for (int32_t next = first + 1; next <= layers; ++next) {
        if (least[next] == kNever) continue;
        before[first] = std::min(before[first], std::max(until[next] - until[first], least[next]));
      }
    }
    least = std::move(before);
  }
  // The same with the sum of squares of stages that cost no more than that.
  const int64_t limit = least[0];
  struct Choice {
    double squares = std::numeric_limits<double>::infinity();
    std::vector<int32_t> counts = {};
  };
  std::vector<Choice> best(costs.size() + 1);
  best.back().squares = 0;
  for (int32_t stage = 0; stage < num_stages; ++stage) {
    std::vector<Choice> before(costs.size() + 1);
    for (int32_t first = 0; first < layers; ++first) {
      for (int32_t next = layers; next > first; --next) {
        const int64_t cost = until[next] - until[first];
        const double squares =
            static_cast<double>(cost) * static_cast<double>(cost) + best[next].squares;
        if (cost > limit || !(squares < before[first].squares)) continue;
        before[first] = {squares, {next - first}};
        before[first].counts.insert(before[first].counts.end(), best[next].counts.begin(),
                                    best[next].counts.end());
      }
    }
    best = std::move(before);
  }
  return best[0].counts;
}

}  // namespace mrv1
