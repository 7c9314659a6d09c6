// Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
#pragma once

#include "ops/activation.h"
#include "ops/weight_view.h"
#include "state/step_context.h"

namespace mrv1 {

// out = x weight^T (+ bias): [rows, weight.cols] x [weight.rows, weight.cols] -> [rows,
// weight.rows]. Products are summed in float32; the order over columns is the same for every number
// of rows, so that a row's result does not depend on what else is in the batch. With an
// activation the weight stacks gate over up and out = activation(gate) * up: [rows, weight.rows /
// 2]; gate and up are rounded to dtype first, so that the fused form equals its parts bit for bit.
//
// Of an NVFP4 weight the sums over columns are of x * code * block scale, whose last two are
// multiplied exactly; the sum is multiplied by the row's scale in float32 before the bias is added.
//
// The output of a row-parallel linear is a sum over ranks, which hold some of the columns each. In
// a batch-invariant step it has the same bits whatever their number: all columns are
// kInvariantParts parts, each is summed by itself, and the parts are added in the order of
// sum_in_order; of NVFP4 after each was multiplied by the row's scale.
struct LinearParams {
  const void* x;          // [rows, weight.cols] of dtype
  WeightView weight;      // of `dtype`, in Kernels::linear_layout; or NVFP4, in fp4_layout
  const float* bias;      // [weight.rows] or null
  void* out;              // of out_dtype
  DType dtype;            // float32 or bfloat16
  DType out_dtype;        // dtype, or float32
  Activation activation;  // but kNone: weight.rows / 2 must be a multiple of 16
  bool logits_rows;       // rows are the step's logits rows instead of its tokens
  bool row_parallel;      // not with an activation
  // Of the weight that ranks share out by rows, else 0: in a batch-invariant step it says in which
  // order columns are summed, as the rows of one rank would for that rank alone.
  int64_t whole_rows = 0;

  bool gated() const { return activation != Activation::kNone; }
  int64_t out_cols() const { return gated() ? weight.rows / 2 : weight.rows; }
};

// Parts of all columns, over all ranks.
constexpr int kInvariantParts = 8;
// Parts of the columns of this rank's weight that are summed apart; 1 for all linears that are not
// row-parallel, and for a single rank whose columns do not divide into parts of whole pairs.
int num_invariant_parts(const LinearParams& params, const StepContext& ctx);
// Columns that a part has a multiple of: pairs, of NVFP4 blocks.
constexpr int64_t part_unit(DType dtype) { return dtype == DType::kE2M1 ? kFp4Block : 2; }
// Whether a rank's columns divide as they must where there are several ranks.
constexpr bool has_invariant_parts(int64_t cols, int ranks, DType dtype) {
  return kInvariantParts % ranks == 0 && cols % (part_unit(dtype) * kInvariantParts / ranks) == 0;
}

void linear_cpu(const LinearParams& params, const StepContext& ctx);
void linear_cuda(const LinearParams& params, const StepContext& ctx);

// Writes rows [row_start, row_start + num_rows) of a kPanel16 weight, of any of its matrices, from
// row-major source rows of float32, bfloat16 or float16. row_start is a multiple of 16, or the rows
// before it in the same panel have been written. Padding must have been zeroed by the allocator.
void pack_panels(const WeightView& weight, void* data, const void* source, DType source_dtype,
                 int64_t row_start, int64_t num_rows, ThreadPool& pool);

// The same for bytes: the codes [rows, cols / 2] or the block scales [rows, cols / 16] of an NVFP4
// weight, whose matrices have `matrix_rows` rows each. `panels` is where the first of them begins,
// `width` the bytes of a row.
void pack_byte_panels(void* panels, int64_t width, int64_t matrix_rows, const void* source,
                      int64_t row_start, int64_t num_rows, ThreadPool& pool);

}  // namespace mrv1
