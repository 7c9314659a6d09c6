// Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
// A pass sorts pairs of a row and one of its experts by expert and copies their rows of x in that
// order, so that each expert has a plain product: the panels of linear, once read for all its rows.
// A long batch takes several passes, which bounds the scratch.
#include <algorithm>
#include <cstring>

#include "core/error.h"
#include "core/thread_pool.h"
#include "ops/moe_experts.h"
#include "ops/moe_route.h"
#include "ops/panel_product_cpu.h"
#include "ops/workspace_cpu.h"

namespace mrv1 {
namespace {

constexpr std::string_view kOp = "moe_experts";
// Pairs of a row and an expert in a pass.
constexpr int64_t kPairsPerPass = 16384;
static_assert(kPairsPerPass >= kMaxExperts, "a row's experts are in one pass");
constexpr int64_t kElementsPerPiece = 8192;
// Columns of a row that are summed at a time, on the stack.
constexpr int64_t kSumCols = 1024;
constexpr int64_t kAlignment = 64;

constexpr int64_t aligned(int64_t bytes) {
  return (bytes + kAlignment - 1) / kAlignment * kAlignment;
}

// The scratch of a pass.
struct PassMemory {
  int32_t* expert_begin;  // [experts + 1] first place of each expert's pairs
  int64_t* item_begin;    // [experts + 1] first item of each expert's product
  int32_t* place;         // [pairs] where a pair's results lie, -1 for an expert elsewhere
  int32_t* row;           // [pairs] of x, by place
  char* wide;             // [pairs, hidden] of dtype: x, then what comes of down, by place
  char* inner;            // [pairs, intermediate] of dtype, by place
};

// Places the parts of the scratch from `base` on, unless it is null; returns how many bytes they
// take.
int64_t place_memory(PassMemory& memory, char* base, int64_t experts, int64_t pairs,
                     int64_t wide_bytes, int64_t inner_bytes) {
  int64_t used = 0;
  const auto take = [&](auto*& part, int64_t bytes) {
    using Part = std::remove_reference_t<decltype(part)>;
    if (base != nullptr) part = reinterpret_cast<Part>(base + used);
    used += aligned(bytes);
  };
  take(memory.expert_begin, (experts + 1) * 4);
  take(memory.item_begin, (experts + 1) * 8);
  take(memory.place, pairs * 4);
  take(memory.row, pairs * 4);
  take(memory.wide, pairs * wide_bytes);
  take(memory.inner, pairs * inner_bytes);
  return used;
}

void check_params(const MoeExpertsParams& params) {
  const WeightView& gate_up = params.gate_up;
  const WeightView& down = params.down;
  check(gate_up.matrices > 0 && gate_up.matrices <= kMaxExperts &&
            gate_up.matrices == down.matrices && gate_up.rows % gate_up.matrices == 0 &&
            down.rows % down.matrices == 0,
        kOp, "gate_up has ", gate_up.matrices, " matrices and down ", down.matrices,
        ", must be as many, from 1 to ", kMaxExperts);
  check(gate_up.cols == params.hidden() &&
            gate_up.rows == 2 * gate_up.matrices * params.intermediate(),
        kOp, "matrices of gate_up are [", gate_up.rows / gate_up.matrices, ", ", gate_up.cols,
        "], must be [", 2 * params.intermediate(), ", ", params.hidden(), "] for down's of [",
        params.hidden(), ", ", params.intermediate(), "]");
  check(params.first_expert >= 0 && params.first_expert + gate_up.matrices <= params.num_experts &&
            params.num_experts <= kMaxExperts,
        kOp, "experts [", params.first_expert, ", ", params.first_expert + gate_up.matrices,
        ") are not among ", params.num_experts, ", at most ", kMaxExperts);
  check(params.top_k > 0 && params.top_k <= kMaxExperts, kOp, "top_k is ", params.top_k,
        ", must be in [1, ", kMaxExperts, "]");
  check(params.activation != Activation::kNone, kOp, "there is no activation");
}

class Pass {
 public:
  Pass(const MoeExpertsParams& params, const StepContext& ctx)
      : params_(params),
        ops_(vector_ops(params.dtype, kOp)),
        pool_(*ctx.pool),
        size_(static_cast<int64_t>(dtype_size(params.dtype))),
        experts_(params.gate_up.matrices),
        rows_per_pass_(kPairsPerPass / params.top_k),
        rows_(params.num_rows(ctx)),
        groups_(params.sum_groups(ctx)) {
    const int64_t pairs = std::min(rows_, rows_per_pass_) * params.top_k;
    const int64_t used = place_memory(memory_, static_cast<char*>(ctx.workspace), experts_, pairs,
                                      params.hidden() * size_, params.intermediate() * size_);
    check_internal(used <= static_cast<int64_t>(ctx.workspace_bytes), kOp, "workspace of ",
                   ctx.workspace_bytes, " bytes, needs ", used);
  }

