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
  // Rows are those of as many equal matrices, one after the other: the experts of a layer. Each is
  // stored by itself, so that matrix() has a layout of its own.
  int64_t matrices = 1;
  // NVFP4 (dtype kE2M1) only: element (r, c) is code * scales[r, c / 16] * row_scales[r]. The
  // product of the first two is exact in bfloat16; row_scales multiply sums over columns.
  const uint8_t* scales = nullptr;    // [rows, cols / 16] of E4M3
  const float* row_scales = nullptr;  // [rows]: the global scale of the tensor that a row is of
  float input_scale = 0.0f;           // of activations, for kernels that quantise them too
};

// Columns of a panel as stored.
constexpr int64_t panel_cols(DType dtype, int64_t cols) {
  return dtype == DType::kF32 ? cols : (cols + 1) / 2 * 2;
}

// Bytes of a [rows, cols] matrix as stored in the layout, without the scales of NVFP4.
constexpr int64_t weight_bytes(DType dtype, WeightLayout layout, int64_t rows, int64_t cols) {
  if (dtype == DType::kE2M1) return rows * cols / 2;
  const int64_t size = static_cast<int64_t>(dtype_size(dtype));
  if (layout == WeightLayout::kRowMajor) return rows * cols * size;
  return (rows + kPanelRows - 1) / kPanelRows * kPanelRows * panel_cols(dtype, cols) * size;
}

constexpr int64_t weight_bytes(const WeightView& weight) {
  return weight.matrices *
         weight_bytes(weight.dtype, weight.layout, weight.rows / weight.matrices, weight.cols);
}

// One of the matrices, as a weight of its own.
inline WeightView matrix(const WeightView& weight, int64_t index) {
  WeightView one = weight;
  one.rows = weight.rows / weight.matrices;
  one.matrices = 1;
  one.data = static_cast<const char*>(weight.data) + index * weight_bytes(one);
  if (weight.scales != nullptr) one.scales = weight.scales + index * one.rows * one.cols / 16;
  if (weight.row_scales != nullptr) one.row_scales = weight.row_scales + index * one.rows;
  return one;
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
