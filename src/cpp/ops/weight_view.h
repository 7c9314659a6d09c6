// Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>

#include "core/dtype.h"

namespace mrv1 {

// How the elements of a matrix weight [rows, cols] lie in memory.
enum class WeightLayout {
  kRowMajor,  // element (r, c) at r * cols + c
  // CPU: panels of 16 rows, rows padded to 16 and columns to 2 with zeros. In bfloat16 a panel
  // holds for each pair of columns 16 rows x 2 elements (64 bytes); in float32 for each column 16
  // rows.
  kPanel16,
};

constexpr int64_t kPanelRows = 16;

// A weight as kernels see it: one copy, read by every op that names it.
struct WeightView {
  const void* data = nullptr;
  DType dtype = DType::kF32;
  WeightLayout layout = WeightLayout::kRowMajor;
  int64_t rows = 0;
  int64_t cols = 0;
};

// Columns of a panel as stored.
constexpr int64_t panel_cols(DType dtype, int64_t cols) {
  return dtype == DType::kF32 ? cols : (cols + 1) / 2 * 2;
}

// Bytes of a [rows, cols] weight as stored in the layout.
constexpr int64_t weight_bytes(DType dtype, WeightLayout layout, int64_t rows, int64_t cols) {
  const int64_t size = static_cast<int64_t>(dtype_size(dtype));
  if (layout == WeightLayout::kRowMajor) return rows * cols * size;
  return (rows + kPanelRows - 1) / kPanelRows * kPanelRows * panel_cols(dtype, cols) * size;
}

constexpr int64_t weight_bytes(const WeightView& weight) {
  return weight_bytes(weight.dtype, weight.layout, weight.rows, weight.cols);
}

// Index (in elements) of (row, col) in a kPanel16 weight.
MRV1_HD int64_t panel_index(DType dtype, int64_t cols, int64_t row, int64_t col) {
  const int64_t panel = row / kPanelRows;
  const int64_t lane = row % kPanelRows;
  if (dtype == DType::kF32) {
    return (panel * cols + col) * kPanelRows + lane;
  }
  const int64_t stored = (cols + 1) / 2 * 2;
  return panel * kPanelRows * stored + (col / 2) * (kPanelRows * 2) + lane * 2 + col % 2;
}

}  // namespace mrv1
