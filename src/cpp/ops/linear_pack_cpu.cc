// Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
#include <algorithm>
#include <type_traits>

#include "core/error.h"
#include "ops/linear.h"

namespace mrv1 {
namespace {

// Columns of a panel that are written at a time: 16 rows of them stay in the first-level cache.
constexpr int64_t kColsPerBlock = 64;

template <typename From, typename To>
To convert(From value) {
  if constexpr (std::is_same_v<From, To>) {
    return value;
  } else {
    return from_float<To>(to_float(value));
  }
}

// Rows [row_begin, row_end) of one panel; `source` is the row row_begin.
template <typename From, typename To>
void pack_panel(const WeightView& weight, To* data, const From* source, int64_t row_begin,
                int64_t row_end) {
  for (int64_t col_begin = 0; col_begin < weight.cols; col_begin += kColsPerBlock) {
    const int64_t col_end = std::min(col_begin + kColsPerBlock, weight.cols);
    for (int64_t row = row_begin; row < row_end; ++row) {
      const From* from = source + (row - row_begin) * weight.cols;
      for (int64_t col = col_begin; col < col_end; ++col) {
        data[panel_index(weight.dtype, weight.cols, row, col)] = convert<From, To>(from[col]);
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
        fail(ErrorKind::kInvalidArgument, kOp, "source dtype is ", dtype_name(source_dtype),
             ", must be float32, bfloat16 or float16");
    }
  });
}

}  // namespace mrv1