  void run_all() {
    for (int64_t row = 0; row < rows_; row += rows_per_pass_) {
      run(row, std::min(row + rows_per_pass_, rows_));
    }
  }

 private:
  void run(int64_t begin, int64_t end) {
    sort_pairs(begin, end);
    copy_rows();
    multiply(params_.gate_up, memory_.wide, memory_.inner, params_.activation);
    multiply(params_.down, memory_.inner, memory_.wide, Activation::kNone);
    add_up(begin, end);
  }

  bool is_live(int64_t row) const {
    return params_.regions == 0 ||
           row % params_.region_rows < params_.counts[row / params_.region_rows];
  }

  // Calls fn(pair, index of the expert here) for each pair of a row of [begin, end) with an expert
  // here; pairs are counted from the first row's on.
  template <typename Fn>
  void for_each_pair(int64_t begin, int64_t end, const Fn& fn) const {
    for (int64_t row = begin; row < end; ++row) {
      if (!is_live(row)) continue;
      for (int64_t j = 0; j < params_.top_k; ++j) {
        const int64_t index =
            int64_t{params_.experts[row * params_.top_k + j]} - params_.first_expert;
        if (index >= 0 && index < experts_) fn((row - begin) * params_.top_k + j, index);
      }
    }
  }

  void sort_pairs(int64_t begin, int64_t end) {
    int32_t* first = memory_.expert_begin;
    std::fill_n(first, experts_ + 1, 0);
    std::fill_n(memory_.place, (end - begin) * params_.top_k, -1);
    for_each_pair(begin, end, [&](int64_t, int64_t index) { ++first[index + 1]; });
    for (int64_t e = 0; e < experts_; ++e) first[e + 1] += first[e];
    pairs_ = first[experts_];
    // Counts each expert's places up from its first, which moves them to where the next one begins.
    for_each_pair(begin, end, [&](int64_t pair, int64_t index) {
      const int32_t place = first[index]++;
      memory_.place[pair] = place;
      memory_.row[place] = static_cast<int32_t>(begin + pair / params_.top_k);
    });
    for (int64_t e = experts_; e > 0; --e) first[e] = first[e - 1];
    first[0] = 0;
  }

  void copy_rows() {
    const int64_t row_bytes = params_.hidden() * size_;
    pool_.parallel_for(
        pairs_, kElementsPerPiece / params_.hidden(), [&](int64_t begin, int64_t end, int) {
          for (int64_t place = begin; place < end; ++place) {
            std::memcpy(memory_.wide + place * row_bytes,
                        static_cast<const char*>(params_.x) + memory_.row[place] * row_bytes,
                        static_cast<size_t>(row_bytes));
          }
        });
  }

  // The product of an expert's rows.
  PanelProduct product(const WeightView& weights, char* x, char* out, Activation activation,
                       int64_t expert) const {
    const int64_t first = memory_.expert_begin[expert];
    const int64_t weight_rows = weights.rows / weights.matrices;
    const int64_t out_cols = activation == Activation::kNone ? weight_rows : weight_rows / 2;
    return {{.x = x + first * weights.cols * size_,
             .weight = matrix(weights, expert),
             .bias = nullptr,
             .out = out + first * out_cols * size_,
             .rows = memory_.expert_begin[expert + 1] - first,
             .dtype = params_.dtype,
             .out_dtype = params_.dtype,
             .activation = activation},
            ops_,
            kOp};
  }

