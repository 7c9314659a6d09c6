// Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
#include <algorithm>
#include <cstring>
#include <type_traits>

#include "core/error.h"
#include "core/thread_pool.h"
#include "ops/linear.h"

namespace mrv1 {
namespace {

// Columns of a panel that are written at a time: 16 rows of them stay in the first-level cache.
constexpr int64_t kColsPerBlock = 64;

template <typename From, typename To>
void convert_row(const From* from, To* to, int64_t n) {
  if constexpr (std::is_same_v<From, To>) {
    std::memcpy(to, from, static_cast<size_t>(n) * sizeof(To));
  } else {
    for (int64_t i = 0; i < n; ++i) to[i] = from_float<To>(to_float(from[i]));
  }
}

// Rows [row_begin, row_end) of one panel; `source` is the row row_begin. A panel is a matrix of
// 4-byte words, one column of float32 or two of bfloat16 by 16 rows.
template <typename From, typename To>
void pack_panel(const WeightView& weight, To* data, const From* source, int64_t row_begin,
                int64_t row_end) {
  constexpr int64_t kColsPerWord = 4 / sizeof(To);
  for (int64_t col = 0; col < weight.cols; col += kColsPerBlock) {
    const int64_t cols = std::min(kColsPerBlock, weight.cols - col);
    const int64_t words = (cols + kColsPerWord - 1) / kColsPerWord;
    To block[kPanelRows][kColsPerBlock];
    for (int64_t row = row_begin; row < row_end; ++row) {
      To* to = block[row % kPanelRows];
      to[words * kColsPerWord - 1] = To{};  // the column that pads an odd number
      convert_row(source + (row - row_begin) * weight.cols + col, to, cols);
    }
    To* out =
        data + panel_index(weight.dtype, weight.cols, row_begin / kPanelRows * kPanelRows, col);
    const int64_t lane_begin = row_begin % kPanelRows;
    const int64_t lane_end = lane_begin + row_end - row_begin;
    for (int64_t word = 0; word < words; ++word) {
      for (int64_t lane = lane_begin; lane < lane_end; ++lane) {
        std::memcpy(out + (word * kPanelRows + lane) * kColsPerWord,
                    &block[lane][word * kColsPerWord], 4);
      }
    }
  }
}

template <typename From, typename To>
void pack(const WeightView& weight, void* data, const void* source, int64_t row_start,
          int64_t num_rows, ThreadPool& pool) {
  const int64_t first_panel = row_start / kPanelRows;
  const int64_t row_end = row_start + num_rows;
  const int64_t end_panel = (row_end + kPanelRows - 1) / kPanelRows;
  const int64_t grain = std::max<int64_t>((int64_t{1} << 18) / (kPanelRows * weight.cols), 1);
  pool.parallel_for(end_panel - first_panel, grain, [&](int64_t begin, int64_t end, int) {
    for (int64_t panel = first_panel + begin; panel < first_panel + end; ++panel) {
      const int64_t from = std::max(panel * kPanelRows, row_start);
      pack_panel(weight, static_cast<To*>(data),
                 static_cast<const From*>(source) + (from - row_start) * weight.cols, from,
                 std::min((panel + 1) * kPanelRows, row_end));
    }
  });
}

}  // namespace

void pack_panels(const WeightView& weight, void* data, const void* source, DType source_dtype,
                 int64_t row_start, int64_t num_rows, ThreadPool& pool) {
  constexpr std::string_view kOp = "pack_panels";
  check(weight.layout == WeightLayout::kPanel16, kOp, "the weight must be in panels of 16 rows");
  check(weight.cols > 0, kOp, "weight has ", weight.cols, " columns, must have at least 1");
  check(row_start >= 0 && num_rows >= 0 && row_start + num_rows <= weight.rows, kOp, "rows [",
        row_start, ", ", row_start + num_rows, ") must lie in [0, ", weight.rows, ")");
  if (num_rows == 0) return;
  if (weight.matrices > 1) {
    const int64_t rows = weight.rows / weight.matrices;
    const int64_t row_bytes = weight.cols * static_cast<int64_t>(dtype_size(source_dtype));
    for (int64_t done = 0; done < num_rows;) {
      const int64_t index = (row_start + done) / rows;
      const int64_t first = (row_start + done) % rows;
      const int64_t count = std::min(num_rows - done, rows - first);
      const WeightView one = matrix(weight, index);
      pack_panels(one, static_cast<char*>(data) + index * weight_bytes(one),
                  static_cast<const char*>(source) + done * row_bytes, source_dtype, first, count,
                  pool);
      done += count;
    }
    return;
  }
  dispatch_activation(weight.dtype, kOp, [&](auto to) {
    using To = typename decltype(to)::type;
    switch (source_dtype) {
      case DType::kF32:
        return pack<float, To>(weight, data, source, row_start, num_rows, pool);
      case DType::kBF16:
        return pack<BFloat16, To>(weight, data, source, row_start, num_rows, pool);
      case DType::kF16:
        return pack<Float16, To>(weight, data, source, row_start, num_rows, pool);
      case DType::kI32:
      case DType::kE4M3:
      case DType::kE5M2:
      case DType::kE2M1:
        fail(ErrorKind::kInvalidArgument, kOp, "source dtype is ", dtype_name(source_dtype),
             ", must be float32, bfloat16 or float16");
    }
  });
}

void pack_byte_panels(void* panels, int64_t width, int64_t matrix_rows, const void* source,
                      int64_t row_start, int64_t num_rows, ThreadPool& pool) {
  const int64_t matrix_panels = (matrix_rows + kPanelRows - 1) / kPanelRows;
  const int64_t grain = std::max<int64_t>((int64_t{1} << 18) / width, kPanelRows);
  pool.parallel_for(num_rows, grain, [&](int64_t begin, int64_t end, int) {
    for (int64_t next = begin; next < end;) {
      const int64_t row = (row_start + next) % matrix_rows;
      const int64_t lane = row % kPanelRows;
      const int64_t count = std::min({kPanelRows - lane, matrix_rows - row, end - next});
      const int64_t panel = (row_start + next) / matrix_rows * matrix_panels + row / kPanelRows;
      const auto* from = static_cast<const uint8_t*>(source) + next * width;
      auto* to = static_cast<uint8_t*>(panels) + panel * width * kPanelRows + lane;
      for (int64_t col = 0; col < width; ++col) {
        for (int64_t i = 0; i < count; ++i) to[col * kPanelRows + i] = from[i * width + col];
      }
      next += count;
    }
  });
}

}  // namespace mrv1
