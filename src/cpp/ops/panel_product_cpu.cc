// Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
#include "ops/panel_product_cpu.h"

#include <algorithm>

#include "core/error.h"
#include "ops/cpu_isa.h"

namespace mrv1 {
namespace {

// Rows whose float32 sums a thread holds at a time, on its stack.
constexpr int64_t kRowsPerBlock = 48;
constexpr int64_t kAmxRowsPerBlock = 64;  // two by two tiles, twice
constexpr int64_t kMaxRowsPerBlock = std::max(kRowsPerBlock, kAmxRowsPerBlock);
// Rows of one piece of work: its panels are read from cache for all but the first block.
constexpr int64_t kRowsPerItem = 192;
constexpr int64_t kSumCols = kMaxPanels * kPanelRows;
// Columns of NVFP4 panels that are decoded at a time, on the stack, for all rows of an item. Sums
// over so many columns are added up.
constexpr int64_t kFp4Cols = 256;
// With more rows than this, panels are read again and should stay in the second-level cache.
constexpr int64_t kStreamingRows = 12;
constexpr int64_t kCachedPanelBytes = 1 << 20;
// Bytes of weight a thread takes at a time: long enough for the prefetchers, short enough that
// threads finish together.
constexpr int64_t kBytesPerPiece = 1 << 18;
constexpr int64_t kPiecesPerThread = 4;

void check_params(const PanelProductParams& params, std::string_view op) {
  const WeightView& weight = params.weight;
  check(weight.layout == WeightLayout::kPanel16, op, "the weight must be in panels of 16 rows");
  const bool fp4 = weight.dtype == DType::kE2M1;
  check(fp4 || weight.dtype == params.dtype, op, "weight dtype is ", dtype_name(weight.dtype),
        ", must be ", dtype_name(params.dtype), " or ", dtype_name(DType::kE2M1));
  check(!fp4 || weight.cols % (kFp4Block * params.parts) == 0, op, "an NVFP4 weight has ",
        weight.cols, " columns, must be a multiple of ", kFp4Block * params.parts);
  check(params.out_dtype == params.dtype || params.out_dtype == DType::kF32, op, "out dtype is ",
        dtype_name(params.out_dtype), ", must be float32 or ", dtype_name(params.dtype));
  check(weight.rows > 0 && weight.cols > 0, op, "weight is [", weight.rows, ", ", weight.cols,
        "], must not be empty");
  if (params.activation == Activation::kNone) return;
  check(weight.rows % 2 == 0, op, "weight has ", weight.rows,
        " rows, must have as many of gate as of up");
  check(params.out_dtype == params.dtype, op, "out dtype is ", dtype_name(params.out_dtype),
        ", must be ", dtype_name(params.dtype), " with an activation");
}

constexpr int64_t panels_of(int64_t rows) { return (rows + kPanelRows - 1) / kPanelRows; }

}  // namespace

PanelProduct::SumKernel PanelProduct::sum_kernel(const TypedVectorOps& ops,
                                                 [[maybe_unused]] DType dtype,
                                                 [[maybe_unused]] int64_t part_cols) {
#if defined(__x86_64__)
  if (current_cpu_isa() == CpuIsa::kAmxBf16 && dtype == DType::kBF16 &&
      part_cols % amx::kAmxCols == 0) {
    return {amx::linear, kAmxRowsPerBlock};
  }
#endif
  return {ops.linear, kRowsPerBlock};
}

PanelProduct::PanelProduct(const PanelProductParams& params, const TypedVectorOps& ops,
                           std::string_view op)
    : params_(params), ops_(&ops) {
  check_params(params, op);
  const WeightView& weight = params.weight;
  const bool gated = params.activation != Activation::kNone;
  store_row_ = vector_ops(params.out_dtype, op).store_row;
  part_cols_ = weight.cols / params.parts;
  kernel_ = sum_kernel(ops, params.dtype, part_cols_);
  // Panels are decoded once for all rows of an item, where these need no more memory for parts.
  block_rows_ = is_fp4() && params.parts == 1 ? kRowsPerItem : kernel_.block_rows;
  panel_bytes_ = weight_bytes(weight.dtype, weight.layout, kPanelRows, weight.cols);
  out_cols_ = gated ? weight.rows / 2 : weight.rows;
  out_panels_ = panels_of(out_cols_);
  const bool narrow = params.rows > kStreamingRows && kMaxPanels * panel_bytes_ > kCachedPanelBytes;
  group_panels_ = narrow ? kMaxPanels / 2 : kMaxPanels;
  group_outs_ = gated ? group_panels_ / 2 : group_panels_;
  // Where up begins in the midst of a panel, its rows for one panel of gate lie in two.
  if (gated && out_cols_ % kPanelRows != 0) group_outs_ = 1;
  num_groups_ = (out_panels_ + group_outs_ - 1) / group_outs_;
  row_items_ = (params.rows + kRowsPerItem - 1) / kRowsPerItem;
}

int64_t PanelProduct::grain(int64_t total, int num_threads) const {
  if (row_items_ > 1) return 1;
  const int64_t by_bytes = kBytesPerPiece / (group_panels_ * panel_bytes_);
  const int64_t by_threads = total / (kPiecesPerThread * num_threads);
  return std::max<int64_t>(std::min(by_bytes, by_threads), 1);
}

void PanelProduct::sum_part(const LinearBlock& block) const {
  if (is_fp4()) return sum_fp4(block);
  kernel_.run(block);
}

void PanelProduct::sum_fp4(const LinearBlock& block) const {
  const WeightView& weight = params_.weight;
  const auto size = static_cast<int64_t>(dtype_size(params_.dtype));
  const char* first_panel = static_cast<const char*>(weight.data);
  alignas(64) char decoded[kMaxPanels][kPanelRows * kFp4Cols * sizeof(float)];
  alignas(64) float sums[kMaxRowsPerBlock * kSumCols];
  const int64_t width = block.num_panels * kPanelRows;
  for (int64_t col = 0; col < block.cols; col += kFp4Cols) {
    LinearBlock piece = block;
    piece.cols = std::min(kFp4Cols, block.cols - col);
    for (int p = 0; p < block.num_panels; ++p) {
      const auto* codes = static_cast<const uint8_t*>(block.panels[p]) + col * kPanelRows / 2;
      const int64_t place = reinterpret_cast<const char*>(codes) - first_panel;
      ops_->decode_fp4_panel(codes, weight.scales + place / (kFp4Block / 2), piece.cols,
                             decoded[p]);
      piece.panels[p] = decoded[p];
    }
    for (int64_t row = 0; row < block.rows; row += kernel_.block_rows) {
      float* out = block.out + row * block.out_stride;
      piece.rows = std::min(kernel_.block_rows, block.rows - row);
      piece.x = static_cast<const char*>(block.x) + (row * block.x_stride + col) * size;
      piece.out = col == 0 ? out : sums;
      kernel_.run(piece);
      for (int64_t r = 0; col > 0 && r < piece.rows; ++r) {
        for (int64_t i = 0; i < width; ++i) {
          out[r * block.out_stride + i] += sums[r * block.out_stride + i];
        }
      }
    }
  }
  float scales[kSumCols] = {};
  for (int p = 0; p < block.num_panels; ++p) {
    const int64_t panel = (static_cast<const char*>(block.panels[p]) - first_panel) / panel_bytes_;
    const int64_t rows = std::min(kPanelRows, weight.rows - panel * kPanelRows);
    std::copy_n(weight.row_scales + panel * kPanelRows, rows, scales + p * kPanelRows);
  }
  for (int64_t row = 0; row < block.rows; ++row) {
    float* out = block.out + row * block.out_stride;
    for (int64_t i = 0; i < width; ++i) out[i] *= scales[i];
  }
}

// Sums of `parts` neighbouring parts, a power of two, of block.cols columns each, from the block's
// on. A half of them is summed on the stack meanwhile.
void PanelProduct::sum_parts(const LinearBlock& block, int parts) const {
  if (parts == 1) return sum_part(block);
  sum_parts(block, parts / 2);
  const auto size = static_cast<int64_t>(dtype_size(params_.dtype));
  const int64_t x_bytes = part_cols_ * size;
  const int64_t panel_bytes = panel_bytes_ / params_.parts;
  alignas(64) float others[kMaxRowsPerBlock * kSumCols];
  LinearBlock half = block;
  half.out = others;
  half.x = static_cast<const char*>(block.x) + parts / 2 * x_bytes;
  for (int p = 0; p < block.num_panels; ++p) {
    half.panels[p] = static_cast<const char*>(block.panels[p]) + parts / 2 * panel_bytes;
  }
  sum_parts(half, parts / 2);
  for (int64_t row = 0; row < block.rows; ++row) {
    float* sums = block.out + row * block.out_stride;
    const float* more = others + row * block.out_stride;
    for (int64_t i = 0; i < block.num_panels * kPanelRows; ++i) sums[i] += more[i];
  }
}

void PanelProduct::compute(int64_t item) const {
  const int64_t row = item % row_items_ * kRowsPerItem;
  compute(item / row_items_, row, std::min(row + kRowsPerItem, params_.rows));
}

void PanelProduct::compute(int64_t group, int64_t row_begin, int64_t row_end) const {
  const WeightView& weight = params_.weight;
  const auto size = static_cast<int64_t>(dtype_size(params_.dtype));
  const auto out_size = static_cast<int64_t>(dtype_size(params_.out_dtype));
  const char* panels = static_cast<const char*>(weight.data);
  const bool gated = params_.activation != Activation::kNone;
  const int64_t first = group * group_outs_;
  const int num_outs = static_cast<int>(std::min<int64_t>(group_outs_, out_panels_ - first));
  const int64_t col = first * kPanelRows;
  const int64_t num_cols = std::min<int64_t>(num_outs * kPanelRows, out_cols_ - col);

  alignas(64) float sums[kRowsPerItem * kSumCols];
  LinearBlock block;
  block.x_stride = weight.cols;
  block.cols = part_cols_;
  block.num_panels = num_outs;
  block.out = sums;
  block.out_stride = kSumCols;
  for (int p = 0; p < num_outs; ++p) block.panels[p] = panels + (first + p) * panel_bytes_;
  const int64_t up_row = out_cols_ + col;
  const int64_t up_sums = num_outs * kPanelRows + up_row % kPanelRows;
  if (gated) {
    const int64_t up_panel = up_row / kPanelRows;
    const int64_t num_ups = panels_of(up_row + num_cols) - up_panel;
    for (int64_t p = 0; p < num_ups; ++p) {
      block.panels[block.num_panels++] = panels + (up_panel + p) * panel_bytes_;
    }
  }
  for (int64_t row = row_begin; row < row_end; row += block_rows_) {
    block.rows = std::min(block_rows_, row_end - row);
    block.x = static_cast<const char*>(params_.x) + row * weight.cols * size;
    sum_parts(block, params_.parts);
    const float* bias = params_.bias == nullptr ? nullptr : params_.bias + col;
    for (int64_t r = 0; r < block.rows; ++r) {
      const float* sum = sums + r * block.out_stride;
      char* out = static_cast<char*>(params_.out) + ((row + r) * out_cols_ + col) * out_size;
      if (gated) {
        ops_->store_gated_mul_row(params_.activation, sum, sum + up_sums, bias,
                                  bias == nullptr ? nullptr : bias + out_cols_, out, num_cols);
      } else {
        store_row_(sum, bias, out, num_cols);
      }
    }
  }
}

}  // namespace mrv1
