// Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
#include "io/fp4_weights.h"

#include <algorithm>
#include <cmath>
#include <string_view>

#include "core/error.h"
#include "core/float4.h"

namespace mrv1 {
namespace {

constexpr std::string_view kWhere = "nvfp4";

// Calls fn with a pointer to values of the dtype.
template <typename Fn>
auto with_values(const void* values, DType dtype, const Fn& fn) {
  switch (dtype) {
    case DType::kF32:
      return fn(static_cast<const float*>(values));
    case DType::kBF16:
      return fn(static_cast<const BFloat16*>(values));
    case DType::kF16:
      return fn(static_cast<const Float16*>(values));
    default:
      fail(ErrorKind::kInvalidArgument, kWhere, "values are ", dtype_name(dtype),
           ", must be float32, bfloat16 or float16");
  }
}

}  // namespace

float largest_magnitude(const void* values, DType dtype, int64_t count) {
  return with_values(values, dtype, [&](const auto* from) {
    uint32_t largest = 0;  // magnitudes are ordered as their bits are, NaN above all
    for (int64_t i = 0; i < count; ++i) {
      largest = std::max(largest, float_to_bits(to_float(from[i])) & 0x7fffffffu);
    }
    return bits_to_float(largest);
  });
}

Fp4Error quantize_fp4(const void* values, DType dtype, int64_t rows, int64_t cols,
                      float global_scale, uint8_t* codes, uint8_t* block_scales) {
  check(cols % kFp4Block == 0, kWhere, "there are ", cols, " columns, must be a multiple of ",
        kFp4Block);
  check(std::isfinite(global_scale) && global_scale >= 0.0f, kWhere, "the global scale is ",
        global_scale, ", must be finite and not negative");
  Fp4Error error;
  with_values(values, dtype, [&](const auto* from) {
    for (int64_t block = 0; block < rows * (cols / kFp4Block); ++block) {
      float block_values[kFp4Block];
      float largest = 0.0f;
      for (int64_t i = 0; i < kFp4Block; ++i) {
        block_values[i] = to_float(from[block * kFp4Block + i]);
        largest = std::max(largest, std::fabs(block_values[i]));
      }
      const Float8E4M3 scale = fp4_block_scale(largest, global_scale);
      block_scales[block] = scale.bits;
      double squared_errors = 0.0, squares = 0.0;
      for (int64_t i = 0; i < kFp4Block; ++i) {
        const Float4E2M1 code = fp4_code(block_values[i], scale, global_scale);
        uint8_t& byte = codes[(block * kFp4Block + i) / 2];
        byte = static_cast<uint8_t>(i % 2 == 0 ? code.bits : byte | code.bits << 4);
        const float off = fp4_value(code, scale) * global_scale - block_values[i];
        squared_errors += double{off} * off;
        squares += double{block_values[i]} * block_values[i];
        error.largest = std::max(error.largest, std::fabs(off));
      }
      error.squared_errors += squared_errors;
      error.squares += squares;
    }
  });
  return error;
}

void dequantize_fp4(const uint8_t* codes, const uint8_t* block_scales, int64_t rows, int64_t cols,
                    float global_scale, float* values) {
  check(cols % kFp4Block == 0, kWhere, "there are ", cols, " columns, must be a multiple of ",
        kFp4Block);
  for (int64_t i = 0; i < rows * cols; ++i) {
    const auto code = static_cast<uint8_t>(codes[i / 2] >> (i % 2 * 4) & 0xf);
    values[i] = fp4_value({code}, {block_scales[i / kFp4Block]}) * global_scale;
  }
}

}  // namespace mrv1
