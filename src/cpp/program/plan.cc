// Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
#include "program/plan.h"

#include <algorithm>
#include <limits>
#include <map>
#include <span>
#include <utility>

#include "core/error.h"

namespace mrv1 {
namespace {

// Ops whose kernels allow out to be an input. Rows are read whole before they are written.
bool works_in_place(OpKind kind) {
  switch (kind) {
    case OpKind::kRmsNorm:
    case OpKind::kAdd:
    case OpKind::kQkNorm:
    case OpKind::kRope:
    case OpKind::kQkvPrepare:
    case OpKind::kAddRmsNorm:
    case OpKind::kSoftCap:
    case OpKind::kAllReduce:
      return true;
    default:
      return false;
  }
}

// Outputs that other ranks write.
std::span<const int32_t> sent_by_ranks(const Op& op) {
  const std::span<const int32_t> outputs(op.outputs);
  if (op.kind == OpKind::kMoeDispatch) return outputs.subspan(1);
  if (op.kind == OpKind::kMoeCombine) return outputs.first(1);
  return {};
}

// Best-fit allocation over [0, inf): free ranges by offset, the tail implicit.
class ArenaPlanner {
 public:
  int64_t allocate(int64_t bytes) {
    auto best = free_.end();
    for (auto it = free_.begin(); it != free_.end(); ++it) {
      if (it->second >= bytes && (best == free_.end() || it->second < best->second)) best = it;
    }
    if (best != free_.end()) {
      const auto [offset, size] = *best;
      free_.erase(best);
      if (size > bytes) free_[offset + bytes] = size - bytes;
      return offset;
    }
    int64_t offset = end_;
    // A free range that touches the end is grown instead of left behind.
    if (!free_.empty() && free_.rbegin()->first + free_.rbegin()->second == end_) {
      offset = free_.rbegin()->first;
      free_.erase(offset);
    }
    end_ = offset + bytes;
    high_water_ = std::max(high_water_, end_);
    return offset;
  }

  void release(int64_t offset, int64_t bytes) {
    auto [it, inserted] = free_.emplace(offset, bytes);
    check_internal(inserted, "plan", "double release at ", offset);
    auto next = std::next(it);
    if (next != free_.end() && it->first + it->second == next->first) {
      it->second += next->second;
      free_.erase(next);
    }
    if (it != free_.begin()) {
      auto previous = std::prev(it);
      if (previous->first + previous->second == it->first) {
        previous->second += it->second;
        free_.erase(it);
      }
    }
  }

  int64_t high_water() const { return high_water_; }

 private:
  std::map<int64_t, int64_t> free_;
  int64_t end_ = 0;
  int64_t high_water_ = 0;
};

}  // namespace

int64_t space_rows(RowSpace space, const PlanLimits& limits) {
  switch (space) {
    case RowSpace::kTokens:
      return limits.max_tokens;
    case RowSpace::kLogits:
      return limits.max_logits;
    case RowSpace::kReceived:
      return limits.ranks * limits.max_tokens;
    case RowSpace::kRanks:
      return limits.ranks;
  }
  fail(ErrorKind::kInternal, "plan", "there is no such row space");
}

int64_t value_bytes(const Value& value, const PlanLimits& limits) {
  const int64_t rows = space_rows(value.space, limits);
  const int64_t row_bytes = value.cols * static_cast<int64_t>(dtype_size(value.dtype));
  check(rows <= kMaxTensorBytes / row_bytes, "plan", "a value of ", rows, " rows and ", value.cols,
        " columns is too large: at most 2^48 bytes are allowed");
  const int64_t bytes = rows * row_bytes;
  return (bytes + kArenaAlignment - 1) / kArenaAlignment * kArenaAlignment;
}

Plan plan_buffers(const Program& program, const PlanLimits& limits) {
  check(limits.max_tokens > 0 && limits.max_logits > 0, "plan", "limits must be positive");
  const auto& ops = program.ops();
  const auto& values = program.values();
  constexpr int32_t kForever = std::numeric_limits<int32_t>::max();

  std::vector<int32_t> last_use(values.size(), -1);
  for (int32_t i = 0; i < static_cast<int32_t>(ops.size()); ++i) {
    for (int32_t id : ops[i].inputs) last_use[id] = i;
    for (int32_t id : ops[i].outputs) last_use[id] = std::max(last_use[id], i);
  }
  // Others write these, a caller or the stage before.
  std::vector<int32_t> given = program.inputs();
  given.insert(given.end(), program.received().ids.begin(), program.received().ids.end());
  for (int32_t id : given) last_use[id] = kForever;
  for (int32_t id : program.outputs()) last_use[id] = kForever;

  Plan plan;
  plan.offsets.assign(values.size(), -1);
  ArenaPlanner arena;
  for (int32_t id : given) {
    plan.offsets[id] = arena.allocate(value_bytes(values[id], limits));
  }
  // A value of the first layer for each kind of what ranks send.
  std::map<std::pair<OpKind, size_t>, int32_t> first_sent;
  for (const Op& op : ops) {
    const std::span<const int32_t> sent = sent_by_ranks(op);
    for (size_t i = 0; i < sent.size(); ++i) {
      const auto [first, is_new] = first_sent.try_emplace({op.kind, i}, sent[i]);
      const int64_t bytes = value_bytes(values[sent[i]], limits);
      if (is_new) plan.offsets[sent[i]] = arena.allocate(bytes);
      const Value& shape = values[first->second];
      check(shape.cols == values[sent[i]].cols && shape.dtype == values[sent[i]].dtype, "plan",
            "layers differ in what their experts are sent: ", shape.cols, " and ",
            values[sent[i]].cols, " columns");
      plan.offsets[sent[i]] = plan.offsets[first->second];
      last_use[sent[i]] = kForever;
    }
  }
  for (int32_t i = 0; i < static_cast<int32_t>(ops.size()); ++i) {
    const Op& op = ops[i];
    std::vector<int32_t> dying;
    for (int32_t id : op.inputs) {
      if (last_use[id] == i && std::find(dying.begin(), dying.end(), id) == dying.end()) {
        dying.push_back(id);
      }
    }
    for (int32_t id : op.outputs) {
      if (plan.offsets[id] >= 0) continue;  // others write it
      const int64_t bytes = value_bytes(values[id], limits);
      auto reuse = dying.end();
      if (works_in_place(op.kind)) {
        reuse = std::find_if(dying.begin(), dying.end(), [&](int32_t input) {
          return value_bytes(values[input], limits) == bytes;
        });
      }
      if (reuse != dying.end()) {
        plan.offsets[id] = plan.offsets[*reuse];
        dying.erase(reuse);
      } else {
        plan.offsets[id] = arena.allocate(bytes);
      }
    }
    for (int32_t id : dying) {
      arena.release(plan.offsets[id], value_bytes(values[id], limits));
    }
    for (int32_t id : op.outputs) {
      if (last_use[id] == i) arena.release(plan.offsets[id], value_bytes(values[id], limits));
    }
  }
  plan.arena_bytes = arena.high_water();
  return plan;
}

}  // namespace mrv1