  void multiply(const WeightView& weights, char* x, char* out, Activation activation) {
    int64_t* items = memory_.item_begin;
    items[0] = 0;
    for (int64_t e = 0; e < experts_; ++e) {
      const bool is_used = memory_.expert_begin[e + 1] > memory_.expert_begin[e];
      items[e + 1] = items[e] + (is_used ? product(weights, x, out, activation, e).num_items() : 0);
    }
    const int64_t total = items[experts_];
    if (total == 0) return;
    // Any expert's tells what an item reads.
    const int64_t grain = product(weights, x, out, activation, 0).grain(total, pool_.num_threads());
    pool_.parallel_for(total, grain, [&](int64_t begin, int64_t end, int) {
      while (begin < end) {
        const int64_t expert = std::upper_bound(items, items + experts_ + 1, begin) - items - 1;
        const PanelProduct rows = product(weights, x, out, activation, expert);
        const int64_t last = std::min(end, items[expert + 1]);
        for (; begin < last; ++begin) rows.compute(begin - items[expert]);
      }
    });
  }

  // The weighted sums of rows [begin, end).
  void add_up(int64_t begin, int64_t end) {
    const int64_t hidden = params_.hidden();
    const TypedVectorOps& wide = vector_ops(DType::kF32, kOp);
    const auto store_row = vector_ops(params_.out_dtype, kOp).store_row;
    const auto out_size = static_cast<int64_t>(dtype_size(params_.out_dtype));
    const int64_t grain = kElementsPerPiece / (hidden * params_.top_k);
    pool_.parallel_for(end - begin, grain, [&](int64_t from, int64_t to, int) {
      for (int64_t row = begin + from; row < begin + to; ++row) {
        if (!is_live(row)) continue;
        const int32_t* places = memory_.place + (row - begin) * params_.top_k;
        const int32_t* experts = params_.experts + row * params_.top_k;
        const float* weights = params_.weights + row * params_.top_k;
        for (int64_t col = 0; col < hidden; col += kSumCols) {
          const int64_t cols = std::min(kSumCols, hidden - col);
          alignas(64) float sums[kInvariantParts][kSumCols];
          for (int group = 0; group < groups_; ++group) std::fill_n(sums[group], cols, 0.0f);
          for (int64_t j = 0; j < params_.top_k; ++j) {
            if (places[j] < 0) continue;
            ops_.add_scaled_row(memory_.wide + (places[j] * hidden + col) * size_, weights[j],
                                sums[params_.sum_group(experts[j], groups_)], cols);
          }
          for (int step = 1; step < groups_; step *= 2) {
            for (int group = 0; group < groups_; group += 2 * step) {
              wide.add_row(sums[group], sums[group + step], sums[group], cols);
            }
          }
          store_row(sums[0], nullptr,
                    static_cast<char*>(params_.out) + (row * hidden + col) * out_size, cols);
        }
      }
    });
  }

  const MoeExpertsParams& params_;
  const TypedVectorOps& ops_;
  ThreadPool& pool_;
  int64_t size_, experts_, rows_per_pass_, rows_;
  int groups_;
  int64_t pairs_ = 0;
  PassMemory memory_{};
};

}  // namespace

int64_t moe_experts_workspace_cpu(const WorkspaceLimits& limits) {
  if (limits.moe_rows == 0) return 0;
  PassMemory memory{};
  return place_memory(memory, nullptr, limits.moe_experts, std::min(limits.moe_rows, kPairsPerPass),
                      limits.moe_hidden * limits.moe_element_bytes,
                      limits.moe_intermediate * limits.moe_element_bytes);
}

void moe_experts_cpu(const MoeExpertsParams& params, const StepContext& ctx) {
  check_params(params);
  check(params.out_dtype == params.dtype || params.out_dtype == DType::kF32, kOp, "out dtype is ",
        dtype_name(params.out_dtype), ", must be float32 or ", dtype_name(params.dtype));
  if (params.num_rows(ctx) > 0) Pass(params, ctx).run_all();
}

}  // namespace mrv1
