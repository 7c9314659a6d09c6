// Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>
#include <vector>

#include "core/float4.h"

namespace mrv1 {

// How the elements of a matrix weight [rows, cols] lie in memory.
enum class WeightLayout {
  kRowMajor,  // element (r, c) at r * cols + c
  // CPU: panels of 16 rows, rows padded to 16 and columns to 2 with zeros. In bfloat16 a panel
  // holds for each pair of columns 16 rows x 2 elements (64 bytes); in float32 for each column 16
  // rows; in E2M1 for each pair of columns a byte of each of 16 rows, and the scales for each block
  // of 16 columns one of each row.
  kPanel16,
  // CUDA, NVFP4: tiles of 16 rows and 128 columns (ops/fp4_tiles.h), padded with zeros.
  kTile16,
};

constexpr int64_t kPanelRows = 16;
constexpr int64_t kTileCols = 128;

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
  // NVFP4 (dtype kE2M1, cols a multiple of 16) only: element (r, c) is code * scales[r, c / 16] *
  // row_scales[r]. The product of the first two is exact in bfloat16; row_scales multiply sums over
  // columns, before anything is added to them.
  const uint8_t* scales = nullptr;     // [rows, cols / 16] of E4M3, in the layout
  const float* row_scales = nullptr;   // [rows]: the global scale of the tensor that a row is of
  const float* input_scale = nullptr;  // [1], of activations, for kernels that quantise them too
  // Where runs of rows with equal row_scales end, in host memory: known once a weight is loaded, or
  // null. Not of several matrices.
  const std::vector<int64_t>* scale_runs = nullptr;
};

// Columns of a panel as stored.
constexpr int64_t panel_cols(DType dtype, int64_t cols) {
  return dtype == DType::kF32 ? cols : (cols + 1) / 2 * 2;
}

// Rows of a matrix as stored in the layout.
constexpr int64_t stored_rows(WeightLayout layout, int64_t rows) {
  if (layout == WeightLayout::kRowMajor) return rows;
  return (rows + kPanelRows - 1) / kPanelRows * kPanelRows;
}

// And columns, of NVFP4.
constexpr int64_t stored_cols(WeightLayout layout, int64_t cols) {
  if (layout != WeightLayout::kTile16) return cols;
  return (cols + kTileCols - 1) / kTileCols * kTileCols;
}

// Bytes of a [rows, cols] matrix as stored in the layout, without the scales of NVFP4.
constexpr int64_t weight_bytes(DType dtype, WeightLayout layout, int64_t rows, int64_t cols) {
  if (dtype == DType::kE2M1) return stored_rows(layout, rows) * stored_cols(layout, cols) / 2;
  const int64_t size = static_cast<int64_t>(dtype_size(dtype));
  if (layout == WeightLayout::kRowMajor) return rows * cols * size;
  return stored_rows(layout, rows) * panel_cols(dtype, cols) * size;
}

constexpr int64_t weight_bytes(const WeightView& weight) {
  return weight.matrices *
         weight_bytes(weight.dtype, weight.layout, weight.rows / weight.matrices, weight.cols);
}

// Bytes of the block scales of NVFP4.
constexpr int64_t scale_bytes(const WeightView& weight) {
  return weight.matrices * stored_rows(weight.layout, weight.rows / weight.matrices) *
         (stored_cols(weight.layout, weight.cols) / kFp4Block);
}

// One of the matrices, as a weight of its own.
inline WeightView matrix(const WeightView& weight, int64_t index) {
  WeightView one = weight;
  one.rows = weight.rows / weight.matrices;
  one.matrices = 1;
  if (weight.matrices > 1) one.scale_runs = nullptr;
  one.data = static_cast<const char*>(weight.data) + index * weight_bytes(one);
  if (weight.scales != nullptr) one.scales = weight.scales + index * scale_bytes(one);
  if (weight.row_scales != nullptr) one.row_scales = weight.row_scales + index * one.rows;
  return one;
}

// Where the parts of a weight lie in its memory. Of NVFP4 the scales follow the codes, each part at
// a multiple of kWeightAlignment bytes; all other weights are their elements alone.
constexpr int64_t kWeightAlignment = 256;
struct WeightParts {
  int64_t scales = 0, row_scales = 0, input_scale = 0;
  int64_t bytes = 0;  // of all
};

constexpr WeightParts weight_parts(const WeightView& weight) {
  WeightParts parts;
  parts.bytes = weight_bytes(weight);
  if (weight.dtype != DType::kE2M1) return parts;
  const auto append = [&](int64_t bytes) {
    const int64_t begin =
        (parts.bytes + kWeightAlignment - 1) / kWeightAlignment * kWeightAlignment;
    parts.bytes = begin + bytes;
    return begin;
  };
  parts.scales = append(scale_bytes(weight));
  parts.row_scales = append(weight.rows * static_cast<int64_t>(sizeof(float)));
  parts.input_scale = append(sizeof(float));
  return parts;
}

// The view of a weight whose memory begins at `data`.
inline WeightView placed(WeightView weight, const void* data) {
  weight.data = data;
  if (weight.dtype != DType::kE2M1) return weight;
  const WeightParts parts = weight_parts(weight);
  const char* bytes = static_cast<const char*>(data);
  weight.scales = reinterpret_cast<const uint8_t*>(bytes + parts.scales);
  weight.row_scales = reinterpret_cast<const float*>(bytes + parts.row_scales);
  weight.input_scale = reinterpret_cast<const float*>(bytes + parts.input_scale);
  return weight;
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
