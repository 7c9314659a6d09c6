// Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
#include "ops/linear.h"

#include <algorithm>

#include "core/error.h"
#include "core/thread_pool.h"
#include "dist/communicator.h"
#include "ops/cpu_isa.h"
#include "ops/vector_ops.h"

namespace mrv1 {
namespace {

// Rows whose float32 sums a thread holds at a time, on its stack.
constexpr int64_t kRowsPerBlock = 48;
constexpr int64_t kAmxRowsPerBlock = 64;  // two by two tiles, twice
constexpr int64_t kMaxRowsPerBlock = std::max(kRowsPerBlock, kAmxRowsPerBlock);
// Rows of one piece of work: its panels are read from cache for all but the first block.
constexpr int64_t kRowsPerItem = 192;
// With more rows than this, panels are read again and should stay in the second-level cache.
constexpr int64_t kStreamingRows = 12;
constexpr int64_t kCachedPanelBytes = 1 << 20;
// Bytes of weight a thread takes at a time: long enough for the prefetchers, short enough that
// threads finish together.
constexpr int64_t kBytesPerPiece = 1 << 18;
constexpr int64_t kPiecesPerThread = 4;

void check_params(const LinearParams& params) {
  constexpr std::string_view kOp = "linear";
  const WeightView& weight = params.weight;
  check(weight.layout == WeightLayout::kPanel16, kOp, "the weight must be in panels of 16 rows");
  check(weight.dtype == params.dtype, kOp, "weight dtype is ", dtype_name(weight.dtype),
        ", must be ", dtype_name(params.dtype));
  check(params.out_dtype == params.dtype || params.out_dtype == DType::kF32, kOp, "out dtype is ",
        dtype_name(params.out_dtype), ", must be float32 or ", dtype_name(params.dtype));
  check(weight.rows > 0 && weight.cols > 0, kOp, "weight is [", weight.rows, ", ", weight.cols,
        "], must not be empty");
  if (params.gated()) {
    check(weight.rows % (2 * kPanelRows) == 0, kOp, "weight has ", weight.rows,
          " rows, must be a multiple of ", 2 * kPanelRows, " with an activation");
    check(params.out_dtype == params.dtype, kOp, "out dtype is ", dtype_name(params.out_dtype),
          ", must be ", dtype_name(params.dtype), " with an activation");
    check(!params.row_parallel, kOp, "a row-parallel linear has no activation");
  }
}

// What computes the sums, and for how many rows at a time. The choice depends on the weight and on
// the columns of a part alone, so that each of its outputs has one order of summation.
struct SumKernel {
  void (*run)(const LinearBlock& block);
  int64_t block_rows;
};

SumKernel sum_kernel(const TypedVectorOps& ops, [[maybe_unused]] const WeightView& weight,
                     [[maybe_unused]] int64_t part_cols) {
#if defined(__x86_64__)
  if (current_cpu_isa() == CpuIsa::kAmxBf16 && weight.dtype == DType::kBF16 &&
      part_cols % amx::kAmxCols == 0) {
    return {amx::linear, kAmxRowsPerBlock};
  }
#endif
  return {ops.linear, kRowsPerBlock};
}

// Sums of `parts` neighbouring parts, a power of two, of block.cols columns each, from the block's
// on. A half of them is summed on the stack meanwhile.
void sum_parts(const SumKernel& kernel, const LinearBlock& block, int parts, int64_t x_bytes,
               int64_t panel_bytes) {
  if (parts == 1) return kernel.run(block);
  sum_parts(kernel, block, parts / 2, x_bytes, panel_bytes);
  alignas(64) float others[kMaxRowsPerBlock * kMaxPanels * kPanelRows];
  LinearBlock half = block;
  half.out = others;
  half.x = static_cast<const char*>(block.x) + parts / 2 * x_bytes;
  for (int p = 0; p < block.num_panels; ++p) {
    half.panels[p] = static_cast<const char*>(block.panels[p]) + parts / 2 * panel_bytes;
  }
  sum_parts(kernel, half, parts / 2, x_bytes, panel_bytes);
  for (int64_t row = 0; row < block.rows; ++row) {
    float* sums = block.out + row * block.out_stride;
    const float* more = others + row * block.out_stride;
    for (int64_t i = 0; i < block.num_panels * kPanelRows; ++i) sums[i] += more[i];
  }
}

}  // namespace

int num_invariant_parts(const LinearParams& params, const StepContext& ctx) {
  if (!ctx.batch_invariant || !params.row_parallel) return 1;
  if (ctx.communicator != nullptr) return kInvariantParts / ctx.communicator->size();
  return has_invariant_parts(params.weight.cols, 1) ? kInvariantParts : 1;
}

void linear_cpu(const LinearParams& params, const StepContext& ctx) {
  const TypedVectorOps& ops = vector_ops(params.dtype, "linear");
  check_params(params);
  const auto store_row = vector_ops(params.out_dtype, "linear").store_row;
  const WeightView& weight = params.weight;
  const int parts = num_invariant_parts(params, ctx);
  const int64_t part_cols = weight.cols / parts;
  const SumKernel kernel = sum_kernel(ops, weight, part_cols);
  const int64_t rows = params.logits_rows ? ctx.sizes.num_logits : ctx.sizes.num_tokens;
  const int64_t size = static_cast<int64_t>(dtype_size(params.dtype));
  const int64_t out_size = static_cast<int64_t>(dtype_size(params.out_dtype));
  const int64_t panel_bytes = kPanelRows * panel_cols(weight.dtype, weight.cols) * size;
  const char* panels = static_cast<const char*>(weight.data);

  // A group of panels is computed together. With an activation it is as many of gate as of up, and
  // its outputs are counted in panels of gate.
  const int64_t out_cols = params.out_cols();
  const int64_t out_panels = (out_cols + kPanelRows - 1) / kPanelRows;
  const bool narrow = rows > kStreamingRows && kMaxPanels * panel_bytes > kCachedPanelBytes;
  const int group_panels = narrow ? kMaxPanels / 2 : kMaxPanels;
  const int group_outs = params.gated() ? group_panels / 2 : group_panels;
  const int64_t num_groups = (out_panels + group_outs - 1) / group_outs;
  const int64_t row_items = (rows + kRowsPerItem - 1) / kRowsPerItem;

  const auto compute = [&](int64_t group, int64_t row_begin, int64_t row_end) {
    const int64_t first = group * group_outs;
    const int num_outs = static_cast<int>(std::min<int64_t>(group_outs, out_panels - first));
    const int64_t col = first * kPanelRows;
    const int64_t num_cols = std::min<int64_t>(num_outs * kPanelRows, out_cols - col);
    alignas(64) float sums[kMaxRowsPerBlock * kMaxPanels * kPanelRows];
    LinearBlock block;
    block.x_stride = weight.cols;
    block.cols = part_cols;
    block.num_panels = params.gated() ? 2 * num_outs : num_outs;
    block.out = sums;
    block.out_stride = kMaxPanels * kPanelRows;
    for (int p = 0; p < num_outs; ++p) {
      block.panels[p] = panels + (first + p) * panel_bytes;
      if (params.gated()) {
        block.panels[num_outs + p] = panels + (out_panels + first + p) * panel_bytes;
      }
    }
    for (int64_t row = row_begin; row < row_end; row += kernel.block_rows) {
      block.rows = std::min(kernel.block_rows, row_end - row);
      block.x = static_cast<const char*>(params.x) + row * weight.cols * size;
      sum_parts(kernel, block, parts, part_cols * size, part_cols * kPanelRows * size);
      const float* bias = params.bias == nullptr ? nullptr : params.bias + col;
      for (int64_t r = 0; r < block.rows; ++r) {
        const float* sum = sums + r * block.out_stride;
        char* out = static_cast<char*>(params.out) + ((row + r) * out_cols + col) * out_size;
        if (params.gated()) {
          ops.store_gated_mul_row(params.activation, sum, sum + num_outs * kPanelRows, bias,
                                  bias == nullptr ? nullptr : bias + out_cols, out, num_cols);
        } else {
          store_row(sum, bias, out, num_cols);
        }
      }
    }
  };

  const int64_t by_bytes = kBytesPerPiece / (group_panels * panel_bytes);
  const int64_t by_threads = num_groups / (kPiecesPerThread * ctx.pool->num_threads());
  const int64_t grain = row_items > 1 ? 1 : std::max<int64_t>(std::min(by_bytes, by_threads), 1);
  ctx.pool->parallel_for(num_groups * row_items, grain, [&](int64_t begin, int64_t end, int) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t row = i % row_items * kRowsPerItem;
      compute(i / row_items, row, std::min(row + kRowsPerItem, rows));
    }
  });
}

}  // namespace mrv1
