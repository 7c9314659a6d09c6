// Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>
#include <string_view>

#include "ops/activation.h"
#include "ops/vector_ops.h"
#include "ops/weight_view.h"

namespace mrv1 {

// Rows times a kPanel16 weight, as LinearParams describes it, in items that threads take in any
// order: linear has one for all rows of a step, moe_experts one for the rows of each expert.
struct PanelProductParams {
  const void* x;      // [rows, weight.cols] of dtype
  WeightView weight;  // one matrix of dtype, or in NVFP4
  const float* bias;  // [weight.rows] or null
  void* out;          // [rows, weight.rows] of out_dtype; with an activation half as many columns
  int64_t rows;
  DType dtype, out_dtype;
  Activation activation;  // but kNone: the weight stacks gate over up
  int parts = 1;          // of the columns, a power of two, that are summed apart
};

class PanelProduct {
 public:
  // `ops` of dtype. kInvalidArgument naming `op` for a weight or dtypes that do not fit.
  PanelProduct(const PanelProductParams& params, const TypedVectorOps& ops, std::string_view op);

  int64_t num_items() const { return num_groups_ * row_items_; }
  // How many items a thread should take at a time of `total` items like these.
  int64_t grain(int64_t total, int num_threads) const;
  // Neighbouring items share their panels.
  void compute(int64_t item) const;

 private:
  // What computes the sums, and for how many rows at a time. The choice depends on the weight and
  // on the columns of a part alone, so that each output has one order of summation.
  struct SumKernel {
    void (*run)(const LinearBlock& block);
    int64_t block_rows;
  };
  static SumKernel sum_kernel(const TypedVectorOps& ops, DType dtype, int64_t part_cols);
  bool is_fp4() const { return params_.weight.dtype == DType::kE2M1; }
  // Sums of one part, of several neighbouring ones.
  void sum_part(const LinearBlock& block) const;
  void sum_fp4(const LinearBlock& block) const;
  void sum_parts(const LinearBlock& block, int parts) const;
  void compute(int64_t group, int64_t row_begin, int64_t row_end) const;

  PanelProductParams params_;
  const TypedVectorOps* ops_;
  void (*store_row_)(const float* acc, const float* bias, void* out, int64_t n);
  SumKernel kernel_;
  int64_t block_rows_;
  int64_t part_cols_, panel_bytes_, out_cols_, out_panels_;
  // A group of panels is computed together. With an activation it has gate and up of the same
  // outputs, and is counted in panels of gate.
  int group_panels_, group_outs_;
  int64_t num_groups_, row_items_;
};

}  // namespace mrv1
