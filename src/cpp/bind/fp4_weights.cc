// Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
#include "io/fp4_weights.h"

#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <string>
#include <vector>

#include "bind/bind.h"
#include "core/float4.h"

namespace mrv1 {
namespace {

int64_t count_values(const ByteArray& data, DType dtype) {
  const size_t size = dtype_size(dtype);
  check(data.size() % size == 0, "nvfp4", data.size(), " bytes are no whole number of ",
        dtype_name(dtype));
  check(reinterpret_cast<uintptr_t>(data.data()) % size == 0, "nvfp4",
        "the values are not aligned to their size");
  return static_cast<int64_t>(data.size() / size);
}

int64_t count_rows(int64_t count, int64_t cols) {
  check(cols > 0 && cols % kFp4Block == 0 && count % cols == 0, "nvfp4", count,
        " values are no rows of ", cols, " columns, which must be a multiple of ", kFp4Block);
  return count / cols;
}

nb::tuple quantize(ByteArray data, const std::string& dtype_text, int64_t cols,
                   float global_scale) {
  const DType dtype = dtype_from_name(dtype_text);
  const int64_t rows = count_rows(count_values(data, dtype), cols);
  std::vector<uint8_t> codes(static_cast<size_t>(rows * cols / 2));
  std::vector<uint8_t> scales(static_cast<size_t>(rows * cols / kFp4Block));
  Fp4Error error;
  {
    nb::gil_scoped_release release;
    error = quantize_fp4(data.data(), dtype, rows, cols, global_scale, codes.data(), scales.data());
  }
  const auto count = static_cast<size_t>(rows);
  return nb::make_tuple(to_numpy(codes, {count, static_cast<size_t>(cols / 2)}),
                        to_numpy(scales, {count, static_cast<size_t>(cols / kFp4Block)}),
                        error.squared_errors, error.squares, error.largest);
}

}  // namespace

void bind_fp4_weights(nb::module_& m) {
  m.def(
      "largest_magnitude",
      [](ByteArray data, const std::string& dtype_text) {
        const DType dtype = dtype_from_name(dtype_text);
        const int64_t count = count_values(data, dtype);
        nb::gil_scoped_release release;
        return largest_magnitude(data.data(), dtype, count);
      },
      nb::arg("data"), nb::arg("dtype"),
      "The largest magnitude of the values in `data`, uint8, or NaN if one is NaN.");
  m.def("nvfp4_global_scale", &fp4_global_scale, nb::arg("largest"),
        "The global scale of a tensor whose largest magnitude is `largest`.");
  m.def("quantize_nvfp4", &quantize, nb::arg("data"), nb::arg("dtype"), nb::arg("cols"),
        nb::arg("global_scale"),
        nb::sig("def quantize_nvfp4(data: NDArray[numpy.uint8], dtype: str, cols: int, "
                "global_scale: float) -> tuple[NDArray[numpy.uint8], NDArray[numpy.uint8], float, "
                "float, float]"),
        "Finite values, as uint8 in memory, in NVFP4: codes [rows, cols / 2], the even column in "
        "the\n"
        "low nibble; block scales [rows, cols / 16] as codes of E4M3; the sums of squared errors "
        "and\n"
        "of squares, and the largest error.");
  m.def(
      "dequantize_nvfp4",
      [](ByteArray codes, ByteArray block_scales, int64_t cols, float global_scale) {
        const auto count = static_cast<int64_t>(codes.size()) * 2;
        const int64_t rows = count_rows(count, cols);
        check(static_cast<int64_t>(block_scales.size()) == count / kFp4Block, "nvfp4",
              block_scales.size(), " block scales, must be ", count / kFp4Block);
        std::vector<float> values(static_cast<size_t>(count));
        {
          nb::gil_scoped_release release;
          dequantize_fp4(codes.data(), block_scales.data(), rows, cols, global_scale,
                         values.data());
        }
        return to_numpy(values, {static_cast<size_t>(rows), static_cast<size_t>(cols)});
      },
      nb::arg("codes"), nb::arg("block_scales"), nb::arg("cols"), nb::arg("global_scale"),
      "The values of codes and block scales, as quantize_nvfp4 returns them: float32 [rows, "
      "cols].");
}

}  // namespace mrv1
